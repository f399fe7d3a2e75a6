"""``headway bench mla``: MLA prefill at 192/128, float8 by persistent schedule beside bfloat16.

All participants get the same bfloat16 tensors, so the time of float8 holds what it costs: the largest
magnitudes (unless scales are given), the casts, the transpose of values, the merge; but for one, whose
inputs are float8 already. The plan is made before: an engine makes it once per step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import headway
from headway import mla, quant
from headway.bench import report
from headway.bench.attention import TURN_MS
from headway.errors import HeadwayError, InvalidInputError

HEAD_DIM, HEAD_DIM_V = 192, 128

#: Queries at the end of the last sequence whose results are compared with float64.
ROWS_CHECKED = 64


@dataclass(frozen=True)
class Case:
    """Sequences of new tokens behind, or of, so many keys."""

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads: int
    causal: bool = True
    #: of the values, whose deviation is 1: where it is not 0, long sums show their rounding
    mean: float = 0.0

    @property
    def flops(self) -> float:
        """Of the pairs of a query and a key that it sees; multiply-adds count two."""
        pairs = 0
        for n, m in zip(self.seqlens_q, self.seqlens_k, strict=True):
            pairs += n * m - (n * (n - 1) // 2 if self.causal else 0)
        return 2.0 * (HEAD_DIM + HEAD_DIM_V) * self.heads * pairs


CASES = (
    Case("1 x 16384, 16 heads", (16384,), (16384,), 16),
    Case("1 x 16384, 16 heads, values around 1/2", (16384,), (16384,), 16, mean=0.5),
    Case("4 x 4096, 16 heads", (4096,) * 4, (4096,) * 4, 16),
    Case("1 x 8192, 128 heads", (8192,), (8192,), 128),
    Case("16 x 1024, 128 heads", (1024,) * 16, (1024,) * 16, 128),
    Case("2048 behind 14336, 16 heads", (2048,), (16384,), 16),
    Case("2048 against a chunk of 16384, 16 heads", (2048,), (16384,), 16, causal=False),
)


@dataclass(frozen=True)
class Inputs:
    """bfloat16 tensors of a case, with its boundaries on the host and on the device."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor

    @staticmethod
    def of(case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int) -> Tensor:
            shape = (rows, case.heads, width)
            return torch.randn(shape, generator=generator, device=device).bfloat16()

        total_q, total_k = sum(case.seqlens_q), sum(case.seqlens_k)
        q, k = normal(total_q, HEAD_DIM), normal(total_k, HEAD_DIM)
        v = normal(total_k, HEAD_DIM_V) + case.mean
        return Inputs(case, q, k, v, _starts(case.seqlens_q), _starts(case.seqlens_k))

    def exact(self) -> Tensor:
        """The results of the last sequence's last queries in float64, (rows, heads, Dv)."""
        n, m = self.case.seqlens_q[-1], self.case.seqlens_k[-1]
        rows = min(ROWS_CHECKED, n)
        q, k, v = (t.double().transpose(0, 1) for t in (self.q[-rows:], self.k[-m:], self.v[-m:]))
        scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
        if self.case.causal:
            last = torch.arange(m - rows, m, device=q.device)
            hidden = torch.arange(m, device=q.device) > last[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1)


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def participants(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Calls by name; each returns the output."""
    case, q, k, v, device = inputs.case, inputs.q, inputs.k, inputs.v, inputs.q.device
    cu_q, cu_k = inputs.cu_q.to(device), inputs.cu_k.to(device)
    longest = max(case.seqlens_q), max(case.seqlens_k)
    out = q.new_empty(*q.shape[:-1], HEAD_DIM_V)
    plan = mla.plan_prefill(
        inputs.cu_q, inputs.cu_k, num_heads_k=case.heads, causal=case.causal, device=device
    )

    def bfloat16(backend: str) -> Any:
        return headway.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, *longest, causal=case.causal, out=out, backend=backend
        )

    stored = [quant.quantise(t) for t in (q, k, v)]
    scales = {f"{name}_scale": made.scale for name, made in zip("qkv", stored, strict=True)}

    def float8(tensors: tuple[Tensor, Tensor, Tensor], backend: str, **given: Any) -> Any:
        return mla.prefill(
            *tensors, inputs.cu_q, inputs.cu_k, causal=case.causal, fp8=True, plan=plan, out=out,
            backend=backend, **given,
        )  # fmt: skip

    as_given, in_float8 = (q, k, v), (stored[0].values, stored[1].values, stored[2].values)
    return {
        "bfloat16 portable": lambda: bfloat16("portable"),
        "bfloat16 hopper": lambda: bfloat16("hopper"),
        "float8 portable": lambda: float8(as_given, "portable"),
        "float8 hopper": lambda: float8(as_given, "hopper"),
        "float8 hopper, scales given": lambda: float8(as_given, "hopper", **scales),
        "float8 hopper, inputs in float8": lambda: float8(in_float8, "hopper", **scales),
    }


def measure(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row per participant: milliseconds (medians of interleaved turns), TFLOPS, relative error."""
    from triton.testing import do_bench

    inputs = Inputs.of(case, device)
    want = inputs.exact()
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, call in participants(inputs).items():
        row = rows[name] = {"case": case.name, "runner": name, "shape": asdict(case)}
        try:
            got = call()[-want.shape[0] :].double()
        except HeadwayError as error:
            row["error"] = str(error)
            continue
        row["relative_error"] = float((got - want).norm() / want.norm())
        calls[name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(do_bench(call, 10, TURN_MS, return_mode="median"))
    for name, taken in times.items():
        ms = statistics.median(taken)
        rows[name] |= {"ms": ms, "tflops": case.flops / ms * 1e-9}
    own = [row["ms"] for name, row in rows.items() if name.startswith("bfloat16") and "ms" in row]
    for row in rows.values():
        if own and "ms" in row:
            row["of_own_bfloat16"] = min(own) / row["ms"]
    return list(rows.values())


COLUMNS = (
    report.Column("case", "case"),
    report.Column("runner", "runner"),
    report.Column("ms", "ms", ".3f"),
    report.Column("tflops", "TFLOPS", ".0f"),
    report.Column("of_own_bfloat16", "times our best bfloat16", ".2f"),
    report.Column("relative_error", "relative error", ".1e"),
    report.Column("error", "error"),
)


def command(
    match: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each participant.")] = 7,
    output: Annotated[Path | None, typer.Option(help="Write the reading to this file.")] = None,
) -> None:
    """Measure MLA prefill on a GPU: float8 by persistent schedule against bfloat16."""
    if not torch.cuda.is_available():
        raise InvalidInputError("device", "no GPU", "a machine with one")
    device = torch.device("cuda", torch.cuda.current_device())
    results: list[dict[str, Any]] = []
    for case in (case for case in CASES if match in case.name):
        rows = measure(case, device, rounds)
        torch.cuda.empty_cache()
        for row in rows:
            print("  ".join(column.text(row) for column in COLUMNS), flush=True)
        results += rows
        if output is not None:
            report.Reading("mla", {"rounds": rounds}, results).save(output)
