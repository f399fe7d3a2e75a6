"""``headway bench attention``: providers and peers on the same inputs, interleaved, medians of rounds.

A case (:mod:`headway.bench.cases`) is data; what runs it is a participant
(:mod:`headway.bench.participants`). All participants of a case are timed in turns within one process, so
that a clock that drifts drifts for all. Prefill is timed call by call, with other data written through the
L2 cache in between; decode as replays of a CUDA graph of several calls over rotating caches, as engines
run it, and eagerly, call behind call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from headway.bench import report
from headway.bench.cases import SUITES, Case
from headway.bench.participants import (
    PEERS,
    Call,
    Inputs,
    error_over_bound,
    make_inputs,
    makers,
    requested_peers,
)
from headway.errors import HeadwayError, InvalidInputError

#: Calls in one graph of a decode case, and calls timed together eagerly.
CALLS_PER_GRAPH = 8
EAGER_CALLS = 40

#: Milliseconds that one turn of a prefill case measures.
TURN_MS = 40


@dataclass
class Participant:
    """Something that runs a case, and what was measured of it."""

    name: str
    call: Call | None = None
    graph: torch.cuda.CUDAGraph | None = None
    times_ms: list[float] = field(default_factory=list)
    eager_ms: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    error_over_bound: float | None = None
    error: str = ""

    def attempt(self, step: Any, *args: Any) -> None:
        """Run a step of the measurement; one that fails keeps its error and drops out."""
        if self.error:
            return
        try:
            step(self, *args)
        except HeadwayError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"[:300]


# --- timing -------------------------------------------------------------------------------------------


def graph_of(call: Call, sets: int) -> torch.cuda.CUDAGraph:
    """CALLS_PER_GRAPH calls over rotating sets, captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS_PER_GRAPH):
            call(i % sets)
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 7) -> float:
    """Milliseconds per call, the median of replays."""
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS_PER_GRAPH)
    return statistics.median(times)


def eager_ms(call: Call, sets: int) -> float:
    """Milliseconds per call of a row of calls, host or device, whichever is slower."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(EAGER_CALLS):
        call(i % sets)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / EAGER_CALLS * 1e3


def _prepare(one: Participant, make: Any, inputs: Inputs) -> None:
    """Make its call, run it once, look whether the result is right, and warm up."""
    one.call = make()
    begin = time.perf_counter()
    out = one.call(0)
    torch.cuda.synchronize()
    one.first_call_s = time.perf_counter() - begin
    out = out[0] if isinstance(out, tuple | list) else out
    packed = one.name in PEERS and PEERS[one.name].packed
    one.error_over_bound = error_over_bound(inputs, out, packed)
    if inputs.case.kind == "decode":
        one.graph = graph_of(one.call, len(inputs.sets))
        replay_ms(one.graph, 3)


def _turn(one: Participant, inputs: Inputs) -> None:
    from triton.testing import do_bench

    call = one.call
    assert call is not None
    if one.graph is None:
        one.times_ms.append(do_bench(lambda: call(0), 10, TURN_MS, return_mode="median"))
        return
    one.times_ms.append(replay_ms(one.graph))
    one.eager_ms.append(eager_ms(call, len(inputs.sets)))


def measure_case(
    case: Case,
    names: Sequence[str],
    peers: Sequence[str],
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """All participants on one case, in turns; one row each."""
    inputs = make_inputs(case, device)
    making = makers(inputs, names, peers)
    participants = [Participant(name) for name in making]
    for one in participants:
        one.attempt(_prepare, making[one.name], inputs)
    for _ in range(rounds):
        for one in participants:
            one.attempt(_turn, inputs)
    rows = [row_of(case, one) for one in participants]
    add_ratios(rows, peers)
    return rows


# --- rows ---------------------------------------------------------------------------------------------


def row_of(case: Case, one: Participant) -> dict[str, Any]:
    """A reading's row: medians over rounds, and the rates they mean."""
    row: dict[str, Any] = {"case": case.name, "runner": one.name, "shape": case.described()}
    if one.error or not one.times_ms:
        return row | {"error": one.error}
    ms = statistics.median(one.times_ms)
    row |= {"ms": ms, "rounds_ms": one.times_ms, "tflops": case.flops / ms * 1e-9}
    row |= {"first_call_s": one.first_call_s, "error_over_bound": one.error_over_bound}
    if case.kind == "decode":
        row |= {"tbps": case.kv_bytes / ms * 1e-9, "tokens_per_s": case.batch_size / ms * 1e3}
        row["eager_ms"] = statistics.median(one.eager_ms)
    return row


