"""``headway bench cpu``: attention alone on a CPU, beside what torch offers for the same.

torch's fused CPU attention takes dense keys, so a paged cache is gathered for it first, as an engine
without paged kernels has to in every layer of every step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

import headway
from headway.bench import report
from headway.errors import InvalidInputError

PAGE_SIZE = 16


@dataclass(frozen=True)
class Case:
    """``batch`` sequences: ``new`` queries each over ``context`` keys, paged or dense, causal."""

    name: str
    batch: int
    new: int
    context: int
    heads: tuple[int, int]
    head_dim: int
    paged: bool


CASES = (
    Case("decode, 16 sequences of 2,048, paged", 16, 1, 2048, (32, 8), 128, True),
    Case("decode, 1 sequence of 16,384, paged", 1, 1, 16384, (32, 8), 128, True),
    Case("prefill, 512 after 1,536, paged", 1, 512, 2048, (32, 8), 128, True),
    Case("prefill, 2,048, dense", 1, 2048, 2048, (32, 8), 128, False),
)

COLUMNS = (
    report.Column("name", "case"),
    report.Column("headway_ms", "headway (ms)", ".2f"),
    report.Column("torch_ms", "torch (ms)", ".2f"),
    report.Column("speedup", "times as fast", ".2f"),
    report.Column("max_difference", "largest difference", ".1e"),
)

Call = Callable[[], Tensor]


def calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call]:
    """The case through Headway and through torch, on the same random tensors."""
    heads, kv_heads = case.heads
    q = torch.randn(case.batch, case.new, heads, case.head_dim, dtype=dtype)
    shape = case.batch * case.context, kv_heads, case.head_dim
    k, v = (torch.randn(shape, dtype=dtype) for _ in range(2))
    pages = case.context // PAGE_SIZE
    table = torch.randperm(case.batch * pages, dtype=torch.int32).view(case.batch, pages)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32)
    pool_k, pool_v = (t.view(-1, PAGE_SIZE, *t.shape[1:]) for t in (k, v))
    dense_k, dense_v = (t.view(case.batch, case.context, *t.shape[1:]) for t in (k, v))

    def ours() -> Tensor:
        if not case.paged:
            out = headway.flash_attn_func(q, dense_k, dense_v, causal=True)
        else:
            out = headway.flash_attn_with_kvcache(
                q, pool_k, pool_v, cache_seqlens=lengths, page_table=table, causal=True
            )
        assert isinstance(out, Tensor)
        return out

    def theirs() -> Tensor:
        keys, values = dense_k, dense_v
        if case.paged:
            keys, values = (t[table.long()].flatten(1, 2) for t in (pool_k, pool_v))
        return _sdpa(q, keys, values)

    return ours, theirs


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention over dense keys, causal from the bottom right."""
    new, context = q.shape[1], k.shape[1]
    mask = None
    if 1 < new < context:
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=new == context,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def measure(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Medians of ``repeats`` runs of each, in turns, after one that warms up."""
    both = calls(case, dtype)
    difference = (both[0]().float() - both[1]().float()).abs().max().item()
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(repeats):
        for which in (0, 1) if round_number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            both[which]()
            times[which].append(time.perf_counter() - start)
    mine, other = (1e3 * statistics.median(each) for each in times)
    return asdict(case) | {
        "headway_ms": mine,
        "torch_ms": other,
        "speedup": other / mine,
        "max_difference": difference,
    }


def command(
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 15,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of torch; default: its own choice.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this JSON file.")
    ] = None,
) -> None:
    """Measure attention on this CPU beside torch's own."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise InvalidInputError("dtype", repr(dtype), ", ".join(dtypes))
    from rich.progress import track

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = report.console()
    with torch.inference_mode():
        steps = track(CASES, "Measuring", console=console, transient=True)
        rows = [measure(case, dtypes[dtype], repeats) for case in steps]
    console.print(report.table(rows, COLUMNS, f"attention on the CPU, {dtype}"))
    if output is not None:
        settings = {"dtype": dtype, "repeats": repeats, "threads": torch.get_num_threads()}
        report.Reading("cpu", settings, rows).save(output)
        console.print(f"wrote {output}", markup=False)
