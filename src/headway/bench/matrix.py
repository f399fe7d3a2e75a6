"""Several servers in turn, each with other settings: started, loaded, stopped, and shown side by side."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headway.bench import report
from headway.errors import HeadwayError, InvalidInputError

#: Short names of flags that are often compared.
SHORT = {"backend": "attention-backend", "version": "flash-attn-version"}

#: Longest time for a server to load its model and compile, and to end after SIGTERM, in seconds.
START_SECONDS, STOP_SECONDS = 1800.0, 90.0

_URL = re.compile(r"^\s*API\s+(http://\S+)/v1", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """One server's settings: its name in the table, and its flags."""

    label: str
    flags: tuple[str, ...]


def variants(dimensions: Sequence[str]) -> list[Variant]:
    """All combinations of what the dimensions list, each like ``backend=auto,fa3``.

    Raises:
        InvalidInputError: a dimension is no NAME=VALUE,VALUE..
    """
    each: list[list[tuple[str, tuple[str, ...]]]] = []
    for text in dimensions:
        name, equals, values = text.partition("=")
        listed = [value for value in values.split(",") if value]
        if not (name and equals and listed):
            raise InvalidInputError(
                "matrix", repr(text), "NAME=VALUE,VALUE.. like backend=auto,fa3"
            )
        flag = "--" + SHORT.get(name, name).replace("_", "-")
        each.append([(f"{name}={value}", (flag, value)) for value in listed])
    return [
        Variant(", ".join(label for label, _ in one), tuple(f for _, flags in one for f in flags))
        for one in itertools.product(*each)
    ]


@contextlib.contextmanager
def serving(model: str, flags: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own; yields its URL, and stops it.

    Raises:
        HeadwayError: it did not come up, with the last it said.
    """
    command = [sys.executable, "-m", "headway", "serve", model, "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=said, stderr=said, text=True, env=environment)
        try:
            yield _await_url(process, said)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_url(process: subprocess.Popen[str], said: IO[str]) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        ended = process.poll() is not None
        said.seek(0)
        text = said.read()
        if found := _URL.search(text):
            return found[1]
        if ended:
            raise HeadwayError(f"the server ended before it was ready: {_reason(text)}")
        time.sleep(0.1)
    raise HeadwayError(f"the server was not ready after {START_SECONDS:g} seconds")


def _reason(text: str) -> str:
    """The error in what a server said, with the lines that belong to it, or else its last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(r"headway: |[\w.]+Error: ", line)]
    if not errors:
        return lines[-1].strip() if lines else "it said nothing"
    first, *rest = lines[errors[-1] :]
    more = itertools.takewhile(lambda line: line.startswith("  "), rest)
    return "; ".join([first.removeprefix("headway: "), *(line.strip() for line in more)])


def run(
    model: str,
    flags: str,
    dimensions: Sequence[str],
    load: Callable[[str], dict[str, Any]],
    told: Callable[[str], None],
    so_far: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """One row per combination: what ``load`` returns for its URL, or the error that kept it from that.

    ``so_far`` is given the rows after each.
    """
    rows = []
    for variant in variants(dimensions):
        told(variant.label)
        row: dict[str, Any] = {"server": variant.label}
        start = time.monotonic()
        try:
            with serving(model, [*shlex.split(flags), *variant.flags]) as url:
                row["ready_s"] = time.monotonic() - start
                row |= load(url)
        except HeadwayError as error:
            row["error"] = str(error)
            told(f"{variant.label}: {error}")
        row["seconds"] = time.monotonic() - start
        rows.append(row)
        so_far(rows)
    return rows


COLUMNS = (
    report.Column("server", "server"),
    report.Column("successful_requests", "requests", "d"),
    report.Column("output_throughput", "output tok/s", ".1f"),
    report.Column("total_throughput", "total tok/s", ".1f"),
    report.Column("median_ttft_ms", "TTFT (ms)", ".1f"),
    report.Column("median_tpot_ms", "TPOT (ms)", ".2f"),
    report.Column("p99_itl_ms", "ITL p99 (ms)", ".2f"),
    report.Column("median_e2el_ms", "latency (ms)", ".1f"),
    report.Column("ready_s", "ready after (s)", ".1f"),
)

_PANELS = (
    ("output_throughput", "output tokens per second"),
    ("median_ttft_ms", "median time to first token (ms)"),
    ("median_tpot_ms", "median time per output token (ms)"),
)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of throughput and latencies, one bar per server."""
    panels = [
        report.Panel(shown, key, title)
        for key, title in _PANELS
        if (shown := [row for row in rows if row.get(key) is not None])
    ]
    if panels:
        report.bars([_named(panel) for panel in panels], label="load", by="server", path=path)


def _named(panel: report.Panel) -> report.Panel:
    rows = [{**row, "load": ""} for row in panel.rows]
    return report.Panel(rows, panel.value, panel.title)