def add_ratios(rows: list[dict[str, Any]], peers: Iterable[str]) -> None:
    """To each row of a case: how many times the speed of the best peer it has, in graphs and eagerly."""
    named = set(peers)
    for key, ratio in (("ms", "of_best_peer"), ("eager_ms", "of_best_peer_eager")):
        theirs = [
            (row[key], row["runner"]) for row in rows if key in row and row["runner"] in named
        ]
        for row in rows:
            if theirs and key in row:
                best, name = min(theirs)
                row |= {ratio: best / row[key], "best_peer": name}


def summary(rows: Sequence[dict[str, Any]], runner: str) -> str:
    """The geometric mean of a runner's ratios, and the cells in which a peer is faster."""
    mine = [row for row in rows if row["runner"] == runner and "of_best_peer" in row]
    if not mine:
        return f"{runner}: no cell with a peer beside it"
    mean = statistics.geometric_mean(row["of_best_peer"] for row in mine)
    behind = sorted((row["of_best_peer"], row["case"]) for row in mine if row["of_best_peer"] < 1)
    text = f"{runner}: {mean:.3f} of the best peer (geometric mean of {len(mine)} cells)"
    slower = "; ".join(f"{name} {ratio:.3f}" for ratio, name in behind)
    return f"{text}; behind in {len(behind)}: {slower}" if behind else f"{text}; behind in none"


COLUMNS = (
    report.Column("case", "case"),
    report.Column("runner", "runner"),
    report.Column("ms", "ms", ".4f"),
    report.Column("tflops", "TFLOPS", ".0f"),
    report.Column("tbps", "TB/s", ".2f"),
    report.Column("of_best_peer", "of the best peer", ".3f"),
    report.Column("eager_ms", "eager ms", ".4f"),
    report.Column("of_best_peer_eager", "of the best peer", ".3f"),
    report.Column("error_over_bound", "error / allowed", ".2f"),
    report.Column("error", "error"),
)


def read_bandwidth(device: torch.device) -> float:
    """TB/s of the fastest plain read there is here: the sum of 4 GiB."""
    from triton.testing import do_bench

    x = torch.empty(1 << 32, dtype=torch.uint8, device=device).random_().view(torch.float32)
    ms = do_bench(lambda: x.sum(), 20, 100, return_mode="median")
    return float(x.nbytes / ms * 1e-9)


# --- the command ----------------------------------------------------------------------------------------


def command(
    provider: Annotated[
        str, typer.Option(help="Providers, with commas; NAME:unplanned plans in every call.")
    ] = "hopper",
    peers: Annotated[
        str, typer.Option(help=f"{', '.join(PEERS)} with commas, or 'all' installed ones.")
    ] = "",
    suite: Annotated[str, typer.Option(help=f"Of {', '.join(SUITES)}, with commas.")] = "prefill",
    match: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each participant.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this file, and a plot beside it.")
    ] = None,
) -> None:
    """Measure attention kernels on a GPU: TFLOPS of prefill, TB/s of decode."""
    if not torch.cuda.is_available():
        raise InvalidInputError("device", "no GPU", "a machine with one")
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = requested_peers(peers)
    if unknown := [name for name in suite.split(",") if name not in SUITES]:
        raise InvalidInputError("suite", unknown, f"of {', '.join(SUITES)}")
    settings: dict[str, Any] = {"providers": provider, "peers": wanted, "rounds": rounds}
    settings["read_bandwidth_tbps"] = read_bandwidth(device)
    print(f"read bandwidth {settings['read_bandwidth_tbps']:.3f} TB/s", flush=True)
    results: list[dict[str, Any]] = []
    for case in (case for name in suite.split(",") for case in SUITES[name] if match in case.name):
        rows = measure_case(case, provider.split(","), wanted, device, rounds)
        torch.cuda.empty_cache()
        for row in rows:
            print("  ".join(column.text(row) for column in COLUMNS), flush=True)
        results += rows
        if output is not None:  # cell by cell: a run that is cut short leaves what it has
            report.Reading("attention", settings, results).save(output)
    for name in provider.split(","):
        print(summary(results, name), flush=True)
    if output is not None:
        _plot(results, output.with_suffix(".png"))


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel of bars per kind of work."""
    rates = {"prefill": ("tflops", "TFLOPS"), "decode": ("tbps", "TB/s of keys and values")}
    panels = []
    for kind, (rate, title) in rates.items():
        of_kind = [row for row in rows if row["shape"]["kind"] == kind and rate in row]
        if of_kind:
            panels.append(report.Panel(of_kind, rate, title))
    if panels:
        report.bars(panels, label="case", by="runner", path=path)
