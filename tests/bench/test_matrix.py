"""Servers in turn: real processes, each with its own settings, one table and one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

pytest.importorskip("fastapi")

from typer.testing import CliRunner

from headway import cli
from headway.bench import matrix
from headway.errors import InvalidInputError
from tests.engine.conftest import SMALL


def test_all_combinations() -> None:
    found = matrix.variants(["backend=auto,fa3", "page_size=1,64"])
    assert [one.label for one in found] == [
        "backend=auto, page_size=1",
        "backend=auto, page_size=64",
        "backend=fa3, page_size=1",
        "backend=fa3, page_size=64",
    ]
    assert found[3].flags == ("--attention-backend", "fa3", "--page-size", "64")


@pytest.mark.parametrize("text", ["backend", "=auto", "backend=", "backend=,"])
def test_what_is_no_dimension(text: str) -> None:
    with pytest.raises(InvalidInputError, match="backend=auto,fa3"):
        matrix.variants([text])


@pytest.mark.timeout(300)
def test_servers_are_measured_in_turn_and_failures_do_not_end_the_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tmp_path / "tiny"
    transformers.LlamaConfig(**SMALL).save_pretrained(model)
    words = [
        *("bench", "serve", "--matrix", "backend=cpu,fa4", "--serve-model", str(model)),
        *("--serve-flags", "--load-format dummy --device cpu --kv-cache-tokens 1024"),
        *("--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "4"),
        *("--output", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")),
    ]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["server"] for row in rows] == ["backend=cpu", "backend=fa4"]
    assert [row.get("output_tokens") for row in rows] == [12, None]
    assert "backend=fa4 cannot run this call" in rows[1]["error"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_matrix_needs_a_model() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "serve", "--matrix", "backend=auto"])
    assert isinstance(result.exception, InvalidInputError)
    assert "serve_model" in str(result.exception)
