"""``headway eval``: lm-eval's numbers are the model's own, and differences are paired."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")

from typer.testing import CliRunner

from headway import cli
from headway.bench import evaluate
from headway.bench.evaluate import EvalSettings, Score
from headway.errors import InvalidInputError
from headway.server.context import ServerSettings
from tests.engine.conftest import TinyModel, byte_tokenizer, engine, save_tiny
from tests.server.live import serving

TASKS = Path(__file__).parents[1] / "data" / "tasks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("llama", tmp_path_factory.mktemp("models"))


def samples() -> list[dict[str, object]]:
    spec = importlib.util.spec_from_file_location("sums", TASKS / "sums" / "sums.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()["test"].to_list()


def likeliest(model: TinyModel, sample: dict[str, object]) -> int:
    """The choice with the largest probability, by a plain forward."""
    encode = byte_tokenizer().encode
    question = encode(str(sample["question"]))
    found = []
    for choice in sample["choices"]:  # type: ignore[attr-defined]
        answer = encode(choice)
        with torch.inference_mode():
            logits = model.model(torch.tensor([question + answer])).logits[0].float()
        logprobs = logits.log_softmax(-1)[len(question) - 1 : -1]
        found.append(sum(float(row[token]) for row, token in zip(logprobs, answer, strict=True)))
    return found.index(max(found))


def test_paired_differences() -> None:
    a = Score("a", "t", "acc", (1.0, 0.0, 1.0, 1.0))
    b = Score("b", "t", "acc", (1.0, 1.0, 1.0, 0.0))
    found = evaluate.difference(a, b)
    assert (found["value"], found["changed"]) == (0.0, 2)
    assert found["stderr"] == pytest.approx((2 / 3) ** 0.5 / 2)
    assert a.stderr == pytest.approx(0.25)
    assert Score("a", "t", "acc", (1.0,)).stderr is None


def test_accuracy_through_the_server_is_the_models_own(model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    wanted = [float(likeliest(model, one) == one["answer"]) for one in samples()[:12]]
    with serving(engine(model)) as live:
        words = [
            *("eval", "sums", "--tasks-folder", str(TASKS), "--url", live.url, "--limit", "12"),
            *("--tokenizer", str(model.path), "--output", str(tmp_path / "r.json")),
        ]
        result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (row["task"], row["metric"], row["samples"]) == ("sums", "acc", 12)
    assert row["value"] == pytest.approx(sum(wanted) / 12)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="tasks_folder"):
        EvalSettings("sums", tasks_folder=tmp_path / "nothing")
    with pytest.raises(InvalidInputError, match="limit"):
        EvalSettings("sums", limit=0)
    result = CliRunner().invoke(cli.app, ["eval", "sums", "--url", "http://127.0.0.1:9"])
    assert "no server answers" in str(result.exception)


def test_a_server_that_refuses_is_not_called_absent(model: TinyModel) -> None:
    command = ["eval", "sums", "--tasks-folder", str(TASKS)]
    with serving(engine(model), ServerSettings(api_key="right")) as live:
        result = CliRunner().invoke(cli.app, [*command, "--url", live.url])
    assert f"{live.url}/v1/models: 401" in str(result.exception)


@pytest.mark.parametrize("given", [None, "/no/such/folder", "/no/such/model.gguf"])
def test_a_tokenizer_that_is_not_there_is_named(model: TinyModel, given: str | None) -> None:
    """The served name is one only where the server says a hub name or a folder."""
    with serving(engine(model), ServerSettings(served_model_names=("smol",))) as live:
        words = ["eval", "sums", "--url", live.url]
        result = CliRunner().invoke(cli.app, words + (["--tokenizer", given] if given else []))
    assert isinstance(result.exception, InvalidInputError)
    assert f"tokenizer: got {given or 'smol'} (" in str(result.exception)
    assert "a folder, a .gguf file, or a reachable hub name" in str(result.exception)
