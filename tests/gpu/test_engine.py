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
