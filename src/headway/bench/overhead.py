"""``headway bench overhead``: what a call costs besides its kernel.

Host microseconds of a call that nothing waits for, eagerly; device microseconds of the same call within a
CUDA graph, where no host takes part. Decode steps are called without a plan, with the plan of a step
(``planned``), and as the first call of a step (``new step``), which plans and calls.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from headway.bench import report
from headway.bench.attention import graph_of, replay_ms
from headway.bench.cases import DECODE, Case
from headway.bench.participants import (
    PEERS,
    Call,
    Inputs,
    make_inputs,
    make_plan,
    planned_call,
    provider_call,
    requested_peers,
)
from headway.errors import HeadwayError, InvalidInputError

#: Calls per turn: few enough for the device's queue, so that no call waits in it.
CALLS = 40


def _prefill(batch: int, tokens: int) -> Case:
    lengths = (tokens,) * batch
    return Case(f"prefill {batch}x{tokens} 32/8 d128", "prefill", lengths, lengths, 32, 8, 128, 128)


def _step(batch: int, context: int) -> Case:
    name = f"B{batch} ctx {context} 32/8 d128"
    return replace(DECODE[0], name=name, seqlens_q=(1,) * batch, seqlens_k=(context,) * batch)


CASES = (
    _step(1, 1024),
    _step(1, 8192),
    _step(64, 1024),
    _step(1024, 100),
    _prefill(1, 128),
    _prefill(1, 1024),
)


def forms(inputs: Inputs, name: str) -> dict[str, Callable[[], Call]]:
    """The ways to call a provider, by name."""
    ways: dict[str, Callable[[], Call]] = {
        name: functools.partial(provider_call, inputs, name),
    }
    if inputs.case.kind == "decode":
        ways[f"{name}, planned"] = functools.partial(planned_call, inputs, name)
        ways[f"{name}, new step"] = functools.partial(stepping_call, inputs, name)
    return ways


def stepping_call(inputs: Inputs, name: str) -> Call:
    """A call that begins a step of its own."""
    plan = make_plan(inputs, name)
    if plan is None:
        raise InvalidInputError("provider", name, "one that makes plans")
    call = provider_call(inputs, name, plan)

    def run(i: int) -> Any:
        plan.new_step()
        return call(i)

    return run


def host_us(call: Call, sets: int) -> float:
    """Median microseconds until a call returns, the device idle at the start of each row of calls."""
    times = []
    torch.cuda.synchronize()
    for i in range(CALLS):
        begin = time.perf_counter()
        call(i % sets)
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def measure_form(
    name: str, make: Callable[[], Call], inputs: Inputs, rounds: int
) -> dict[str, Any]:
    """One way to call: a row with host and device time, or with the reason why not."""
    row: dict[str, Any] = {
        "case": inputs.case.name,
        "runner": name,
        "shape": inputs.case.described(),
    }
    sets = len(inputs.sets)
    try:
        call = make()
        begin = time.perf_counter()
        call(0)
        torch.cuda.synchronize()
        row["first_call_s"] = time.perf_counter() - begin
        host_us(call, sets)
        row["host_us"] = statistics.median(host_us(call, sets) for _ in range(rounds))
        graph = graph_of(call, sets)
        row["device_us"] = 1e3 * statistics.median(replay_ms(graph) for _ in range(rounds))
    except HeadwayError as error:
        row["error"] = str(error)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def measure_case(
    case: Case, names: Sequence[str], peers: Sequence[str], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """All forms of all participants on one case."""
    inputs = make_inputs(case, device)
    ways: dict[str, Callable[[], Call]] = {}
    for name in names:
        ways |= forms(inputs, name)
    ways |= {name: functools.partial(PEERS[name].make, inputs) for name in peers}
    return [measure_form(name, make, inputs, rounds) for name, make in ways.items()]


COLUMNS = (
    report.Column("case", "case"),
    report.Column("runner", "runner"),
    report.Column("host_us", "host us", ".1f"),
    report.Column("device_us", "device us", ".1f"),
    report.Column("first_call_s", "first call s", ".2f"),
    report.Column("error", "error"),
)


def command(
    provider: Annotated[str, typer.Option(help="Providers, with commas.")] = "hopper,portable",
    peers: Annotated[
        str, typer.Option(help=f"{', '.join(PEERS)} with commas, or 'all' installed ones.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rows of calls, of which the median.")] = 7,
    output: Annotated[Path | None, typer.Option(help="Write the reading to this file.")] = None,
) -> None:
    """Measure what attention calls cost besides their kernels: host and device microseconds."""
    if not torch.cuda.is_available():
        raise InvalidInputError("device", "no GPU", "a machine with one")
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = requested_peers(peers)
    results: list[dict[str, Any]] = []
    for case in CASES:
        rows = measure_case(case, provider.split(","), wanted, device, rounds)
        for row in rows:
            print("  ".join(column.text(row) for column in COLUMNS), flush=True)
        results += rows
        torch.cuda.empty_cache()
    if output is not None:
        settings = {"providers": provider, "peers": wanted, "rounds": rounds}
        report.Reading("overhead", settings, results).save(output)
