"""Probabilities of a prompt's tokens, and caches in float8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.engine.calibration import checkpoint_scales
from headway.engine.request import SamplingParams
from tests.engine.conftest import TinyModel, engine


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [7, 512])
def test_prompt_logprobs_equal_a_plain_forward(llama: TinyModel, chunk: int, overlap: bool) -> None:
    llm = engine(llama, chunked_prefill_size=chunk, overlap=overlap)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6] * 4, [1, 2], [7]]
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2)
    for _ in range(2):  # the second time the prefix cache knows all of it
        for prompt, one in zip(prompts, llm.generate(prompts, params), strict=True):
            with torch.inference_mode():
                logits = llama.model(torch.tensor([prompt])).logits[0, :-1]
            wanted = torch.log_softmax(logits.float(), dim=-1)
            assert [entry.token_id for entry in one.prompt_logprobs] == prompt[1:]
            for at, entry in enumerate(one.prompt_logprobs):
                assert entry.logprob == pytest.approx(float(wanted[at, prompt[at + 1]]), abs=1e-4)
                values, ids = wanted[at].topk(2)
                assert [i for i, _ in entry.top] == ids.tolist()
                assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert list(one.token_ids) == llama.greedy(prompt, 3)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_have_no_more_logits_than_there_is_room_for(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Prompts that are read take turns, and others beside them have the rest of a chunk."""
    llm = engine(llama, chunked_prefill_size=24, max_running_requests=8, overlap=overlap)
    llm._scheduler.most_read = 5
    steps: list[tuple[int, int]] = []
    run = llm._runner.run

    def seen(chunks):  # type: ignore[no-untyped-def]
        reading = [one for one in chunks if one.sequence.is_read and not one.sequence.is_decoding]
        steps.append(
            (sum(one.num_tokens for one in reading), sum(one.num_tokens for one in chunks))
        )
        return run(chunks)

    monkeypatch.setattr(llm._runner, "run", seen)
    prompts = [[(3 * i + n) % 256 for i in range(n)] for n in (17, 1, 40, 9, 33, 60)]
    params = [SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=0)] * 4
    params += [SamplingParams(max_tokens=3, temperature=0)] * 2
    for prompt, one in zip(prompts, llm.generate(prompts, params), strict=True):
        assert list(one.token_ids) == llama.greedy(prompt, 3)
        wanted = [] if len(prompt) in (33, 60) else prompt[1:]
        assert [entry.token_id for entry in one.prompt_logprobs] == wanted
    assert max(read for read, _ in steps) == 5
    assert max(tokens for _, tokens in steps) >= 24


def test_room_for_logits_is_a_share_of_the_free_memory(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, rows in ((4 * 256 * 4 * 700, 700), (1 << 10, 512)):
        monkeypatch.setattr("headway.engine.llm._free_bytes", lambda device, free=free: free)
        assert engine(llama)._scheduler.most_read == rows


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])  # no experts, which flip as a whole
def test_float8_cache_is_close(name: str, tiny: Callable[[str], TinyModel]) -> None:
    """Probabilities move by what 4 significant bits of keys and values are worth, and no more."""
    model = tiny(name)
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (20, 33)]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    wide, narrow = (
        engine(model, kv_cache_dtype=dtype, chunked_prefill_size=8).generate(prompts, params)
        for dtype in ("auto", "fp8_e4m3")
    )
    for a, b in zip(wide, narrow, strict=True):
        difference = torch.tensor(
            [
                x.logprob - y.logprob
                for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
            ]
        )
        assert 0 < difference.abs().mean() < 0.5


def test_scales_of_the_checkpoint_are_used(llama: TinyModel, tmp_path: Path) -> None:
    for file in llama.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.25])
        weights[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(0.5)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert sorted(checkpoint_scales(tmp_path)) == [0, 1]
    llm = engine(tmp_path, kv_cache_dtype="fp8_e4m3")
    layer, _ = llm._attention._layers[1]
    assert layer.k_descale.tolist() == [0.25, 0.25]
    assert layer.v_descale.tolist() == [0.5, 0.5]
    assert llm.kv_dtype is torch.float8_e4m3fn
    assert not checkpoint_scales(llama.path)


def test_a_float8_cache_holds_more_tokens(llama: TinyModel) -> None:
    pages = [
        engine(llama, kv_cache_tokens=None, kv_cache_memory_bytes=1 << 16, kv_cache_dtype=dtype)
        .stats()
        .pages_total
        for dtype in ("auto", "fp8_e4m3")
    ]
    assert pages[1] == 4 * pages[0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("settings", [{}, {"overlap": True}, {"speculative": "ngram"}], ids=str)
def test_a_pool_too_small_changes_no_answer_of_a_float8_cache(
    name: str, settings: dict[str, Any], tiny: Callable[[str], TinyModel]
) -> None:
    """What is taken from the prefix cache, or computed again after a preemption, is stored as before."""
    prompts = [[1, 2, 3, 4, 5, 6] * 6, [9, 8, 7] * 11 + [5], [3] * 20, [1, 2, 3] * 12]
    greedy = SamplingParams(max_tokens=30, temperature=0)
    float8: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3", "page_size": 4, "max_model_len": 80}
    model = tiny(name)
    alone = engine(model, disable_prefix_cache=True, **float8)
    wanted = [alone.generate([prompt], greedy)[0].token_ids for prompt in prompts]
    tight = engine(model, kv_cache_tokens=120, **float8, **settings)
    for _ in range(2):  # the second time from the prefix cache, as far as it still holds
        assert [one.token_ids for one in tight.generate(prompts, greedy)] == wanted
    assert tight.stats().preemptions > 0
    assert tight.stats().pages_used == 0
