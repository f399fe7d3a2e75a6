"""Ahead-of-time compilation: what a launch compiles, for any target, without a device.

Launchers run on meta tensors while :func:`stand_in` takes the place of a device of the target: kernels
are specialised, compiled and cached by Triton as their launch would have it, and none is started.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from headway.errors import HeadwayError

#: The environment variable that names the target which meta tensors stand for.
TARGET_VARIABLE = "HEADWAY_TARGET"


@dataclass(frozen=True)
class Target:
    """A GPU as Triton's compiler knows it, and the shared memory that one program may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"


TARGETS: dict[str, Target] = {
    "sm80": Target("cuda", 80, 32, 163 << 10),
    "sm90": Target("cuda", 90, 32, 227 << 10),
    "sm100": Target("cuda", 100, 32, 227 << 10),
    "sm120": Target("cuda", 120, 32, 99 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
    "gfx950": Target("hip", "gfx950", 64, 160 << 10),
    "gfx1100": Target("hip", "gfx1100", 32, 64 << 10),
}


@dataclass(frozen=True)
class Report:
    """What came out of compiling one kernel. ``spill_bytes`` is per thread; shared memory per program."""

    label: str
    kernel: str
    target: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    tile: str = ""  # for kernels that have one: rows x keys, warps, stages
    error: str = ""
    key: str = ""  # that Triton's cache keeps it under

    @property
    def failure(self) -> str | None:
        """Why this kernel will not run on its target; None: it will."""
        if self.error:
            return self.error
        limit = TARGETS[self.target].shared_bytes
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory; {self.target} has {limit}"
        return None


@dataclass(frozen=True)
class Case:
    """Something to compile: ``launch`` runs launchers on meta tensors. Picklable."""

    label: str
    launch: Callable[[], None]
    targets: frozenset[str] = frozenset(TARGETS)


# --- in the place of a device -----------------------------------------------------------------------


@dataclass
class Compiled:
    """One kernel launch, with the kernel or what its compilation raised."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    seconds: float
    error: BaseException | None = None


class _Launcher:
    """Starts nothing. Has the parts of Triton's own launcher that are looked at."""

    launch_cooperative_grid = False
    launch_pdl = False

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        pass

    launch = __call__


class _Utilities:
    """Loads nothing and encodes no tensor maps."""

    @staticmethod
    def get_device_properties(device: object) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    @staticmethod
    def load_binary(name: str, *rest: object) -> tuple[object, object, int, int, int]:
        return name, name, 0, 0, 1 << 20

    @staticmethod
    def fill_tma_descriptor(*arguments: object) -> None:
        return None


@dataclass(frozen=True)
class _StandIn:
    """Triton's driver, as far as compilation needs one. Kernels are kept per device: it is the target."""

    target: str
    launcher_cls: Any = _Launcher
    utils: Any = field(default_factory=_Utilities)

    def get_current_target(self) -> Any:
        from headway.kernels._triton import GPUTarget

        target = TARGETS[self.target]
        return GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def stand_in(target: str) -> Iterator[list[Compiled]]:
    """Inside this context launches on meta tensors compile for ``target`` and start nothing.

    Yields:
        The launches so far. One whose compilation fails is kept with the error, and the next goes on.
    """
    from headway.kernels import _triton
    from headway.kernels.portable.operands import TARGETS as FACTS

    if _triton.INTERPRETED.value:
        raise HeadwayError(
            "kernels of this process are interpreted: start it with TRITON_INTERPRET=0"
        )
    launches: list[Compiled] = []
    jit_function = _triton.triton.runtime.jit.JITFunction
    original = jit_function.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        start, kernel, error = time.perf_counter(), None, None
        try:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as raised:
            error = raised
        seconds = time.perf_counter() - start
        launches.append(Compiled(self.__name__, kernel, given, seconds, error))
        if kernel is None and warmup:  # this caller works with the kernel
            raise _NothingToStart
        return kernel

    driver = _triton.triton.runtime.driver
    before = driver._active
    _forget_kernels()
    driver.set_active(_StandIn(target))
    properties = SimpleNamespace(multi_processor_count=FACTS[target].multiprocessors)
    try:
        with (
            _environment(TARGET_VARIABLE, target),
            _replaced(jit_function, "run", run),
            _replaced(torch.cuda, "get_device_properties", lambda device: properties),
            _replaced(torch.cuda, "is_current_stream_capturing", lambda: False),
            _replaced(torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            contextlib.suppress(_NothingToStart),
        ):
            yield launches
    finally:
        driver.set_active(before)
        _forget_kernels()


def _forget_kernels() -> None:
    """Let choices and launchers begin anew: what they keep is of another target, or was never loaded."""
    from headway import dispatch
    from headway.kernels import _triton
    from headway.kernels.hopper import decode, decode_plan, direct, forward

    dispatch.forget()
    for table in (_triton._compiled, direct._STARTED, forward._LAUNCHES):
        table.clear()
    for function in (decode._kernel_for, decode_plan._launches_for, decode_plan._planner):
        function.cache_clear()


class _NothingToStart(Exception):
    """Ends a launcher that would go on with a kernel which did not compile."""


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: object) -> Iterator[None]:
    """An attribute, for a while another one; absent again afterwards if it was before."""
    absent = object()
    before = getattr(holder, name, absent)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(holder, name)
        else:
            setattr(holder, name, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- what came out ----------------------------------------------------------------------------------


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


def _report(case: Case, target: str, launch: Compiled) -> Report:
    given = launch.arguments
    tile = ""
    if "BLOCK_M" in given and "BLOCK_N" in given:
        tile = f"{given['BLOCK_M']}x{given['BLOCK_N']} {given['num_warps']}w"
        tile += f" {given['num_stages']}s" if "num_stages" in given else ""
    same: dict[str, Any] = {"seconds": launch.seconds, "tile": tile}
    if launch.error is not None:
        error = f"{type(launch.error).__name__}: {launch.error}"
        return Report(case.label, launch.name, target, error=error, **same)
    registers, spilled = resources(launch.kernel)
    numbers = registers, spilled, launch.kernel.metadata.shared
    return Report(case.label, launch.name, target, *numbers, key=launch.kernel.hash, **same)


def _once_each(launches: Iterable[Compiled]) -> Iterator[Compiled]:
    """The first launch of every kernel, and those that failed."""
    seen = set()
    for launch in launches:
        if launch.kernel is None or launch.kernel.hash not in seen:
            yield launch
        if launch.kernel is not None:
            seen.add(launch.kernel.hash)


# --- many at once -----------------------------------------------------------------------------------


def compile_case(case: Case, target: str) -> list[Report]:
    """Compile every kernel that a case launches; an error becomes a report that carries it."""
    error: Exception | None = None
    with stand_in(target) as launches:
        try:
            case.launch()
        except Exception as raised:
            if isinstance(raised, _NothingToStart):
                raise
            error = raised
    reports = [_report(case, target, launch) for launch in _once_each(launches)]
    if error is not None:
        text = f"{type(error).__name__}: {error}"
        reports.append(Report(case.label, "(launcher)", target, error=text))
    elif not reports:
        reports.append(Report(case.label, "(launcher)", target, error="launched no kernel"))
    return reports


def compile_cases(
    pairs: Iterable[tuple[Case, str]], processes: int | None = None
) -> Iterator[list[Report]]:
    """Reports of (case, target) pairs as they finish, from parallel processes.

    Triton's cache is written by atomic renames, so processes that compile the same kernel at once
    only repeat work.
    """
    context = multiprocessing.get_context("spawn")
    with (
        _environment("TRITON_INTERPRET", "0"),
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        waiting = {
            pool.submit(compile_case, case, target): (case, target) for case, target in pairs
        }
        for future in as_completed(waiting):
            case, target = waiting[future]
            try:
                yield future.result()
            except BrokenProcessPool:
                lost = "the compiler's process died, of too little memory perhaps: fewer --jobs"
                yield [Report(case.label, "(process)", target, error=lost)]
