"""Packages that others wrote: finding them without running them, and calling them by what they take.

A package's functions are known by the parameters in its source, read without importing it: several forks
and versions go under one name, and importing one of them takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from headway.problem import FLOAT8_DTYPES, Mask, Problem, query_lengths


@dataclass(frozen=True)
class Package:
    """A package as people install it.

    ``module`` is imported for calls; ``source`` is the file, relative to the module's folder, that defines
    its functions (empty: the module's own file); ``binary`` is the extension module beside it that they
    call, where there are builds without; ``distribution`` is what pip knows it by.
    """

    module: str
    distribution: str
    source: str = ""
    install: str = ""
    binary: str = ""

    def __str__(self) -> str:
        return self.distribution

    def found(self) -> bool:
        """Whether it is installed here. Nothing of it is executed."""
        # A module without a spec was made by hand. One with a spec and no source here is another
        # package's: flash_attn.cute leaves flash_attn in sys.modules, and that is no FlashAttention 2.
        made = sys.modules.get(self.module)
        if made is not None and getattr(made, "__spec__", None) is None:
            return True
        return all(_file(module, source) is not None for module, source in self._parts())

    def _parts(self) -> list[tuple[str, str]]:
        """Its module and, where it has one, its binary."""
        parts = [(self.module, self.source)]
        return [*parts, (f"{self.module}.{self.binary}", "")] if self.binary else parts

    def version(self) -> str | None:
        """The installed version, None where the installation does not say."""
        return _version(self.distribution)

    def installed(self) -> tuple[str, str] | None:
        """Its name and version for people; None where it is not installed."""
        return (str(self), self.version() or "version unknown") if self.found() else None

    def parameters(self, function: str) -> frozenset[str]:
        """Names of the parameters of one of its functions; empty where there is no such function."""
        return _parameters(self.module, self.source, function)

    def folder(self) -> Path | None:
        """Where its source lies."""
        file = _file(self.module, self.source)
        return None if file is None else file.parent

    def missing(self) -> str:
        """The reason to give where it is not installed."""
        return f"package {self} is not installed (pip install {self.install or self.distribution})"

    def load(self) -> Any:
        """The module, imported; ImportError where that fails, with what failed."""
        loaded = [_load(module) for module, _ in self._parts()]
        return loaded[0]

    def broken(self) -> str | None:
        """Why an import that was tried has failed; None where none was tried or it succeeded."""
        errors = (_FAILED.get(module) for module, _ in self._parts())
        error = next((error for error in errors if error is not None), None)
        return (
            None if error is None else f"package {self} is installed but fails to import: {error}"
        )


#: Modules whose import has failed in this process, with the error. Python does not remember failures.
_FAILED: dict[str, str] = {}


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the initialisation of a foreign library may raise
        _FAILED[module] = f"{type(error).__name__}: {error}"
        raise ImportError(_FAILED[module]) from error


_CACHES: list[Any] = []

F = TypeVar("F", bound=Callable[..., Any])


def remembered(function: F) -> F:
    """Keep what a function of packages and devices found out, until :func:`forget`."""
    cached = functools.cache(function)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Look for packages anew, for processes that install some while they run."""
    for cached in _CACHES:
        cached.cache_clear()
    _FAILED.clear()
    importlib.invalidate_caches()


@remembered
def _file(module: str, source: str) -> Path | None:
    """The file of a module, found without importing its parents."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # a module made by hand, without a spec
        return None
    for part in rest:
        if spec is not None:
            places = list(spec.submodule_search_locations or ())
            spec = importlib.machinery.PathFinder.find_spec(part, places)
    if spec is None:
        return None
    locations = spec.submodule_search_locations
    if source:
        found = (Path(place) / source for place in locations or ())
        return next((path for path in found if path.exists()), None)
    return Path(spec.origin) if spec.origin else None


@remembered
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@remembered
def _parameters(module: str, source: str, function: str) -> frozenset[str]:
    file = _file(module, source)
    if file is not None and file.suffix == ".py":
        return _parameters_in(file.read_text(encoding="utf-8"), function)
    loaded = getattr(_load(module), function, None)
    return frozenset() if loaded is None else frozenset(inspect.signature(loaded).parameters)


def _parameters_in(text: str, function: str) -> frozenset[str]:
    """Parameters of a top-level function, from the text of its definition alone."""
    start = f"\n{text}".rfind(f"\ndef {function}(")
    if start < 0:
        return frozenset()
    head = ""
    for line in text[start:].splitlines():
        head += line + "\n"
        # The head of a definition is parsed line by line: files with such functions are long.
        if line.split("#")[0].rstrip().endswith(":"):
            try:
                node = ast.parse(head + "    pass").body[0]
            except SyntaxError:
                continue
            assert isinstance(node, ast.FunctionDef)
            arguments = node.args
            return frozenset(
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            )
    return frozenset()


def at_least(version: str | None, *wanted: int) -> bool:
    """Whether a version, as its package writes it, is at least this one; False where it is not known."""
    if version is None:
        return False
    numbers = []
    for word in version.replace("b", ".").split(".")[: len(wanted)]:
        digits = "".join(c for c in word if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers) >= wanted


# --- adapting calls and results -----------------------------------------------------------------------


def given(arguments: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """``arguments``, with those of the optional ones that are not None: the others need not exist."""
    arguments.update((name, value) for name, value in optional.items() if value is not None)
    return arguments


def window(mask: Mask) -> tuple[int, int]:
    """The window as FlashAttention 2 and 3 write it: -1 is unbounded."""
    left, right = mask.window_left, mask.window_right
    return (-1 if left is None else left, -1 if right is None else right)


def lengths_over_pages(problem: Problem) -> Tensor:
    """int32 (B,): keys per sequence, all that its row of the page table has room for if none are given."""
    if problem.seqlens_k is not None:
        return problem.seqlens_k
    assert problem.page_table is not None
    rows = problem.page_table.shape[1] * problem.k.shape[1]
    return torch.full((problem.batch_size,), rows, dtype=torch.int32, device=problem.device)


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """What tells the lengths and tables of one call from those of another."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def first_of(parameters: frozenset[str], *names: str) -> str | None:
    """The name, of several in use for one argument, that a function has."""
    return next((name for name in names if name in parameters), None)


def in_place(problem: Problem) -> Tensor | None:
    """``out`` where a kernel can write it itself, and nothing but rows in use."""
    # Without a single key there is no kernel: the host fills all of the tensor.
    if problem.out is None or problem.k.numel() == 0:
        return None
    written = torch.bfloat16 if problem.q.dtype in FLOAT8_DTYPES else problem.q.dtype
    return problem.out if problem.out.dtype == written else None


def asks_nothing(problem: Problem) -> bool:
    """Whether a call has no query to answer and no key to write: packages refuse some of these, and
    launch grids of no blocks for others."""
    return problem.batch_size == 0 or (problem.q.numel() == 0 and problem.append is None)


def nothing(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """What such a call returns."""
    return problem.empty_out(), problem.empty_lse() if problem.return_lse else None


def delivered(problem: Problem, result: Tensor) -> Tensor:
    """A result where the caller wants it: in ``out``, rows of padding left as they were.

    For packages without an ``out`` argument of their own; makes no copy where none was given.
    """
    out = problem.out
    if out is None or result is out:
        return result
    if not problem.ragged_q and problem.seqused_q is None:
        return out.copy_(result)
    return out.copy_(torch.where(_rows_in_use(problem)[..., None, None], result.to(out.dtype), out))


def _rows_in_use(problem: Problem) -> Tensor:
    """Boolean (total_q,) or (B, Sq), on the device: rows of q that belong to a query."""
    q, lengths = problem.q, query_lengths(problem)
    if problem.cu_seqlens_q is None:
        return torch.arange(q.shape[1], device=q.device) < lengths[:, None]
    rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    b = torch.searchsorted(problem.cu_seqlens_q, rows, right=True) - 1
    inside = b < problem.batch_size
    b = b.clamp(max=max(problem.batch_size - 1, 0))
    return inside & (rows - problem.cu_seqlens_q[b] < lengths[b])
