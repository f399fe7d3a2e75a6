"""The engine on a GPU: greedy answers beside transformers' own, and requests that come and go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from headway.bench.agreement import MODELS, SETTINGS, run
from headway.bench.churn import survives
from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from headway.engine.warm_up import warmed_up
from headway.server.engine_process import EngineProcess
from tests.engine.conftest import save_tiny

REQUESTS = int(os.environ.get("HEADWAY_CHURN_REQUESTS", "400"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_transformers_own_up_to_near_ties(name: str) -> None:
    rows = run(
        [name],
        list(SETTINGS),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        max_tokens=16,
    )
    for row in rows:
        assert "error" not in row, row
        assert row["different"] == 0, row
        assert row["pages_held"] == 0
    assert rows[0]["graphs"]
    assert rows[0]["cached_tokens"] > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "settings", [{}, {"speculative": "ngram"}, {"cuda_graphs": False}], ids=str
)
def test_nothing_is_lost_or_leaks(settings: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    config = EngineConfig(
        model=str(model.path),
        dtype="bfloat16",
        device="cuda",
        kv_cache_tokens=330,
        max_model_len=64,
        max_running_requests=8,
        **settings,
    )
    assert set(survives(LLM(config), REQUESTS)) >= {"length", "abort", "error"}


@pytest.mark.timeout(300)
def test_an_engine_answers_alike_in_a_process_of_its_own(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(save_tiny("llama", tmp_path).path),
        dtype="bfloat16",
        device="cuda",
        kv_cache_tokens=2048,
        max_model_len=128,
        max_running_requests=16,
    )
    text = b"the same tokens, whichever process they come from"
    prompts = [list(text[: 5 * i]) for i in (1, 3, 9)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with EngineProcess(warmed_up, config) as engine:
        # One by one: what runs beside a request decides near-ties.
        apart = [_tokens(engine, [prompt], params) for prompt in prompts]
        together = _tokens(engine, prompts * 4, params)
        assert not engine.has_unfinished()
        assert engine.stats().output_tokens == 15 * 24
    assert [len(tokens) for tokens in together] == [24] * 12
    llm = warmed_up(config)
    here = [llm.generate([prompt], params) for prompt in prompts]
    assert apart == [[list(one.token_ids)] for (one,) in here]


def _tokens(
    engine: EngineProcess, prompts: list[list[int]], params: SamplingParams
) -> list[list[int]]:
    """What the engine answers to prompts that it gets together."""
    told: dict[str, list[int]] = {f"{i} of {len(prompts)}": [] for i in range(len(prompts))}
    for name, prompt in zip(told, prompts, strict=True):
        engine.add_request(name, prompt, params)
    unfinished = len(prompts)
    while unfinished:
        for output in engine.step():
            assert output.error is None
            told[output.request_id] += output.new_token_ids
            unfinished -= output.finish_reason is not None
    return list(told.values())
