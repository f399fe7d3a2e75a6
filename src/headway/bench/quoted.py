"""Tables that documents quote, made from the readings under benchmarks/results.

    python -m headway.bench.quoted README.md docs/performance.md

A document marks their places with ``<!-- reading: NAME -->`` and ``<!-- end -->``. A test fails where a
document says something else than its readings.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headway.bench import report
from headway.bench.attention import summary
from headway.bench.report import Column, Reading, markdown
from headway.errors import InvalidInputError

RESULTS = Path("benchmarks/results")

_PLACE = re.compile(r"(<!-- reading: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pivot(
    rows: Sequence[report.Row], label: str, by: str, value: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per value of ``label`` with a column per value of ``by``; and those columns."""
    names = list(dict.fromkeys(str(row[by]) for row in rows))
    made: dict[str, dict[str, Any]] = {}
    for row in rows:
        made.setdefault(str(row[label]), {label: row[label]})[str(row[by])] = row.get(value)
    return list(made.values()), names


def _generate(reading: Reading) -> str:
    rows, sizes = pivot(reading.results, "engine", "batch_size", "output_throughput")
    titles = [f"{size} sequence{'s' * (size != '1')} (tokens/s)" for size in sizes]
    columns = [Column(size, title, ".1f") for size, title in zip(sizes, titles, strict=True)]
    return markdown(rows, [Column("engine", "engine"), *columns])


def _cpu(reading: Reading) -> str:
    from headway.bench.cpu import COLUMNS

    return markdown(reading.results, COLUMNS[:-1])


def _attention(reading: Reading, rate: str, form: str, only: Sequence[str] = ()) -> str:
    """Cases with the rates of all that ran them, and the first runner's share of the best peer's.

    ``only``: their names; default: every case.
    """
    measured = [row for row in reading.results if not only or row["case"] in only]
    rows, names = pivot([row for row in measured if rate in row], "case", "runner", rate)
    first = {
        row["case"]: row.get("of_best_peer") for row in reading.results if row["runner"] == names[0]
    }
    for row in rows:
        row["share"] = first.get(row["case"])
    columns = [Column("case", "case"), *(Column(name, name, form) for name in names)]
    if not any(first.values()):
        return markdown(rows, columns)
    table = markdown(rows, [*columns, Column("share", f"{names[0]}, of the best peer", ".2f")])
    return table if only else f"{table}\n\n{summary(reading.results, names[0])}."


def _by_page_size(reading: Reading) -> str:
    """TB/s of each case by the size of its pages."""
    for row in reading.results:
        row["case"], _, row["page"] = row["case"].rpartition(" page ")
    rows, sizes = pivot(reading.results, "case", "page", "tbps")
    sizes = sorted(sizes, key=int)
    columns = [Column(size, f"pages of {size}", ".2f") for size in sizes]
    return markdown(rows, [Column("case", "case"), *columns])


def _served(reading: Reading) -> str:
    """Tokens per second of an engine, by shape: whatever the shape is about. Refusals stand below."""
    measured = [row for row in reading.results if "error" not in row]
    for row in measured:
        row["shape"] = (
            f"{row['batch_size']} requests, {row['input_len']} in, {row['output_len']} out"
        )
    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    measured.sort(key=lambda row: shapes.index(row["shape"]))
    columns = (
        Column("shape", "all at once"),
        Column("engine", "engine and attention"),
        Column("output_throughput", "output tokens/s", ",.0f"),
        Column("total_throughput", "tokens/s in and out", ",.0f"),
    )
    return _with_refusals(markdown(measured, columns), reading, "engine")


def _servers(reading: Reading) -> str:
    """A server in each row, as its clients saw it."""
    columns = (
        Column("server", "server"),
        Column("output_throughput", "output tokens/s", ",.0f"),
        Column("total_throughput", "tokens/s in and out", ",.0f"),
        Column("median_ttft_ms", "first token (ms)", ",.0f"),
        Column("median_tpot_ms", "a token (ms)", ".2f"),
        Column("p99_itl_ms", "between tokens, 99 % (ms)", ".1f"),
        Column("median_e2el_ms", "whole answer (ms)", ",.0f"),
        Column("ready_s", "ready after (s)", ".0f"),
    )
    measured = [row for row in reading.results if "error" not in row]
    return _with_refusals(markdown(measured, columns), reading, "server")


