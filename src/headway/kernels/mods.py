"""score_mod and mask_mod: plain Python callables, turned into functions that kernels call.

A kernel takes the functions as ``constexpr`` arguments and the tensors they look into as one, ``aux``::

    if score_mod is not None:
        score = score_mod(score, b, h, q_idx, kv_idx, aux)
    if mask_mod is not None:
        visible = visible & mask_mod(b, h, q_idx, kv_idx, aux)

``score`` is a float32 block (BLOCK_M, BLOCK_N) of scaled, soft-capped scores; ``q_idx`` (BLOCK_M, 1) and
``kv_idx`` (1, BLOCK_N) are int32 absolute positions; ``b`` is an int32 scalar, ``h`` one or, where query
heads are packed into rows, (BLOCK_M, 1). The score comes back as (BLOCK_M, BLOCK_N) float32, the mask as
booleans that broadcast to it. Looking into tensors is safe for any index: outside it reads 0, so rows
and columns beyond the sequence need no care. :func:`trace_mods` gives all three arguments.

What a callable may do, with examples: docs/mods.md.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from headway.kernels import tracing
from headway.kernels.tracing import (
    BOOL,
    FLOAT32,
    HEAD,
    MASK_INPUTS,
    SCORE,
    SCORE_INPUTS,
    Node,
    Operand,
    Trace,
)

Language: TypeAlias = Literal["triton", "gluon"]
#: (tensor, sizes, strides) of each tensor that a function looks into
Arguments: TypeAlias = "tuple[tuple[Tensor, tuple[int, ...], tuple[int, ...]], ...]"


@dataclass(frozen=True)
class TracedMod:
    """A score_mod or mask_mod as kernels take it. Equal keys compute the same from their tensors."""

    body: str  # the function's lines; ``{L}`` stands for the kernel language
    inputs: tuple[str, ...]
    tensors: tuple[Tensor, ...]  # looked into, in the order the body numbers them

    @property
    def source(self) -> str:
        """The text of the Triton function."""
        return _text(self.body, self.inputs, "tl")

    @property
    def key(self) -> str:
        """What the function computes, as a hexadecimal digest of its text."""
        return _digest(self.source)

    def function(self, language: Language = "triton") -> Any:
        """The jit function for kernels of that language; one object per key in a process.

        In Gluon its layouts are those of its operands.
        """
        return _compiled(self.body, self.inputs, language)

    @property
    def arguments(self) -> Arguments:
        """This function's part of a kernel's ``aux``."""
        return tuple((t, tuple(t.shape), t.stride()) for t in self.tensors)


@dataclass(frozen=True)
class ModArguments:
    """The three kernel arguments that carry the mods of a call: two functions, or None, and ``aux``."""

    score_mod: Any
    mask_mod: Any
    aux: tuple[Arguments, Arguments]


def trace_mods(
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    aux_tensors: Sequence[Tensor],
    device: torch.device,
    language: Language = "triton",
) -> ModArguments:
    """Kernel arguments for the mods of a call; raises what :func:`trace_score_mod` raises."""
    score = None if score_mod is None else trace_score_mod(score_mod, aux_tensors, device)
    mask = None if mask_mod is None else trace_mask_mod(mask_mod, aux_tensors, device)
    return ModArguments(
        None if score is None else score.function(language),
        None if mask is None else mask.function(language),
        (() if score is None else score.arguments, () if mask is None else mask.arguments),
    )


def trace_score_mod(
    score_mod: Callable[..., Any],
    aux_tensors: Sequence[Tensor] = (),
    device: torch.device | None = None,
) -> TracedMod:
    """Turn ``score_mod(score, b, h, q_idx, kv_idx[, aux])`` into a kernel function.

    Args:
        aux_tensors: what the callable receives as ``aux``; it is called without when there are none.
        device: where the kernel will run, default that of the first aux tensor, else the CPU.

    Raises:
        UnsupportedError: the callable does something that cannot be part of a kernel; the message names
            the operation, the line and a replacement.
        InvalidInputError: it uses a tensor on another device, an index that is out of bounds, or
            returns something that is no score.
    """
    return _trace("score_mod", score_mod, SCORE_INPUTS, tuple(aux_tensors), device)


def trace_mask_mod(
    mask_mod: Callable[..., Any],
    aux_tensors: Sequence[Tensor] = (),
    device: torch.device | None = None,
) -> TracedMod:
    """:func:`trace_score_mod` for ``mask_mod(b, h, q_idx, kv_idx[, aux])``; non-zero means visible."""
    return _trace("mask_mod", mask_mod, MASK_INPUTS, tuple(aux_tensors), device)


def _trace(
    argument: str,
    fn: Callable[..., Any],
    inputs: tuple[str, ...],
    aux_tensors: tuple[Tensor, ...],
    device: torch.device | None,
) -> TracedMod:
    if device is None:
        device = aux_tensors[0].device if aux_tensors else torch.device("cpu")
    identity = _identity(fn)
    key: Hashable = None
    if identity is not None:
        kinds = tuple((t.dtype, t.dim(), tracing.is_wide(t), t.device) for t in aux_tensors)
        key = (argument, identity, kinds, device)
        if (known := _recorded.get(key)) is not None:
            body, slots = known
            return TracedMod(body, inputs, tuple(aux_tensors[slot] for slot in slots))
    trace = Trace(argument, aux_tensors, device)
    body = _body(trace, trace.run(fn, inputs), inputs)
    used = _slots(trace)
    if key is not None and used is not None:
        if len(_recorded) >= _RECORDED_MAX:
            _recorded.clear()
        _recorded[key] = (body, used)
    return TracedMod(body, inputs, tuple(trace.tensors))


#: Bodies by what determines them, so that a callable seen before need not run again on every call.
_recorded: dict[Hashable, tuple[str, tuple[int, ...]]] = {}
_RECORDED_MAX = 512


def _slots(trace: Trace) -> tuple[int, ...] | None:
    """Which aux tensors the body looks into; None if the trace depended on more than their kinds."""
    if not trace.only_traced:
        return None
    slots = []
    for tensor in trace.tensors:
        found = [i for i, aux in enumerate(trace.aux_tensors) if aux is tensor]
        if not found:
            return None
        slots.append(found[0])
    return tuple(slots)


# --- what a callable computes, without running it --------------------------------------------------------


def _identity(fn: object, depth: int = 0) -> Hashable | None:
    """A key that two callables share only if they compute the same; None where that cannot be told.

    Code, defaults, closure and the globals it names, all of which must be plain numbers, strings, dtypes,
    functions of the same kind, or the modules torch and math.
    """
    if not isinstance(fn, types.FunctionType) or depth > 3:
        return None
    code = fn.__code__
    try:
        cells = tuple(cell.cell_contents for cell in fn.__closure__ or ())
    except ValueError:  # a cell that is still empty
        return None
    kw_defaults = tuple(sorted((fn.__kwdefaults__ or {}).items()))
    used = tuple((name, fn.__globals__[name]) for name in _names(code) if name in fn.__globals__)
    parts = []
    for value in (cells, fn.__defaults__ or (), kw_defaults, used):
        frozen = _frozen(value, depth)
        if frozen is None:
            return None
        parts.append(frozen)
    return (code, *parts)


def _names(code: types.CodeType) -> tuple[str, ...]:
    nested = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return (*code.co_names, *(name for inner in nested for name in _names(inner)))


def _frozen(value: object, depth: int) -> Hashable | None:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return (type(value).__name__, repr(value))
    if value is torch or value is math:
        return ("module", repr(value))
    if isinstance(value, tuple):
        parts = tuple(_frozen(part, depth) for part in value)
        return None if None in parts else parts
    return _identity(value, depth + 1)


# --- from nodes to text ----------------------------------------------------------------------------------

_TEMPLATES = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "idiv": "{0} // {1}",
    "irem": "{0} % {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "lshift": "{0} << {1}",
    "rshift": "{0} >> {1}",
    "neg": "-{0}",
    "invert": "~{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "where": "{{L}}.where({0}, {1}, {2})",
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_FUNCTIONS = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf")
_TEMPLATES.update({name: f"{{{{L}}}}.{name}({{0}})" for name in (*_FUNCTIONS, "floor", "ceil")})


class _Writer:
    """Writes the nodes that a result needs, each once, in the order they were computed."""

    def __init__(self, inputs: tuple[str, ...]) -> None:
        self.table = "aux[0]" if "score" in inputs else "aux[1]"
        self.lines: list[str] = []
        self.slots: dict[int, int] = {}
        self._names: dict[Node, str] = {}

    def name(self, x: Operand) -> str:
        if not isinstance(x, Node):
            return _literal(x)
        if x not in self._names:
            self._names[x] = x.args[0] if x.op == "input" else self._assign(x)
        return self._names[x]

    def _assign(self, node: Node) -> str:
        if node.op == "load":
            return self._load(node)
        if node.op == "cast":
            return self.line(f"{self.name(node.args[0])}.to({{L}}.{node.dtype})")
        if node.op == "round":
            value, dtype = node.args
            return self.line(f"{self.name(value)}.to({{L}}.{dtype}).to({{L}}.{node.dtype})")
        if node.op == "const":
            value = _literal(node.args[0])
            return self.line(
                f"{{L}}.where(kv_idx == kv_idx, {value}, {value}).to({{L}}.{node.dtype})"
            )
        expression = _TEMPLATES[node.op].format(*map(self.name, node.args))
        if node.dtype == BOOL and node.op in _COMPARISONS and node.extent <= HEAD:
            # Triton's interpreter spreads a scalar over a block in the dtype of what was compared.
            expression = f"({expression}).to({{L}}.int32) != 0"
        return self.line(expression)

    def line(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def _load(self, node: Node) -> str:
        slot, wide, *indices = node.args
        tensor = f"{self.table}[{self.slots.setdefault(slot, len(self.slots))}]"
        offset, inside = f"{tensor}[0]", []
        for dim, index in enumerate(indices):
            size = f"{tensor}[1][{dim}]"
            if not isinstance(index, Node):
                at = str(index) if index >= 0 else f"({size} - {-index})"
            else:
                at = self.name(index)
                if not index.nonneg:
                    at = self.line(f"{{L}}.where({at} < 0, {at} + {size}, {at})")
                    inside.append(f"({at} >= 0)")
                inside.append(f"({at} < {size})")
                at = f"{at}.to({{L}}.int64)" if wide else at
            offset += f" + {at} * {tensor}[2][{dim}]"
        mask = f", mask={self._bounds(indices, inside)}, other=0" if inside else ""
        return self.line(f"{{L}}.load({offset}{mask}).to({{L}}.{node.dtype})")

    def _bounds(self, indices: list[Operand], inside: list[str]) -> str:
        bounds = " & ".join(inside)
        extents = {index.extent for index in indices if isinstance(index, Node)}
        # Triton's interpreter: what of the two is a scalar would make the mask one of integers.
        return f"({bounds}) != 0" if len(extents) > 1 else bounds


def _literal(value: bool | int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)


def _body(trace: Trace, result: Operand, inputs: tuple[str, ...]) -> str:
    writer = _Writer(inputs)
    if "score" in inputs:
        value = writer.name(tracing.cast(trace, result, FLOAT32))
        if not (
            isinstance(result, Node) and result.extent == SCORE
        ):  # bring it to the block's shape
            value = writer.line(f"{{L}}.where(score == score, {value}, {value})")
    else:
        shown = tracing.cast(trace, result, BOOL)
        if isinstance(shown, Node):
            value = writer.name(shown)
        else:
            value = writer.line(f"kv_idx {'==' if shown else '!='} kv_idx")
    trace.tensors = [trace.tensors[slot] for slot in writer.slots]
    return "\n".join([*writer.lines, f"return {value}"])


def _text(body: str, inputs: tuple[str, ...], module: str) -> str:
    kind = "score_mod" if "score" in inputs else "mask_mod"
    name = f"{kind}_{_digest(body)[:8]}"
    lines = body.replace("{L}", module).splitlines()
    return "\n    ".join([f"def {name}({', '.join(inputs)}, aux):", *lines]) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def kind_of(aux: Any) -> object:
    """What compiled code depends on in ``aux``: the types in its nest of tuples, and pointer alignment."""
    if isinstance(aux, tuple):
        return tuple(kind_of(x) for x in aux)
    if isinstance(aux, Tensor):
        return aux.dtype, aux.data_ptr() % 16 == 0
    if isinstance(aux, int):
        # Triton compiles for 1 and for multiples of 16 apart from other integers.
        return aux == 1, aux % 16 == 0, aux >= 2**31
    return type(aux)


@functools.cache
def _compiled(body: str, inputs: tuple[str, ...], language: Language) -> Any:
    """The jit function of a body. Its text stays in linecache: Triton reads it, tracebacks show it."""
    from headway.kernels import _triton  # here, because tracing also serves machines without Triton

    module = {"triton": "tl", "gluon": "gl"}[language]
    jit = _triton.jit if language == "triton" else _triton.gluon.jit
    text = _text(body, inputs, module)
    filename = f"<headway {language} mod {_digest(text)[:16]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace = {module: getattr(_triton, module), "__name__": "headway.kernels.mods.generated"}
    exec(compile(text, filename, "exec"), namespace)
    return jit(namespace[text[4 : text.index("(")]])
