"""What a setting changes: differences by token, and where greedy answers part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from headway.bench import answers
from headway.engine.request import Completion, FinishReason, TokenLogprob
from tests.engine.conftest import TinyModel, llama, tiny  # noqa: F401 - fixtures


def answer(tokens: list[int]) -> Completion:
    each = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (t + 1, -0.75))) for t in tokens)
    return Completion("0", (1,), "", tuple(tokens), FinishReason.LENGTH, logprobs=each)


def test_rows() -> None:
    first = answers.Told("a", ((-1.0, -2.0), (-3.0,)), (answer([1, 2, 3]), answer([4, 5, 6])))
    other = answers.Told("b", ((-1.5, -2.5), (-2.9,)), (answer([1, 2, 3]), answer([4, 6, 6])))
    row = answers.text_row(first, other)
    assert row["tokens"] == 3
    assert row["change"] == pytest.approx((-0.5 + 0.1) / 2)
    assert row["stderr"] == pytest.approx(0.3)
    assert row["mean_absolute_change"] == pytest.approx(1.1 / 3)
    row = answers.answer_row(first, other)
    assert (row["equal_answers"], row["answers"]) == (1, 2)
    assert row["tokens_before_first_difference"] == 2
    assert row["median_gap"] == pytest.approx(0.25)


@pytest.mark.timeout(120)
def test_the_command(llama: TinyModel, tmp_path: Path) -> None:  # noqa: F811
    app = typer.Typer()
    app.command()(answers.command)
    words = [
        *(str(llama.path), "--device", "cpu", "--dtype", "float32", "--kv-cache-tokens", "1024"),
        *("--settings", "kv_cache_dtype=auto,fp8_e4m3", "--texts", "3", "--text-len", "20"),
        *("--prompts", "2", "--prompt-len", "9", "--output-len", "4"),
        *("--chunked-prefill-size", "8", "--output", str(tmp_path / "r.json")),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (row["texts"], row["tokens"], row["answers"]) == (3, 57, 2)
    assert 0 < row["mean_absolute_change"] < 0.5
    assert row["stderr"] > 0