def _with_refusals(table: str, reading: Reading, name: str) -> str:
    """The table, and what those said that are not in it."""
    refused = [f"{row[name]}: {_refusal(row)}" for row in reading.results if "error" in row]
    return "\n\n".join((table, *refused))


def _refusal(row: report.Row) -> str:
    """The provider's own words, where an error quotes them."""
    lines = [line.strip() for line in str(row["error"]).splitlines()]
    return lines[1].partition(": ")[2] if len(lines) > 1 else lines[0]


def _overhead(reading: Reading) -> str:
    columns = (
        Column("case", "case"),
        Column("runner", "runner"),
        Column("host_us", "host (µs)", ".0f"),
        Column("device_us", "device (µs)", ".1f"),
    )
    return markdown(reading.results, columns)


def _first_call(reading: Reading) -> str:
    columns = (
        Column("call", "first call of a process"),
        Column("case", "case"),
        Column("first_call_s", "nothing compiled before (s)", ".1f"),
        Column("cached_s", "kernels in the cache (s)", ".1f"),
        Column("again_ms", "the call after it (ms)", ".1f"),
    )
    return markdown(reading.results, columns)


def _latent(reading: Reading) -> str:
    columns = (
        Column("case", "causal prefill, 192/128"),
        Column("runner", "runner"),
        Column("tflops", "TFLOPS", ".0f"),
        Column("relative_error", "relative error", ".3f"),
    )
    return markdown(reading.results, columns)


#: What a README has room for: long and short prompts, the best and the worst cells.
PREFILL_SHORT = (
    *(
        "d64 16k causal",
        "d128 16k full",
        "d128 16k causal",
        "d256 16k causal",
        "d192/128 16k causal",
    ),
    *("d128 1k causal", "d192/128 1k causal", "d128 gqa 8x2048 16/8 causal"),
    "d128 ragged 42 sequences, at most 16k, 32/8 causal",
    "d128 512 tokens over 32k cached, 32/8, pages of 16",
)


#: Name of a table: the reading it is made from, and how.
TABLES: dict[str, tuple[str, Callable[[Reading], str]]] = {
    "generate": ("cpu/generate.json", _generate),
    "cpu": ("cpu/attention.json", _cpu),
    "prefill": ("h200/hopper-prefill.json", lambda r: _attention(r, "tflops", ".0f")),
    "prefill-short": (
        "h200/hopper-prefill.json",
        lambda r: _attention(r, "tflops", ".0f", PREFILL_SHORT),
    ),
    "decode": ("h200/hopper-decode.json", lambda r: _attention(r, "tbps", ".2f")),
    "decode-float8": ("h200/hopper-decode-float8.json", lambda r: _attention(r, "tbps", ".2f")),
    "prefill-portable": (
        "h200/portable-prefill.json",
        lambda r: _attention(r, "tflops", ".0f"),
    ),
    "pages": ("h200/hopper-pages.json", _by_page_size),
    "overhead": ("h200/hopper-overhead.json", _overhead),
    "first-call": ("h200/first-call.json", _first_call),
    "mla": ("h200/mla_prefill.json", _latent),
    "engine": ("h200/engine-throughput.json", _served),
    "servers": ("h200/engine-servers.json", _servers),
}


def filled(text: str, results: Path, here: Path = Path()) -> str:
    """A document with its tables made anew, each under the machine and the command of its reading.

    ``here``: the folder of the document, from the root of the project.

    Raises:
        InvalidInputError: a place names no table, or its reading is missing.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InvalidInputError("reading", name, ", ".join(TABLES))
        file, make = TABLES[name]
        reading = Reading.load(results / file)
        machine = ", ".join(reading.device["gpu"]) or (
            f"{reading.device['cores']} cores of {reading.device['cpu']}"
        )
        source = (
            f"{machine}: `{reading.command}` ([{file}]({os.path.relpath(RESULTS / file, here)}))"
        )
        return f"{match[1]}{make(reading)}\n\n{source}\n{match[3]}"

    return _PLACE.sub(table, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(filled(path.read_text(), RESULTS, path.parent))
