"""What a server does before its first client: every kind of step once, and nothing of it stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headway.engine import pieces, warm_up
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError, InvalidInputError
from tests.engine.conftest import TinyModel, engine


def ask_as_on_a_gpu(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lengths decide what is compiled and loaded."""
    real = llm.device
    llm.device = torch.device("cuda")
    waves, large = warm_up.waves(llm), list(warm_up.large_steps(llm))
    llm.device = real
    monkeypatch.setattr(warm_up, "waves", lambda _: waves)
    monkeypatch.setattr(warm_up, "large_steps", lambda _: large)


def steps_of_warm_up(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The new tokens of each sequence in each of its steps, fewest first; nothing of it stays."""
    steps: list[list[int]] = []
    run = llm._runner.run

    def seen(chunks):  # type: ignore[no-untyped-def]
        steps.append(sorted(chunk.num_tokens for chunk in chunks))
        return run(chunks)

    monkeypatch.setattr(llm._runner, "run", seen)
    ask_as_on_a_gpu(llm, monkeypatch)
    before = llm.stats()
    warm_up.warm_up(llm)
    assert llm.stats() == before
    return steps


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [32, 64, 512])
def test_nothing_of_it_stays(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, overlap: bool, tokens: int
) -> None:
    llm = engine(llama, max_model_len=32, kv_cache_tokens=tokens, overlap=overlap)
    steps = steps_of_warm_up(llm, monkeypatch)
    assert not llm.has_unfinished()
    assert [8] in steps
    assert [1] in steps
    if tokens == 512:
        assert [1, 1, 31] in steps  # a token of the first, and both new prompts
        assert [1, 15] in steps  # and what is new behind the page that both begin with
    monkeypatch.undo()
    (one,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0))
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 8)


def test_prompts_between_small_and_full_steps_come_longest_first() -> None:
    lengths = list(warm_up.lengths_below(16384))
    assert lengths == [14336, 10752, 8064, 6048, 4536, 3402, 2551]
    assert list(warm_up.lengths_below(2048)) == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [208, 4096])
def test_several_prompts_fill_a_step(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, overlap: bool, tokens: int
) -> None:
    """No prompt is as long as a chunk where sequences may not be."""
    monkeypatch.setattr(pieces, "MOST_ROWS", 30)
    sizes = {"max_model_len": 65, "chunked_prefill_size": 160, "kv_cache_tokens": tokens}
    llm = engine(llama, overlap=overlap, **sizes)
    steps = steps_of_warm_up(llm, monkeypatch)
    full = 160 if tokens == 4096 else 128
    assert ([32, 64, 64] if full == 160 else [64, 64]) in steps
    wanted = [full, *warm_up.lengths_below(full)]
    prompts = [sum(tokens for tokens in step if tokens > 1) for step in steps]
    assert [new for new in prompts if new > 30][-len(wanted) :] == wanted
    assert max(map(max, steps)) == 64


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("tokens", "longest"), [(176, 144), (208, 160), (400, 160), (4096, 160)])
def test_they_take_their_turns_where_pages_are_few(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, overlap: bool, tokens: int, longest: int
) -> None:
    """Also in a pool of hardly more than one sequence: all but two pages are a long prompt's."""
    monkeypatch.setattr(pieces, "MOST_ROWS", 30)
    sizes = {"max_model_len": 170, "chunked_prefill_size": 160, "kv_cache_tokens": tokens}
    llm = engine(llama, overlap=overlap, **sizes)
    steps = steps_of_warm_up(llm, monkeypatch)
    assert {1, longest} in map(set, steps)  # beside one that decodes
    new = set().union(*steps)
    assert new >= {longest, 160, *warm_up.lengths_below(160)}  # those run alone
    assert max(new) == 160


def prompts_with(vocabulary: int) -> list[list[int]]:
    """What an engine of full size, whose model knows so many tokens, is asked."""
    llm: Any = SimpleNamespace(
        config=SimpleNamespace(chunked_prefill_size=16384, page_size=16, max_running_requests=256),
        device=torch.device("cuda"),
        max_model_len=20000,
        model_config=SimpleNamespace(vocab_size=vocabulary),
        stats=lambda: SimpleNamespace(pages_total=10000),
    )
    waves = (*warm_up.waves(llm), *warm_up.large_steps(llm))
    return [prompt for wave in waves for prompt, _ in wave]


def test_vocabularies_may_be_small() -> None:
    assert max(max(prompt) for prompt in prompts_with(4)) == 3


def test_they_are_new_to_the_prefix_cache() -> None:
    """A prompt that begins like one before it would be computed in part."""
    prompts = prompts_with(50000)
    longer = [prompt for prompt in prompts if len(prompt) > 2048]
    assert [len(prompt) for prompt in longer[:3]] == [16384] * 3
    assert [len(prompt) for prompt in longer[3:]] == list(warm_up.lengths_below(16384))
    assert len({prompt[0] for prompt in longer[1:]}) == len(longer) - 1


@pytest.mark.parametrize("guesses", [0, 3])
def test_every_number_of_rows_is_looked_at(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, guesses: int
) -> None:
    more = {"speculative": "ngram", "num_draft_tokens": guesses} if guesses else {}
    llm = engine(llama, acceleration="off", max_running_requests=5, **more)
    seen: list[tuple[int, ...]] = []
    head = llm.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    warm_up.look_at_rows(llm)
    assert seen == [(1, n, head.in_features) for n in range(1, 5 * (1 + guesses) + 1)]
    seen.clear()
    monkeypatch.setattr(warm_up, "EACH", 3)
    monkeypatch.setattr(warm_up, "COARSE", 4)
    warm_up.look_at_rows(llm)
    assert [n for _, n, _ in seen] == ([1, 2, 3] if guesses == 0 else [1, 2, 3, 7, 11, 15, 19])


def test_seeds_are_those_of_an_engine_without_it(llama: TinyModel) -> None:
    fresh, warm = engine(llama), engine(llama)
    warm_up.warm_up(warm)
    drawn = SamplingParams(max_tokens=8, temperature=1)
    a, b = (llm.generate([[1, 2, 3]], drawn)[0].token_ids for llm in (fresh, warm))
    assert a == b


def test_what_cannot_run_is_said(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(llama)

    def refuse(chunks):  # type: ignore[no-untyped-def]
        raise HeadwayError("no provider takes pages of 3 tokens")

    monkeypatch.setattr(llm._runner, "run", refuse)
    with pytest.raises(HeadwayError, match=r"cannot generate this way: .*pages of 3 tokens"):
        warm_up.warm_up(llm)
    assert not llm.has_unfinished()


def test_what_does_not_fit_says_what_would(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(llama)

    def fill(chunks):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 940.00 MiB.")

    monkeypatch.setattr(llm._runner, "run", fill)
    with pytest.raises(HeadwayError, match=r"940(.|\n)*smaller --mem-fraction"):
        warm_up.warm_up(llm)


def test_requests_are_not_forgotten(llama: TinyModel) -> None:
    llm = engine(llama)
    llm.add_request("a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(InvalidInputError, match="1 unfinished requests"):
        llm.forget()
