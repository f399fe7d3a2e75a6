"""Prompt lookup guesses from what was said before, and changes nothing but the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headway.engine.llm import LLM, Settled, Step
from headway.engine.request import FinishReason, RequestOutput, SamplingParams
from headway.engine.scheduler import Chunk
from headway.engine.speculation import NgramIndex, accepted
from tests.engine.conftest import TinyModel, engine

#: Prompts that repeat themselves, so that there is something to look up.
PROMPTS = [[1, 2, 3, 4, 5, 6] * 6, [9, 8, 7] * 11 + [5], [3] * 20, [1, 2, 3], list(range(40)) * 2]
GREEDY = SamplingParams(max_tokens=30, temperature=0)


def steps(
    llm: LLM, prompts: list[list[int]], params: SamplingParams
) -> tuple[list[list[int]], int]:
    for i, prompt in enumerate(prompts):
        llm.add_request(str(i), prompt, params)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    count = 0
    while llm.has_unfinished():
        count += 1
        for output in llm.step():
            tokens[output.request_id] += output.new_token_ids
    return list(tokens.values()), count


def test_the_longest_known_ending_is_continued() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 9, 2, 3, 4, 1, 2, 3]
    assert index.propose(tokens, 4) == (9, 2, 3, 4)
    tokens += [9]
    assert index.propose(tokens, 2) == (2, 3)
    assert index.propose([*tokens, 77, 78], 4) == ()


def test_the_latest_continuation_counts() -> None:
    assert NgramIndex().propose([5, 6, 1, 5, 6, 2, 5, 6], 1) == (2,)


def test_a_sequence_may_repeat_one_token() -> None:
    assert NgramIndex().propose([3] * 6, 4) == (
        3,
    )  # the run's last place but one is followed by it


def test_drafts_are_accepted_up_to_the_first_that_differs() -> None:
    assert accepted([4, 5, 6], [4, 5, 7, 8]) == 2
    assert accepted([4], [4, 9]) == 1
    assert accepted([], [1]) == 0


@pytest.mark.parametrize("drafts", [1, 4, 9])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "llama4", "deepseek_v3"])
def test_greedy_output_stays_what_it_is(
    name: str, drafts: int, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    llm = engine(model, speculative="ngram", num_draft_tokens=drafts, overlap=drafts != 4)
    found, _ = steps(llm, PROMPTS, GREEDY)
    assert found == [model.greedy(prompt, 30) for prompt in PROMPTS]
    assert llm.stats().pages_used == 0


def test_guesses_that_are_right_save_steps(llama: TinyModel) -> None:
    """A model whose continuations run in circles: every prompt is a stretch of what it says itself."""
    said = llama.greedy([1, 2, 3], 120)
    prompt = [1, 2, 3, *said[:80], *said[:10]]
    continued = llama.greedy(prompt, 30)
    llm = engine(llama, speculative="ngram")
    found, count = steps(llm, [prompt], GREEDY)
    assert found == [continued]
    plain, plain_count = steps(engine(llama), [prompt], GREEDY)
    assert plain == found
    assert count <= plain_count


@pytest.mark.parametrize("overlap", [False, True])
def test_in_a_pool_that_is_too_small(llama: TinyModel, overlap: bool) -> None:
    pool: dict[str, Any] = {"kv_cache_tokens": 150, "max_model_len": 120, "page_size": 4}
    llm = engine(llama, speculative="ngram", overlap=overlap, **pool)
    found, _ = steps(llm, PROMPTS, GREEDY)
    assert found == [llama.greedy(prompt, 30) for prompt in PROMPTS]
    assert llm.stats().preemptions > 0
    assert llm.stats().pages_used == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_stops_and_limits_hold_within_a_step(llama: TinyModel, overlap: bool) -> None:
    llm = engine(llama, speculative="ngram", overlap=overlap)
    tokens = llama.greedy(PROMPTS[0], 30)
    for limit in range(1, 12):
        (one,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=limit, temperature=0))
        assert list(one.token_ids) == tokens[:limit]
        assert one.finish_reason is FinishReason.LENGTH
    stop = SamplingParams(max_tokens=30, temperature=0, stop_token_ids=(tokens[7],))
    (one,) = llm.generate([PROMPTS[0]], stop)
    assert list(one.token_ids) == tokens[: tokens.index(tokens[7]) + 1]
    assert one.finish_reason is FinishReason.STOP


def test_requests_that_draw_at_random_are_not_guessed_for(llama: TinyModel) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=4)
    plain, guessed = (
        engine(llama, speculative=mode).generate(PROMPTS, params) for mode in ("off", "ngram")
    )
    assert [one.token_ids for one in plain] == [one.token_ids for one in guessed]


def test_texts_are_told_while_the_next_step_is_under_way(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With overlap every step but the last is launched before the tokens of the one before are told."""
    llm = engine(llama, speculative="ngram", overlap=True)
    order: list[str] = []
    launch, tell = llm._launch, llm._tell

    def launched(chunks: Sequence[Chunk]) -> Step:
        order.append("launch")
        return launch(chunks)

    def told(settled: Sequence[Settled]) -> list[RequestOutput]:
        order.extend(["tell"] * bool(settled))
        return tell(settled)

    monkeypatch.setattr(llm, "_launch", launched)
    monkeypatch.setattr(llm, "_tell", told)
    found, _ = steps(llm, [PROMPTS[0]], GREEDY)
    assert found == [llama.greedy(PROMPTS[0], 30)]
    assert order[:3] == ["launch", "launch", "tell"]
    assert order[-1] == "tell"
    assert order.count("launch") == order.count("tell")


def test_a_stop_in_the_text_ends_what_has_a_step_under_way(llama: TinyModel) -> None:
    """What is drawn behind the stop is not told, and its pages come back."""
    free = SamplingParams(max_tokens=60, temperature=0)
    whole = engine(llama).generate(["abcabcabc"], free)[0].text
    stop = next(whole[i : i + 2] for i in range(8, 50) if whole[i : i + 2].isascii())
    params = SamplingParams(max_tokens=60, temperature=0, stop=(stop,))
    ended = []
    for overlap in (False, True):
        llm = engine(llama, speculative="ngram", overlap=overlap)
        llm.add_request("a", llm.encode("abcabcabc"), params)
        told, counts = 0, []
        while llm.has_unfinished():
            for output in llm.step():
                told += len(output.new_token_ids)
                counts.append((told, output.output_tokens, output.finish_reason))
        assert all(said == counted for said, counted, _ in counts)
        llm.step()
        assert llm.stats().pages_used == 0
        ended.append(counts[-1])
    assert ended[0] == ended[1]
    assert ended[0][2] is FinishReason.STOP
