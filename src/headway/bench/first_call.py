"""``headway bench first-call``: how long a process waits for its first result.

Each call is the first of a process of its own, after its imports, its inputs and the start of CUDA: once
with an empty cache of compiled kernels, and once more with the cache that the first left behind. What a
call loads by itself, Triton and its compiler included, counts, and so does the plan of a planned one.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from headway.bench import overhead, report
from headway.bench.cases import DECODE, Case
from headway.bench.participants import make_inputs, planned_call, provider_call
from headway.errors import InvalidInputError

_RAGGED = (100, 900, 24)

CASES: dict[str, Case] = {
    "prefill": overhead.CASES[5],
    "prefill, ragged": replace(
        overhead.CASES[5],
        name=f"prefill {'+'.join(map(str, _RAGGED))} 32/8 d128",
        seqlens_q=_RAGGED,
        seqlens_k=_RAGGED,
    ),
    "decode": overhead.CASES[0],
    "decode, planned": overhead.CASES[0],
    "decode, latent": next(case for case in DECODE if case.latent),
}


def first_call(name: str, provider: str, device: torch.device) -> dict[str, float]:
    """Seconds of this process's first call until its result is there, and milliseconds of the next."""
    inputs = make_inputs(CASES[name], device)
    make = planned_call if name.endswith("planned") else provider_call
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call = make(inputs, provider)
    call(0)
    torch.cuda.synchronize()
    then = time.perf_counter()
    call(0)
    torch.cuda.synchronize()
    return {"first_call_s": then - begin, "again_ms": 1e3 * (time.perf_counter() - then)}


def in_a_new_process(name: str, provider: str, device: torch.device) -> dict[str, float]:
    """:func:`first_call` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(first_call, name, provider, device).result()


def measure(name: str, provider: str, device: torch.device) -> dict[str, Any]:
    """One case, with an empty cache and with a filled one: a row, or the reason why not."""
    row: dict[str, Any] = {"case": CASES[name].name, "call": name, "runner": provider}
    row["shape"] = CASES[name].described()
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            row |= in_a_new_process(name, provider, device)
            row["cached_s"] = in_a_new_process(name, provider, device)["first_call_s"]
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
    return row


COLUMNS = (
    report.Column("call", "call"),
    report.Column("case", "case"),
    report.Column("runner", "runner"),
    report.Column("first_call_s", "first call s", ".2f"),
    report.Column("cached_s", "with a filled cache s", ".2f"),
    report.Column("again_ms", "second call ms", ".2f"),
    report.Column("error", "error"),
)


def command(
    provider: Annotated[str, typer.Option(help="Providers, with commas.")] = "hopper",
    calls: Annotated[str, typer.Option(help="Calls, with semicolons.")] = "; ".join(CASES),
    output: Annotated[Path | None, typer.Option(help="Write the reading to this file.")] = None,
) -> None:
    """Measure how long a process waits for its first result, kernels compiled before and not."""
    if not torch.cuda.is_available():
        raise InvalidInputError("device", "no GPU", "a machine with one")
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [name.strip() for name in calls.split(";")]
    if unknown := [name for name in wanted if name not in CASES]:
        raise InvalidInputError("calls", unknown, f"of {'; '.join(CASES)}")
    results = []
    for one in provider.split(","):
        for row in map(functools.partial(measure, provider=one, device=device), wanted):
            print("  ".join(column.text(row) for column in COLUMNS), flush=True)
            results.append(row)
    if output is not None:
        settings = {"providers": provider, "calls": wanted}
        report.Reading("first-call", settings, results).save(output)
