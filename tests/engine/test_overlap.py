"""Steps that overlap, and steps that are replayed, say what plain steps say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from headway.engine.graphs import batch_sizes
from headway.engine.llm import LLM
from headway.engine.request import FinishReason, SamplingParams
from headway.serving.base import AttentionBackend
from headway.serving.flash import FlashAttentionBackend
from headway.serving.mla import MLABackend
from tests.engine.conftest import VOCABULARY, TinyModel, engine

PROMPTS = [[(7 * i + n) % VOCABULARY for i in range(n)] for n in (1, 2, 15, 16, 17, 33, 70, 33)]
PROMPTS.append(list(PROMPTS[4]))
GREEDY = SamplingParams(max_tokens=20, temperature=0)


def dense(backend: AttentionBackend) -> FlashAttentionBackend:
    """Where captured decode steps are kept."""
    found = backend._absorbed if isinstance(backend, MLABackend) else backend
    assert isinstance(found, FlashAttentionBackend)
    return found


def replaying(llm: LLM, most: int = 12, drafts: int = 0) -> LLM:
    """The engine with decode steps that go the way of CUDA graphs: recorded once per size, then fed
    through buffers that stay where they are. Recording here is remembering; replaying, doing it again."""
    dense(llm.backend)._fused_append = False
    llm._scheduler.uniform_drafts = drafts

    def record(function: Any) -> Callable[[], Tensor]:
        backend = function.func.__self__._backend
        inner = dense(backend)
        held = inner._batch, inner._decode
        function()

        def replay() -> Tensor:
            (inner._batch, inner._decode), inner._extend = held, None
            backend._batch = held[0]
            REPLAYED.append(held[0].max_seqlen_q)
            out: Tensor = function()
            return out

        return replay

    sizes = [size for size in (1, 2, 4) if size < most] + [most]
    padding = llm._kv.num_pages - 1
    llm._runner.graphs = [
        llm.graphs_of(tokens, padding, sizes, record) for tokens in sorted({1, 1 + drafts})
    ]
    return llm


#: New tokens per sequence of the steps that were replayed.
REPLAYED: list[int] = []


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_equals_transformers(
    name: str, chunk: int, graphs: bool, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    llm = engine(model, overlap=True, chunked_prefill_size=chunk)
    if graphs:
        replaying(llm)
    found = [list(one.token_ids) for one in llm.generate(PROMPTS, GREEDY)]
    assert found == [model.greedy(prompt, 20) for prompt in PROMPTS]
    assert llm.stats().pages_used == 0
    assert llm.stats().prefix_cache_hit_tokens > 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_guesses_are_checked_by_graphs(name: str, tiny: Callable[[str], TinyModel]) -> None:
    """Sequences without guesses get wrong ones, beyond their limits too, and say what they said."""
    model = tiny(name)
    loops = [[1, 2, 3, 4, 5, 6] * 6, [9, 8, 7] * 11 + [5], list(range(40)) * 2]
    llm = replaying(engine(model, speculative="ngram", num_draft_tokens=3), drafts=3)
    REPLAYED.clear()
    found = [list(one.token_ids) for one in llm.generate([*PROMPTS, *loops], GREEDY)]
    assert found == [model.greedy(prompt, 20) for prompt in [*PROMPTS, *loops]]
    assert {4} <= set(REPLAYED) <= {1, 4}
    assert llm.stats().pages_used == 0


@pytest.mark.parametrize("page_size", [1, 16])
def test_preemption_with_a_token_under_way(llama: TinyModel, page_size: int) -> None:
    llm = replaying(
        engine(llama, overlap=True, page_size=page_size, kv_cache_tokens=150, max_model_len=96)
    )
    found = [list(one.token_ids) for one in llm.generate(PROMPTS, GREEDY)]
    assert found == [llama.greedy(prompt, 20) for prompt in PROMPTS]
    assert llm.stats().preemptions > 0
    assert llm.stats().pages_used == 0


def test_sampled_tokens_are_the_same_with_and_without(llama: TinyModel) -> None:
    params = [SamplingParams(max_tokens=n, temperature=1.1, seed=n) for n in range(3, 12)]
    plain, overlapped = (
        engine(llama, overlap=overlap).generate(PROMPTS, params) for overlap in (False, True)
    )
    assert [one.token_ids for one in plain] == [one.token_ids for one in overlapped]


def test_a_stop_is_noticed_one_step_late_and_says_nothing_more(llama: TinyModel) -> None:
    llm = engine(llama, overlap=True)
    tokens = llama.greedy([1, 2, 3], 8)
    params = SamplingParams(max_tokens=8, temperature=0, stop_token_ids=(tokens[3],))
    (one,) = llm.generate([[1, 2, 3]], params)
    end = tokens.index(tokens[3])
    assert (list(one.token_ids), one.finish_reason) == (tokens[: end + 1], FinishReason.STOP)
    assert llm.stats().output_tokens == end + 1


def test_an_id_may_come_back_while_its_last_step_is_under_way(llama: TinyModel) -> None:
    llm = engine(llama, overlap=True)
    llm.add_request("a", [9] * 20, GREEDY)
    llm.step()
    llm.abort("a")
    llm.add_request("a", [1, 2, 3], GREEDY)
    outputs = []
    while llm.has_unfinished():
        outputs += llm.step()
    assert [token for one in outputs for token in one.new_token_ids] == llama.greedy([1, 2, 3], 20)
    assert llm.stats().pages_used == 0


def test_a_step_that_fails_fails_alone(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(llama, overlap=True)
    llm.add_request("a", [1, 2, 3], GREEDY)
    llm.step()
    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "run", lambda chunks: 1 / 0)
        (failed,) = llm.step()
    assert failed.finish_reason is FinishReason.ERROR
    (one,) = llm.generate([[1, 2, 3]], GREEDY)
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 20)


def test_sizes_of_graphs() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert batch_sizes(256)[-3:] == [224, 240, 256]


def test_what_cannot_be_captured_is_launched(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guesses without a graph leave decode steps theirs, and are no longer made alike."""

    def graphs_of(tokens: int, *_: object) -> str:
        if tokens > 1:
            raise RuntimeError("not this one")
        return "graphs"

    llm = engine(llama, speculative="ngram")
    llm.config = dataclasses.replace(llm.config, cuda_graphs=True)
    llm._scheduler.uniform_drafts = 4
    monkeypatch.setattr("headway.engine.llm.CudaRecorder", lambda device: None)
    monkeypatch.setattr(llm, "graphs_of", graphs_of)
    assert llm._capture(0, 4) == ["graphs"]
    assert llm._scheduler.uniform_drafts == 0
    assert "guesses are checked without CUDA graphs: RuntimeError: not this one" in caplog.text
