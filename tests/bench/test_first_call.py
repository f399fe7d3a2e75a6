"""First calls: each in a process that finds the cache it is meant to find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headway import cli
from headway.bench import first_call
from headway.errors import InvalidInputError

CPU = torch.device("cpu")


def test_an_empty_cache_then_the_same_one_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, list[str]]] = []

    def run(name: str, provider: str, device: torch.device) -> dict[str, float]:
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        seen.append((cache, [file.name for file in cache.iterdir()]))
        (cache / "kernel").touch()
        return {"first_call_s": 3.0 / len(seen), "again_ms": 0.5}

    monkeypatch.setattr(first_call, "in_a_new_process", run)
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    row = first_call.measure("prefill", "hopper", CPU)
    assert (row["first_call_s"], row["cached_s"], row["again_ms"]) == (3.0, 1.5, 0.5)
    (first, empty), (second, filled) = seen
    assert (empty, filled) == ([], ["kernel"])
    assert first == second
    assert not first.exists()
    assert os.environ["TRITON_CACHE_DIR"] == "before"


def test_a_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> dict[str, float]:
        raise InvalidInputError("provider", "nobody", "somebody")

    monkeypatch.setattr(first_call, "in_a_new_process", run)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    row = first_call.measure("decode", "nobody", CPU)
    assert "nobody" in row["error"]
    assert "TRITON_CACHE_DIR" not in os.environ


def test_it_is_a_subcommand_that_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["bench", "first-call"])
    assert result.exit_code != 0
