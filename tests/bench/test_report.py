"""Readings: what they record, what they hide, and how their rows are shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from headway.bench import report
from headway.bench.report import Column, Reading
from headway.errors import InvalidInputError

ROWS = [
    {"kernel": "one", "batch": 1, "ms": 1.25},
    {"kernel": "one", "batch": 4, "ms": 2.5},
    {"kernel": "two", "batch": 1, "ms": None},
]
COLUMNS = (Column("kernel", "kernel"), Column("batch", "batch", "d"), Column("ms", "ms", ".1f"))


def test_a_reading_says_where_and_with_what(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reading.json"
    Reading("attention", {"dtype": "bf16"}, ROWS).save(path)
    saved = json.loads(path.read_text())
    assert set(saved) == {
        "benchmark", "date", "command", "commit", "device", "versions", "settings", "results",
    }  # fmt: skip
    assert saved["device"]["cpu"]
    assert saved["device"]["cores"] >= 1
    assert saved["versions"]["python"] == sys.version.split()[0]
    assert "torch" in saved["versions"]
    assert saved["results"] == ROWS
    assert Reading.load(path).results == ROWS


def test_other_files_are_no_readings(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(InvalidInputError, match="reading"):
        Reading.load(path)


def test_the_command_hides_keys_and_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/some/where/bin/headway", "bench", "serve", "--api-key", "secret", "--api-key=secret"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", "/home/someone/out.json"])
    assert report.command() == ("headway bench serve --api-key *** --api-key=*** --output out.json")


def test_the_command_hides_them_in_flags_of_flags_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = "--model=/some/where/model --api-key secret"
    words = ["headway", "bench", "serve", "--serve-flags", inner, "--match", "d128 16k"]
    monkeypatch.setattr(sys, "argv", [*words, "--serve-flags=--api-key secret"])
    assert report.command() == (
        "headway bench serve --serve-flags '--model=model --api-key ***' --match 'd128 16k'"
        " '--serve-flags=--api-key ***'"
    )


def test_tables() -> None:
    assert report.markdown(ROWS, COLUMNS).splitlines() == [
        "| kernel | batch | ms |",
        "| --- | ---: | ---: |",
        "| one | 1 | 1.2 |",
        "| one | 4 | 2.5 |",
        "| two | 1 | - |",
    ]
    assert report.table(ROWS, COLUMNS).row_count == 3


def test_tables_lose_nothing_where_it_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [report.Column("a", "engine"), *(report.Column("ms", "ms") for _ in range(12))]
    rows = [{"a": "kv_cache_dtype=fp8_e4m3", "ms": 20541}]
    monkeypatch.delenv("COLUMNS", raising=False)
    report.console().print(report.table(rows, columns))  # into a file or a pipe
    assert capsys.readouterr().out.count(" 20541 ") == 12
    monkeypatch.setenv("COLUMNS", "60")
    report.console().print(report.table(rows, columns))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out
    digits = [c for c in out if c.isdigit()]
    assert len(digits) == 12 * 5 + len("843")


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    report.plot(ROWS, x="batch", y="ms", by="kernel", path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
