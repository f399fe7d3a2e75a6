"""Many short requests, some cancelled at any moment, some failing: nothing is lost and nothing leaks.

HEADWAY_CHURN_REQUESTS sets how many (10,000 take minutes on a CPU).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from headway.bench.churn import Ledger, check, survives
from headway.engine.request import FinishReason, RequestOutput, SamplingParams
from headway.errors import HeadwayError
from tests.engine.conftest import TinyModel, engine

REQUESTS = int(os.environ.get("HEADWAY_CHURN_REQUESTS", "150"))

POOL: dict[str, Any] = {"kv_cache_tokens": 330, "max_model_len": 64, "max_running_requests": 8}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": False},
        {"overlap": True},
        {"speculative": "ngram"},
        {"speculative": "ngram", "overlap": True, "kv_cache_dtype": "fp8_e4m3"},
        {"overlap": True, "disable_prefix_cache": True, "page_size": 3},
    ],
    ids=["plain", "overlap", "speculative", "speculative overlap float8", "no prefix cache"],
)
def test_nothing_is_lost_or_leaks(llama: TinyModel, settings: dict[str, Any]) -> None:
    llm = engine(llama, **POOL, **settings)
    ended = survives(llm, REQUESTS)
    assert set(ended) >= {"length", "abort", "error"}
    if "kv_cache_dtype" in settings:  # has answers of its own, which survives() compares
        return
    (one,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0))
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 8)


def test_what_is_missing_is_found(llama: TinyModel) -> None:
    llm = engine(llama, **POOL)
    ledger = Ledger()
    with pytest.raises(HeadwayError, match="1 of 1 requests never ended"):
        check(llm, ledger, 1)
    llm._prefix_cache.allocate(1)
    with pytest.raises(HeadwayError, match="pages in use"):
        check(llm, ledger, 0)


def test_lost_tokens_and_ghosts_are_found() -> None:
    ledger = Ledger()
    ledger.take(RequestOutput("a", "", (5,), output_tokens=1))
    with pytest.raises(HeadwayError, match="a token was lost"):
        ledger.take(RequestOutput("a", "", (6,), output_tokens=3))
    ledger.take(RequestOutput("b", "", (), finish_reason=FinishReason.ABORT))
    with pytest.raises(HeadwayError, match="has ended"):
        ledger.take(RequestOutput("b", "", ()))
