"""``headway compile``: kernels for a model, or for everything, compiled ahead of time for any GPU.

Nothing of the target is needed here. What is compiled lands in Triton's cache (TRITON_CACHE_DIR), where a
process on a machine with the same Triton finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headway.errors import HeadwayError, InvalidInputError
from headway.kernels.compile import TARGETS, Case, Report, compile_cases

if TYPE_CHECKING:
    from rich.table import Table

    from headway.engine.config import EngineConfig
    from headway.kernels.portable.gated import Activation

#: Steps of the engine that a model's kernels are compiled for: (sequences, new tokens of each).
STEPS = ((8, 1), (4, 1024))


@dataclass(frozen=True)
class Precompiled:
    """What ``headway compile`` did, kernel by kernel."""

    reports: tuple[Report, ...]
    seconds: float

    @property
    def failures(self) -> list[str]:
        return [
            f"{r.target}: {r.label}: {r.kernel}: {why}" for r in self.reports if (why := r.failure)
        ]

    @property
    def spilled(self) -> list[Report]:
        """NVIDIA kernels that keep registers in memory."""
        return [r for r in self.reports if r.spill_bytes and TARGETS[r.target].is_nvidia]

    def save(self, path: Path) -> None:
        """Write the reports as JSON, with the versions that they depend on."""
        from headway.bench.report import Reading

        targets = list(dict.fromkeys(report.target for report in self.reports))
        settings = {"targets": targets, "seconds": round(self.seconds, 1)}
        Reading("compile", settings, [_row(report) for report in self.reports]).save(path)


def _row(report: Report) -> dict[str, Any]:
    row = {k: v for k, v in dataclasses.asdict(report).items() if v != ""}
    return row | {"seconds": round(report.seconds, 1)}


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Known target names, those of this machine's GPU where none is given; every one on a CPU."""
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise InvalidInputError("target", ", ".join(unknown), "of " + ", ".join(TARGETS))
    if names:
        return tuple(dict.fromkeys(names))
    if torch.cuda.is_available():
        from headway import devices

        here = devices.of(torch.device("cuda")).kind
        if here in TARGETS:
            return (here,)
        raise InvalidInputError("target", f"none, on a {here}", "one of " + ", ".join(TARGETS))
    return tuple(TARGETS)


def default_cases(*, every: bool = False) -> tuple[Case, ...]:
    """What is compiled without a model: all kernels at all tiles, or with ``every`` all widths besides."""
    _need_triton()
    from headway.kernels.hopper.cases import CASES
    from headway.kernels.portable.cases import DEFAULT, EVERY

    return (*(EVERY if every else DEFAULT), *CASES)


def model_cases(config: EngineConfig) -> tuple[Case, ...]:
    """What the engine launches for a model: its layers' attention in each kind of step, norms, blocks.

    Of the checkpoint only the configuration is read.
    """
    _need_triton()
    from headway.engine import describe
    from headway.kernels.portable.cases import latent_step, step, writes
    from headway.serving.mla import MLALayer

    probe, dtype = describe.probe_without_weights(config)
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16  # what the engine computes in on a GPU
    cases = []
    for number, kind in enumerate(describe.kinds(probe)):
        given: dict[str, Any] = {"page_size": config.page_size, "dtype": dtype}
        is_latent = isinstance(kind.layer, MLALayer)  # rotated before its vectors are written
        if not is_latent:
            given["rotary_dim"] = _rotary_dim(probe.config, kind.layer.head_dim)
        for batch_size, new_tokens in STEPS:
            name = f"layers like {number}: " + ("decode" if new_tokens == 1 else "prefill")
            sizes: dict[str, Any] = {"batch_size": batch_size, "new_tokens": new_tokens}
            run: Any = latent_step if is_latent else step
            cases.append(Case(name, functools.partial(run, kind.layer, **sizes, **given)))
        if not is_latent:
            write = functools.partial(writes, kind.layer, **given)
            cases.append(Case(f"layers like {number}: write", write))
    return (*cases, *_block_cases(probe.config, dtype))


def _rotary_dim(config: Any, head_dim: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return int(head_dim * (1.0 if share is None else share)) // 2 * 2


def _block_cases(config: Any, dtype: torch.dtype) -> tuple[Case, ...]:
    """What stands around attention, where the configuration has what it needs under its usual names."""
    from headway.kernels.portable.cases import gates, greedy, norms

    cases = []
    if hidden := getattr(config, "hidden_size", 0):
        cases.append(Case("norms", functools.partial(norms, hidden, dtype)))
    activations: dict[str, Activation] = {
        "silu": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
    }
    activation = activations.get(getattr(config, "hidden_act", None) or "")
    if activation and (inner := getattr(config, "intermediate_size", 0)):
        cases.append(Case("gates", functools.partial(gates, inner, activation, dtype)))
    if vocabulary := getattr(config, "vocab_size", 0):
        cases.append(Case("greedy", functools.partial(greedy, vocabulary, dtype)))
    return tuple(cases)


def _need_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise HeadwayError("compiling kernels needs the package triton")


def compile_all(
    cases: Iterable[Case],
    targets: Sequence[str],
    jobs: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Precompiled:
    """Compile cases for targets in ``jobs`` processes (default: one per CPU).

    Args:
        progress: called with how many of how many are done, and what the latest was.
    """
    start = time.perf_counter()
    pairs = [(case, target) for target in targets for case in cases if target in case.targets]
    reports: list[Report] = []
    progress(0, len(pairs), "")
    for done, found in enumerate(compile_cases(pairs, jobs), start=1):
        reports += found
        progress(done, len(pairs), f"{found[0].target} {found[0].label}")
    order = {(case.label, target): at for at, (case, target) in enumerate(pairs)}
    reports.sort(key=lambda report: order[report.label, report.target])
    return Precompiled(tuple(reports), time.perf_counter() - start)


def table(done: Precompiled) -> Table:
    """Registers, spills, shared memory and seconds of every kernel; once for each code."""
    from rich.table import Table

    shown = Table("target", "call", "kernel", "tile", title_justify="left")
    for heading in ("registers", "spilled B", "shared B", "seconds"):
        shown.add_column(heading, justify="right")
    seen: set[tuple[object, ...]] = set()
    for r in done.reports:
        numbers = (str(r.registers), str(r.spill_bytes), str(r.shared_bytes))
        code = (r.target, r.kernel, r.tile, *numbers, r.failure)
        if code in seen:
            continue
        seen.add(code)
        if r.failure:
            numbers = ("failed", "", "")
        style = "red" if r.failure else "yellow" if r.spill_bytes else None
        row = (r.target, r.label, r.kernel, r.tile, *numbers, f"{r.seconds:.1f}")
        shown.add_row(*row, style=style)
    return shown
