"""Ahead-of-time compilation: what a launch would compile, for any target, without a device.

Launchers run on meta tensors while :func:`record_launches` keeps their kernel calls; each call is then
compiled for a target as the launch would, specialisation of integers and pointers included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Target names, and what Triton calls them: (backend, architecture, threads per warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "sm120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}

_ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel call, as a launcher made it."""

    kernel: Any  # the jit function
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What came out of compiling one kernel. ``spill_bytes`` is per thread; shared memory per program."""

    label: str
    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    error: str = ""


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside this context kernels are not run: their calls are kept, in order."""
    from headway.kernels._triton import triton

    launches: list[Launch] = []
    original = triton.runtime.jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = {name: given.pop(name) for name in self.arg_names if name in given}
        launches.append(Launch(self, arguments, given))

    triton.runtime.jit.JITFunction.run = run
    try:
        yield launches
    finally:
        triton.runtime.jit.JITFunction.run = original


def specialised(value: Any, path: tuple[int, ...]) -> tuple[Any, dict[Any, Any], dict[Any, Any]]:
    """(type, constants, attributes) of a run-time argument, as Triton specialises it at launch."""
    if isinstance(value, torch.Tensor):
        return f"*{_ELEMENTS[value.dtype]}", {}, {path: [["tt.divisibility", 16]]}
    if isinstance(value, tuple):
        types: list[Any] = []
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}
        for i, item in enumerate(value):
            kind, inner, hints = specialised(item, (*path, i))
            types.append(kind)
            constants |= inner
            attributes |= hints
        return tuple(types), constants, attributes
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr", {path: value}, {}
    if isinstance(value, int):
        kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        return kind, {}, {path: [["tt.divisibility", 16]]} if value % 16 == 0 else {}
    if isinstance(value, float):
        return "fp32", {}, {}
    raise TypeError(f"a kernel argument of type {type(value).__name__}")


def source_of(launch: Launch) -> Any:
    """The launch as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        kind, inner, hints = specialised(value, (i,))
        signature[parameter.name] = kind
        constants |= inner
        attributes |= hints
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel of a launch; its ``asm`` and ``metadata`` need no device."""
    from headway.kernels._triton import GPUTarget, triton

    return triton.compile(
        source_of(launch), target=GPUTarget(*TARGETS[target]), options=launch.options
    )


# --- what came out --------------------------------------------------------------------------------------


def resources(compiled: Any) -> tuple[int, int]:
    """(registers, spilled bytes) per thread of a compiled kernel."""
    if "cubin" in compiled.asm:
        return _cubin_resources(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        int(match.group(1)) if (match := re.search(rf"\.{name}:\s*(\d+)", text)) else 0
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, 4 * spilled


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes; kernels keep nothing else on the stack than what they spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text}")
    return int(found.group(1)), int(found.group(2))


@functools.cache
def _cuobjdump() -> str:
    from headway.kernels._triton import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


# --- many at once ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something to compile: ``launch`` runs launchers on meta tensors."""

    label: str
    launch: Callable[[], None]


def compile_case(case: Case, target: str) -> list[Report]:
    """Compile every kernel that a case launches; an error becomes a report that carries it."""
    os.environ["HEADWAY_TARGET"] = target
    with record_launches() as launches:
        case.launch()
    reports = []
    for launch in launches:
        name, begin = launch.kernel.__name__, time.perf_counter()
        report = Report(case.label, name, target, 0, 0, 0, 0.0)
        try:
            compiled = compile_launch(launch, target)
        except Exception as error:
            reports.append(dataclasses.replace(report, error=f"{type(error).__name__}: {error}"))
            continue
        registers, spill = resources(compiled)
        reports.append(
            dataclasses.replace(
                report,
                registers=registers,
                spill_bytes=spill,
                shared_bytes=compiled.metadata.shared,
                seconds=time.perf_counter() - begin,
            )
        )
    return reports


def compile_cases(
    cases: Iterable[tuple[Case, str]], processes: int | None = None
) -> Iterator[list[Report]]:
    """Reports of (case, target) pairs as they finish, from parallel processes.

    Triton's cache is written by atomic renames, so processes that compile the same kernel at once
    only repeat work.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(compile_case, case, target) for case, target in cases]
        for future in futures:
            yield future.result()
