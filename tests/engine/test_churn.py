"""Many short requests, some cancelled at any moment, some failing: nothing is lost and nothing leaks.

HEADWAY_CHURN_REQUESTS sets how many (10,000 take minutes on a CPU).
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from headway.engine.llm import LLM
from headway.engine.request import FinishReason, RequestOutput, SamplingParams
from tests.engine.conftest import TinyModel, engine

REQUESTS = int(os.environ.get("HEADWAY_CHURN_REQUESTS", "150"))


def params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw.randint(1, 6),
        temperature=draw.choice((0.0, 0.0, 1.0)),
        top_k=draw.choice((0, 5)),
        seed=draw.randrange(99),
        prompt_logprobs=draw.choice((None, None, None, 1)),
    )


def churn(llm: LLM, count: int, seed: int) -> dict[str, FinishReason]:
    """How each request ended. Every step may bring arrivals and cancellations."""
    draw = random.Random(seed)
    ended: dict[str, FinishReason] = {}
    said: dict[str, int] = {}
    added = 0
    shared = [draw.randrange(256) for _ in range(24)]

    def take(output: RequestOutput) -> None:
        assert output.request_id not in ended, "a request that has ended says something"
        said[output.request_id] = said.get(output.request_id, 0) + len(output.new_token_ids)
        if output.finish_reason is not FinishReason.ERROR:  # there the text failed, not the token
            assert said[output.request_id] == output.output_tokens, "a token was lost"
        if output.finish_reason is not None:
            ended[output.request_id] = output.finish_reason

    while added < count or llm.has_unfinished():
        for _ in range(min(draw.randint(0, 6), count - added)):
            prompt = shared[: draw.choice((0, 8, 24))] + [draw.randrange(256)] * draw.randint(1, 20)
            llm.add_request(str(added), prompt, params(draw))
            if draw.random() < 0.02:  # fails in the middle, and alone
                detokenizer: Any = llm._requests[str(added)].detokenizer
                detokenizer._decode = lambda ids: 1 / 0
            added += 1
        for name in list(llm._requests):
            if draw.random() < 0.08 and (output := llm.abort(name)) is not None:
                take(output)
        for output in llm.step():
            take(output)
    for output in llm.step():  # what was under way when the last request ended
        raise AssertionError(f"{output.request_id} came back")
    return ended


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": False},
        {"overlap": True},
        {"speculative": "ngram"},
        {"overlap": True, "disable_prefix_cache": True, "page_size": 3},
    ],
    ids=["plain", "overlap", "speculative", "no prefix cache"],
)
def test_nothing_is_lost_or_leaks(llama: TinyModel, settings: dict[str, Any]) -> None:
    llm = engine(llama, kv_cache_tokens=330, max_model_len=64, max_running_requests=8, **settings)
    ended = churn(llm, REQUESTS, seed=1)
    assert sorted(map(int, ended)) == list(range(REQUESTS))
    assert set(ended.values()) >= {FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR}
    stats, cache = llm.stats(), llm._prefix_cache
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert not llm._requests
    assert llm._in_flight is None or not llm._in_flight.drawings
    assert cache.num_available == cache.pool.num_pages
    assert all(cache.pool.references(page) == 0 for page in range(cache.pool.num_pages))
    cache.clear()
    assert sorted(cache.pool.free_pages()) == list(range(cache.pool.num_pages))
    # and the engine still says what it should
    (one,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0))
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 8)
