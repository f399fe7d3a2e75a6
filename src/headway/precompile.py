"""``headway compile``: kernels for a model, or for everything, compiled ahead of time for any GPU.

Nothing of the target is needed here. What is compiled lands in Triton's cache (TRITON_CACHE_DIR), where a
process on a machine with the same Triton finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headway.errors import HeadwayError, InvalidInputError
from headway.kernels.compile import TARGETS, Case, Report, compile_cases

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from headway.engine.config import EngineConfig
    from headway.engine.rehearsal import Rehearsal
    from headway.kernels.portable.gated import Activation
    from headway.serving.base import AttentionLayer


#: Attention backends whose kernels can be compiled here; auto chooses among them.
OWN_KERNELS = ("auto", "hopper", "portable")


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
    row = {k: v for k, v in dataclasses.asdict(report).items() if v != "" and k != "key"}
    return row | {"seconds": round(report.seconds, 1)}


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Known target names, those of this machine's GPU where none is given; every one on a CPU."""
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise InvalidInputError("target", ", ".join(unknown), "some of " + ", ".join(TARGETS))
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
    if config.attention_backend not in OWN_KERNELS:
        wanted = ", ".join(OWN_KERNELS) + ": other packages bring kernels of their own"
        raise InvalidInputError("attention_backend", config.attention_backend, wanted)
    from headway.engine import describe, loader
    from headway.engine.attention import probe_layers
    from headway.engine.rehearsal import Rehearsal

    model, dtype = describe.model_without_weights(config)
    text_config = model.config.get_text_config()
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16  # what the engine computes in on a GPU
    longest = loader.max_model_len(config, text_config)
    found = describe.kinds(probe_layers(model, text_config))
    cases: list[Case] = []
    for number, kind in enumerate(found):
        width = _rotary_dim(text_config, kind.layer.head_dim)
        rehearsal = Rehearsal.of(kind.layer, config, dtype, longest, width)
        name = f" (layers like {number})" if len(found) > 1 else ""
        cases += _layer_cases(name, rehearsal, model)
    return (*cases, *_block_cases(model, [kind.layer for kind in found], dtype))


def _layer_cases(name: str, rehearsal: Rehearsal, model: nn.Module) -> Iterator[Case]:
    """A layer's attention in the engine's steps."""
    from headway.engine.blocks import head_norms_of
    from headway.engine.rehearsal import BANDS
    from headway.serving.mla import MLALayer

    yield Case(f"decode{name}", rehearsal.decode)
    limit = rehearsal.config.chunked_prefill_size or rehearsal.max_model_len
    limit = min(limit, rehearsal.max_model_len)
    for band in BANDS:
        few, many = band[0], min(band[-1], limit)
        if few > limit:
            break
        tokens = f"{few}" if few == many else f"{few} to {many}"
        prefill = functools.partial(rehearsal.prefill, band)
        yield Case(f"{tokens} new tokens{name}", prefill)
    if isinstance(rehearsal.layer, MLALayer):
        if limit > 1:
            yield Case(f"passes over the cache{name}", rehearsal.passes)
    else:
        styles = [norm.style for norm in head_norms_of(model)]
        write = functools.partial(rehearsal.writes, styles)
        yield Case(f"write{name}", write)


def _rotary_dim(config: Any, head_dim: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return int(head_dim * (1.0 if share is None else share)) // 2 * 2


def _block_cases(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], dtype: torch.dtype
) -> Iterator[Case]:
    """What stands around attention, where the model has it under the usual names."""
    from headway.engine.blocks import feed_forward_widths, head_norms_of, norms_of
    from headway.kernels.norm_style import NormStyle
    from headway.kernels.portable.cases import gates, greedy, head_norms, norms

    for width, style in norms_of(model):
        tried = [one for one in NormStyle if one <= style]  # when the model is loaded
        yield Case(f"norms {width}", functools.partial(norms, width, dtype, tried))
    rows = {
        (heads, norm.width, _row_width(layer), norm.style)
        for norm, layer in itertools.product(head_norms_of(model), layers)
        for heads in (layer.num_q_heads, layer.num_kv_heads)
        if norm.width == layer.head_dim
    }
    for heads, width, row, style in sorted(rows):
        call = functools.partial(head_norms, heads, width, row, dtype, style)
        yield Case(f"norms of {heads} heads in {row}", call)
    for width in sorted(feed_forward_widths(model)):
        for activation in _tried(model.config.get_text_config()):
            gate = functools.partial(gates, width, activation, dtype)
            yield Case(f"gates {width} {activation}", gate)
    vocabulary = model.config.get_text_config().vocab_size
    yield Case("greedy", functools.partial(greedy, vocabulary, dtype))


def _row_width(layer: AttentionLayer) -> int:
    """Of the product for queries, keys and values."""
    keys = layer.head_dim + layer.head_dim_v
    return layer.head_dim * layer.num_q_heads + keys * layer.num_kv_heads


def _tried(config: Any) -> Iterator[Activation]:
    """The activations that are tried for a model's feed-forward blocks when it is loaded, up to its own."""
    from headway.kernels.portable.gated import ACTIVATIONS

    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    own = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    for activation in ACTIVATIONS:
        yield activation
        if activation == names.get(own or ""):
            return


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
    return Precompiled(tuple(_once_each(reports)), time.perf_counter() - start)


def _once_each(reports: Iterable[Report]) -> Iterator[Report]:
    """Every kernel where it comes first, with the time of the case that compiled it."""
    found: dict[object, list[Report]] = {}
    for number, report in enumerate(reports):
        found.setdefault((report.target, report.key) if report.key else number, []).append(report)
    for same in found.values():
        yield dataclasses.replace(same[0], seconds=max(report.seconds for report in same))


def cache_folder() -> str:
    """Where Triton keeps what it compiles."""
    from headway.kernels._triton import triton

    folder: str = triton.knobs.cache.dir
    return folder


def table(done: Precompiled) -> Table:
    """Registers, spills, shared memory and seconds of every kernel; once for each code."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = list(dict.fromkeys(report.target for report in done.reports))
    shown = Table(box=SIMPLE_HEAD, title=names[0] if len(names) == 1 else None)
    for heading in ("target", "call", "kernel", "tile")[len(names) == 1 :]:
        shown.add_column(heading, no_wrap=heading != "call")
    for heading in ("regs", "spilled B", "shared B", "seconds"):
        shown.add_column(heading, justify="right", no_wrap=True)
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
        shown.add_row(*row[len(names) == 1 :], style=style)
    return shown
