"""Prefill in pieces: what stands for a captured piece here is doing it again, in the same memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.engine import fused_layer, fusion
from headway.engine import llm as engine_module
from headway.engine.llm import LLM
from headway.engine.pieces import MOST_BYTES, MOST_ROWS, Pieces, pieces_of, plain_layers, row_counts
from headway.engine.request import SamplingParams
from headway.errors import InvalidInputError
from tests.engine.conftest import TinyModel, engine
from tests.engine.test_fusion import gated, rms_norm
from tests.engine.test_overlap import GREEDY, PROMPTS, replaying

COUNTS = [4, 16, 24]


@pytest.fixture(autouse=True)
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "rms_norm", rms_norm)
    monkeypatch.setattr(fused_layer, "gated", gated)
    monkeypatch.setattr(fusion, "gated", gated)


class Replays:
    """Counts what is replayed."""

    def __init__(self) -> None:
        self.count = 0

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        function()

        def replay() -> Tensor:
            self.count += 1
            return function()

        return replay


def in_pieces(llm: LLM) -> Replays:
    fusion.fuse(llm.model, llm.max_model_len)
    replays = Replays()
    llm._runner.pieces = pieces_of(llm.model, COUNTS, replays.record)
    assert llm._runner.pieces is not None
    replays.count = 0
    return replays


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_equals_transformers(
    name: str, chunk: int, graphs: bool, tiny: Callable[[str], TinyModel]
) -> None:
    """Whole prompts, chunks of them, and both beside sequences that decode; some steps are too large."""
    model = tiny(name)
    llm = engine(model, acceleration="off", overlap=True, chunked_prefill_size=chunk)
    replays = in_pieces(llm)
    if graphs:
        replaying(llm)
    found = [list(one.token_ids) for one in llm.generate(PROMPTS, GREEDY)]
    assert found == [model.greedy(prompt, 20) for prompt in PROMPTS]
    assert replays.count % 3 == 0  # two layers: three pieces a step
    assert replays.count > 0 or chunk > COUNTS[-1]
    assert llm._attention.pieces is None


def test_padding_never_reaches_a_token(llama: TinyModel) -> None:
    """What an earlier, longer step left in the shared memory is not a number."""
    llm = engine(llama, acceleration="off")
    in_pieces(llm)
    pieces = llm._runner.pieces
    assert pieces is not None
    for prompt in PROMPTS:
        with torch.inference_mode():
            for memory in (pieces._qkv, pieces._attended):
                memory.fill_(float("nan"))
        (found,) = llm.generate([prompt], GREEDY)
        assert list(found.token_ids) == llama.greedy(prompt, 20)


def test_a_step_that_fails_leaves_no_pieces_behind(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(llama, acceleration="off")
    in_pieces(llm)

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no")

    with monkeypatch.context() as broken:
        broken.setattr(llm.backend, "forward", fail)
        llm.add_request("x", PROMPTS[0], SamplingParams(max_tokens=2))
        assert [one.error for one in llm.step()] == ["RuntimeError: no"]
    assert llm._attention.pieces is None
    (found,) = llm.generate([PROMPTS[1]], GREEDY)
    assert list(found.token_ids) == llama.greedy(PROMPTS[1], 20)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "deepseek_v3"])
def test_layers_that_are_not_plain_run_whole(name: str, tiny: Callable[[str], TinyModel]) -> None:
    llm = engine(tiny(name), acceleration="off")
    fusion.fuse(llm.model, llm.max_model_len)
    assert pieces_of(llm.model, COUNTS, Replays().record) is None


@pytest.mark.parametrize("graphs", [False, True])
def test_guesses_are_checked_beside_prompts(llama: TinyModel, graphs: bool) -> None:
    """Steps of decoding sequences with as many guesses each are a graph's; others run in pieces."""
    loops = [[1, 2, 3, 4, 5, 6] * 6, [9, 8, 7] * 11 + [5], list(range(40)) * 2]
    llm = engine(
        llama,
        acceleration="off",
        overlap=True,
        speculative="ngram",
        num_draft_tokens=3,
        chunked_prefill_size=11,
    )
    replays = in_pieces(llm)
    if graphs:
        replaying(llm, drafts=3)
    found = [list(one.token_ids) for one in llm.generate([*PROMPTS, *loops], GREEDY)]
    assert found == [llama.greedy(prompt, 20) for prompt in [*PROMPTS, *loops]]
    assert replays.count > 0


def test_prompts_that_are_looked_at_run_in_pieces(llama: TinyModel) -> None:
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1)
    plain, other = (
        engine(llama, acceleration="off", chunked_prefill_size=9, disable_prefix_cache=True)
        for _ in range(2)
    )
    replays = in_pieces(other)
    for mine, theirs in zip(
        other.generate(PROMPTS, params), plain.generate(PROMPTS, params), strict=True
    ):
        assert mine.token_ids == theirs.token_ids
        assert len(mine.prompt_logprobs) == len(mine.prompt_token_ids) - 1
        for one, another in zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
    assert replays.count > 0


@pytest.mark.parametrize("bias", [False, True])
def test_products_into_memory_are_products(bias: bool) -> None:
    layer = nn.Linear(8, 5, bias=bias).requires_grad_(False)
    x, out = torch.randn(3, 8), torch.full((3, 5), float("nan"))
    fused_layer.Linear.of(layer).into(out, x)
    torch.testing.assert_close(out, layer(x))


