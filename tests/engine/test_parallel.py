"""Two processes with half of every layer each say what one model says, and agree with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from headway.engine import early, loader, parallel
from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from headway.errors import InvalidInputError
from tests.engine.conftest import TinyModel, engine
from tests.engine.parallel_run import GREEDY, PROMPTS

ROOT = Path(__file__).parents[2]


def save_tied(folder: Path) -> Path:
    """A configuration of a model whose embedding is its output's weight, too."""
    config = json.loads((folder / "llama" / "config.json").read_text())
    (folder / "tied").mkdir()
    (folder / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder / "tied"


@pytest.fixture(scope="module")
def ranks(
    tiny: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What both processes found."""
    folder = tiny("llama").path.parent
    assert tiny("deepseek_v3").path.parent == folder
    save_tied(folder)
    output = tmp_path_factory.mktemp("parallel") / "found"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        "2",
        "-m",
        "tests.engine.parallel_run",
        str(folder),
        str(output),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "heads"), [("llama", 2), ("deepseek_v3", 4)]
)  # transformers shares out the feed-forward blocks alone where keys are latent
def test_equals_transformers(
    name: str, heads: int, ranks: list[dict[str, Any]], tiny: Callable[[str], TinyModel]
) -> None:
    wanted = [tiny(name).greedy(prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    for found in ranks:
        assert found[name] == wanted
        assert set(found[f"{name} heads"]) == {heads}


@pytest.mark.timeout(300)
def test_leader_and_follower(ranks: list[dict[str, Any]], llama: TinyModel) -> None:
    first, second = ranks
    assert first["lead"] == [llama.greedy(prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    assert second["left"] == 0


@pytest.mark.timeout(300)
def test_what_is_drawn_is_the_same(ranks: list[dict[str, Any]], llama: TinyModel) -> None:
    first, second = ranks
    assert first["sampled"] == second["sampled"]
    assert first["dummy"] == second["dummy"]
    alone = engine(llama, load_format="dummy").generate(PROMPTS, GREEDY)
    assert first["dummy"] == [list(one.token_ids) for one in alone]
    alone = engine(llama.path.parent / "tied", load_format="dummy").generate(PROMPTS, GREEDY)
    assert first["tied"] == second["tied"] == [list(one.token_ids) for one in alone]


def test_one_process_cannot_be_two(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InvalidInputError, match="torchrun --nproc-per-node 2"):
        LLM(EngineConfig(model=str(llama.path), device="cpu", tensor_parallel_size=2))


def test_heads_are_shared_out_whole() -> None:
    nine = transformers.LlamaConfig(num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    loader.check_shares(nine, 1)
    loader.check_shares(nine, 3)
    with pytest.raises(InvalidInputError, match="1, 3: 9 query heads and 3 of keys"):
        loader.check_shares(nine, 2)
    gemma = transformers.Gemma4TextConfig(  # fewer in layers that see everything
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    loader.check_shares(gemma, 2)
    with pytest.raises(InvalidInputError, match="1, 2: 16 query heads and 2 or 8 of keys"):
        loader.check_shares(gemma, 4)
    latent = transformers.DeepseekV3Config(num_attention_heads=9, num_key_value_heads=9)
    loader.check_shares(latent, 2)  # its attention is not shared out


def test_launching_becomes_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append(words))
    monkeypatch.setattr(sys, "argv", ["headway", "serve", "m", "--tensor-parallel-size", "2"])
    monkeypatch.delenv("RANK", raising=False)
    parallel.launch(1)
    assert not became
    parallel.launch(2)
    assert became[0][1:] == [
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "headway"),
        *("serve", "m", "--tensor-parallel-size", "2"),
    ]
    monkeypatch.setenv("RANK", "1")
    parallel.launch(2)
    assert len(became) == 1


def test_processes_that_cannot_share_a_model_are_not_started(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(parallel, "launch", started.append)
    monkeypatch.delenv("RANK", raising=False)
    config = EngineConfig(model=str(llama.path), device="cpu", tensor_parallel_size=2)
    early.launch(config)
    assert started == [2]
    with pytest.raises(InvalidInputError, match="got 3; want 1, 2: 4 query heads and 2 of keys"):
        early.launch(replace(config, tensor_parallel_size=3))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InvalidInputError, match="got 2; want at most 1, the GPUs"):
        early.launch(replace(config, device="auto"))
    monkeypatch.setenv("RANK", "0")
    early.launch(replace(config, device="auto"))  # torchrun's business by then
    assert started == [2]
