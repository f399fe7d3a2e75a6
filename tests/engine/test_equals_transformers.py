"""Greedy output of the engine is transformers' own, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from tests.engine.conftest import CONFIGS, VOCABULARY, TinyModel, engine

MAX_TOKENS = 24
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Ragged prompts, some sharing a beginning of several pages, one a repetition of another."""
    rng = random.Random(7)
    shared = [rng.randrange(VOCABULARY) for _ in range(40)]
    lengths = (1, 2, 15, 16, 17, 33, 70)
    own = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
    return [*own, [*shared, 1], [*shared, 2, 3], shared[:32], shared, shared]


@pytest.fixture(scope="module")
def expected(
    tiny: Callable[[str], TinyModel], prompts: list[list[int]]
) -> Callable[[str], list[list[int]]]:
    """transformers' continuations of the prompts, by model family."""
    known: dict[str, list[list[int]]] = {}

    def get(name: str) -> list[list[int]]:
        if name not in known:
            known[name] = [tiny(name).greedy(prompt, MAX_TOKENS) for prompt in prompts]
        return known[name]

    return get


def tokens(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY
) -> list[list[int]]:
    return [list(one.token_ids) for one in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    ("chunk", "prefix_cache", "backend"),
    [
        (16, True, "auto"),
        (16, False, "auto"),
        (512, True, "auto"),
        (512, False, "auto"),
        (16, True, "reference"),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_batch(
    name: str,
    chunk: int,
    prefix_cache: bool,
    backend: str,
    tiny: Callable[[str], TinyModel],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
) -> None:
    llm = engine(
        tiny(name),
        chunked_prefill_size=chunk,
        disable_prefix_cache=not prefix_cache,
        attention_backend=backend,
    )
    assert tokens(llm, prompts) == expected(name)
    stats = llm.stats()
    assert stats.pages_used == 0
    assert (stats.prefix_cache_hit_tokens > 0) == prefix_cache


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("name", CONFIGS)
def test_preemption(
    name: str,
    page_size: int,
    prefix_cache: bool,
    tiny: Callable[[str], TinyModel],
    prompts: list[list[int]],
    expected: Callable[[str], list[list[int]]],
) -> None:
    """The pool holds one and a half of the longest sequences; all twelve still get their answers."""
    llm = engine(
        tiny(name),
        page_size=page_size,
        kv_cache_tokens=150,
        max_model_len=96,
        disable_prefix_cache=not prefix_cache,
    )
    assert tokens(llm, prompts) == expected(name)
    assert llm.stats().preemptions > 0
    assert llm.stats().pages_used == 0


def test_second_turn_reuses_generated_tokens(llama: TinyModel) -> None:
    """The answer's pages serve the next turn of the conversation, and change nothing in it."""
    llm = engine(llama)
    prompt = list(range(40))
    (first,) = llm.generate([prompt], GREEDY)
    turn = [*prompt, *first.token_ids, 5, 6, 7]
    (second,) = llm.generate([turn], GREEDY)
    assert second.cached_tokens == (len(turn) - 4) // 16 * 16 == 48
    assert list(second.token_ids) == llama.greedy(turn, MAX_TOKENS)


def test_shared_prefix_is_computed_once(llama: TinyModel) -> None:
    """Requests that arrive together wait for the one that computes their common pages."""
    llm = engine(llama, kv_cache_tokens=2048)
    shared = list(range(100))
    prompts = [[*shared, i] for i in range(8)]
    computed = 0
    for i, prompt in enumerate(prompts):
        llm.add_request(str(i), prompt, SamplingParams(max_tokens=1, temperature=0))
    outputs = []
    while llm.has_unfinished():
        outputs += llm.step()
    computed = sum(one.prompt_tokens - one.cached_tokens for one in outputs)
    assert computed == 101 + 7 * (101 - 96)