def test_some_layers_of_a_product_may_have_a_bias() -> None:
    layers = [nn.Linear(8, n, bias=n != 3).requires_grad_(False) for n in (5, 3, 4)]
    x = torch.randn(2, 8)
    together = fused_layer.Linear.of(*layers)(x)
    torch.testing.assert_close(together, torch.cat([layer(x) for layer in layers], dim=-1))


class Backwards(nn.Module):
    """Stands where a model's layers stand, and begins with the last."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self.layers)[::-1])

    def __getitem__(self, index: slice) -> list[nn.Module]:
        return list(self.layers)[::-1][index]


def test_layers_in_another_order_are_found_out(
    llama: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    llm = engine(llama, acceleration="off")
    fusion.fuse(llm.model, llm.max_model_len)
    llm.model.model.layers = Backwards(llm.model.model.layers)
    assert pieces_of(llm.model, COUNTS, Replays().record) is None
    assert "prefill runs without CUDA graphs" in caplog.text


def rows_for(counts: list[int], *num_tokens: int) -> list[int | None]:
    pieces = Pieces.__new__(Pieces)
    pieces._counts = counts
    return [pieces.rows_for(n) for n in num_tokens]


def test_steps_get_the_next_larger_number_of_rows() -> None:
    counts = row_counts(MOST_ROWS)
    assert rows_for(counts, 1, 16, 17, 1000, 2048, 2049) == [16, 16, 32, 1024, 2048, None]
    assert row_counts(512)[-2:] == [384, 512]
    assert row_counts(17) == [16, 17]
    # The trial of pieces has a few tokens, however small the chunks are.
    assert row_counts(1) == [16]
    wide = torch.tensor(counts, dtype=torch.float32)
    assert (wide[1:] / wide[:-1]).max() <= 2


def test_full_steps_run_in_pieces_where_there_is_memory_for_them() -> None:
    counts = row_counts(16640, row_bytes=MOST_BYTES // 16640)
    assert counts == [*row_counts(MOST_ROWS), 16640]
    assert rows_for(counts, 2048, 2049, 14559, 14560, 16640, 16641) == [
        2048,
        None,
        None,
        16640,
        16640,
        None,
    ]
    assert row_counts(16640, row_bytes=MOST_BYTES // 16639) == row_counts(MOST_ROWS)
    small, taken = 1 << 15, 16640 << 15  # a row's bytes, and a full step's
    assert row_counts(16640, small, free_bytes=4 * taken)[-1] == 16640
    assert row_counts(16640, small, free_bytes=4 * taken - 4)[-1] == MOST_ROWS


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"chunked_prefill_size": 40, "max_running_requests": 3}, 43),
        ({"chunked_prefill_size": 40, "max_running_requests": 3, "speculative": "ngram"}, 55),
        ({"chunked_prefill_size": 4096, "max_running_requests": 2, "max_model_len": 100}, 200),
        ({"chunked_prefill_size": 1, "max_running_requests": 1}, 16),
    ],
)
def test_full_steps_are_as_large_as_steps_can_be(
    settings: dict[str, Any], most: int, llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few short sequences never fill a chunk: what they fill together is a full step then."""
    llm = engine(llama, acceleration="off", **settings)
    llm.acceleration = fusion.fuse(llm.model, llm.max_model_len)
    llm.config = dataclasses.replace(llm.config, cuda_graphs=True)
    monkeypatch.setattr(engine_module, "CudaRecorder", lambda device: Replays().record)
    pieces = llm._capture_pieces()
    assert pieces is not None
    assert pieces._counts[-1] == most


def test_the_cache_leaves_room_for_a_full_step(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(llama, acceleration="off", chunked_prefill_size=300, max_running_requests=50)
    page_bytes = 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, k and v, heads, head_dim, float32
    shapes = llm.probe.shapes()
    config = dataclasses.replace(llm.config, kv_cache_tokens=None, mem_fraction=0.5)
    llm.config, llm.device = config, torch.device("cuda")
    monkeypatch.setattr(engine_module, "_free_bytes", lambda device: 400 * page_bytes)
    assert llm._cache_size(shapes, 512) == (200, 512)
    llm.acceleration = fusion.fuse(llm.model, llm.max_model_len)
    step = 350 * plain_layers(llm.model)[0].row_bytes
    assert llm._cache_size(shapes, 512) == ((400 * page_bytes - step) // (2 * page_bytes), 512)
    monkeypatch.setattr(engine_module, "_free_bytes", lambda device: step + page_bytes)
    with pytest.raises(InvalidInputError, match=r"mem_fraction: got 0.5; .* smaller chunked_pre"):
        llm._cache_size(shapes, 512)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_row_takes_what_is_allocated_for_it(
    name: str, tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all pieces share, and what the last part of a layer has at once."""
    llm = engine(tiny(name), acceleration="off")
    fusion.fuse(llm.model, llm.max_model_len)
    layers = plain_layers(llm.model)
    assert len(layers) == 2
    pieces = Pieces(layers, [16], Replays().record)
    shared = (pieces._hidden, pieces._qkv, pieces._attended)
    between: list[Tensor] = []

    def remembered(x: Tensor, activation: object) -> Tensor:
        between.extend((x, gated(x, activation)))
        return between[-1]

    monkeypatch.setattr(fused_layer, "gated", remembered)
    pieces.capture()
    normed = pieces._hidden
    assert 16 * layers[0].row_bytes == sum(t.nbytes for t in (*shared, normed, *between[:2]))
