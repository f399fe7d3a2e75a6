"""FlashAttentionBackend: each layer of a step is the call it stands for, and little more."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import providers
from headway.errors import HeadwayError, InvalidInputError
from headway.problem import Mask, Problem
from headway.serving.base import (
    AttentionLayer,
    ForwardBatch,
    GraphLimits,
    HeadNorms,
    TokenRotary,
)
from headway.serving.flash import FlashAttentionBackend

PAGE_SIZE = 4


def layer(index: int = 0, **changes: Any) -> AttentionLayer:
    fields: dict[str, Any] = {
        "layer_id": index,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "head_dim_v": 16,
        "softmax_scale": 0.2,
        "mask": Mask(causal=True, window_right=0),
    }
    return AttentionLayer(**{**fields, **changes})


def batch(new: list[int], before: list[int]) -> ForwardBatch:
    """Sequences with that many new and old tokens, in pages that lie in a random order."""
    total = [a + b for a, b in zip(new, before, strict=True)]
    columns = -(-max(total) // PAGE_SIZE)
    pages = torch.randperm(len(new) * columns, dtype=torch.int32).view(len(new), columns)
    ends = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(before, dtype=torch.int32)
    return ForwardBatch(ends, lengths, pages, max(new), max(total))


def tensors(step: ForwardBatch, one: AttentionLayer) -> tuple[Tensor, Tensor, Tensor]:
    rows = int(step.cu_seqlens_q[-1])
    return (
        torch.randn(rows, one.num_q_heads, one.head_dim),
        torch.randn(rows, one.num_kv_heads, one.head_dim),
        torch.randn(rows, one.num_kv_heads, one.head_dim_v),
    )


def cache(step: ForwardBatch, one: AttentionLayer) -> tuple[Tensor, Tensor]:
    shape = (step.page_table.numel(), PAGE_SIZE, one.num_kv_heads)
    return torch.randn(*shape, one.head_dim), torch.randn(*shape, one.head_dim_v)


LAYERS = (
    layer(0),
    layer(1, mask=Mask(causal=True, window_left=5, window_right=0)),
    layer(2, softcap=3.0),
    layer(3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    layer(4, head_dim_v=8),
    layer(5, num_q_heads=2, head_dim=8, head_dim_v=8, softmax_scale=0.35),
    layer(6, mask=Mask(causal=True, window_right=0, attention_chunk=6)),
    layer(7),  # of the same kind as the first: goes by its template
    layer(8, sinks=torch.tensor([1.0, 1.0, -3.0, 0.2])),
    layer(9),  # the same kind once more, in a layout that the template does not have
)


@pytest.mark.parametrize(
    ("new", "before"),
    [([1, 1, 1], [9, 0, 17]), ([7, 1, 12], [0, 6, 3]), ([5], [0]), ([1, 30], [40, 0])],
)
def test_layers_of_a_step_are_the_calls_they_stand_for(new: list[int], before: list[int]) -> None:
    torch.manual_seed(1)
    step = batch(new, before)
    backend = FlashAttentionBackend()
    backend.init_forward_metadata(step)
    for one in LAYERS:
        q, k, v = tensors(step, one)
        if one.layer_id == 9:
            q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
        mine = cache(step, one)
        theirs = tuple(t.clone() for t in mine)
        out = backend.forward(q, k, v, mine, one)
        wanted = headway.flash_attn_with_kvcache(
            q,
            *theirs,
            k,
            v,
            cache_seqlens=step.seqlens_k,
            page_table=step.page_table,
            cu_seqlens_q=step.cu_seqlens_q,
            cu_seqlens_k_new=step.cu_seqlens_q,
            max_seqlen_q=step.max_seqlen_q,
            softmax_scale=one.softmax_scale,
            causal=True,
            window_size=(one.mask.window_left, 0),
            attention_chunk=one.mask.attention_chunk,
            softcap=one.softcap,
            sinks=one.sinks,
            backend="reference",
        )
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_steps_follow_each_other() -> None:
    """Twelve tokens in chunks give what they give at once."""
    torch.manual_seed(2)
    one = layer()
    whole = batch([12], [0])
    q, k, v = tensors(whole, one)
    kv = cache(whole, one)
    backend = FlashAttentionBackend()
    backend.init_forward_metadata(whole)
    wanted = backend.forward(q, k, v, kv, one)
    again = tuple(torch.full_like(t, float("nan")) for t in kv)
    parts = []
    for start, size in ((0, 5), (5, 1), (6, 6)):
        rows = slice(start, start + size)
        ends = torch.tensor([0, size], dtype=torch.int32)
        lengths = torch.tensor([start], dtype=torch.int32)
        backend.init_forward_metadata(
            ForwardBatch(ends, lengths, whole.page_table, size, start + size)
        )
        parts.append(backend.forward(q[rows], k[rows], v[rows], again, one))
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-5, atol=1e-5)


def test_a_step_must_have_begun() -> None:
    one = layer()
    step = batch([1], [0])
    with pytest.raises(HeadwayError, match="init_forward_metadata"):
        FlashAttentionBackend().forward(*tensors(step, one), cache(step, one), one)


def test_pinned_backend_and_wrong_metadata() -> None:
    one, step = layer(), batch([2], [3])
    backend = FlashAttentionBackend("no_such_provider")
    backend.init_forward_metadata(step)
    with pytest.raises(InvalidInputError, match="no_such_provider"):
        backend.forward(*tensors(step, one), cache(step, one), one)
    backend = FlashAttentionBackend()
    backend.init_forward_metadata(dataclasses.replace(step, page_table=step.page_table + 1000))
    with pytest.raises(InvalidInputError, match="page_table"):
        backend.forward(*tensors(step, one), cache(step, one), one)


def test_a_layer_costs_little_beside_its_provider() -> None:
    """At most 15 µs of processor time from the step's second layer of a kind on; measured 2."""
    one, step = layer(), batch([1] * 16, [50] * 16)
    backend = FlashAttentionBackend()
    backend.init_forward_metadata(step)
    q, k, v = tensors(step, one)
    kv = cache(step, one)
    backend.forward(q, k, v, kv, one)
    backend._repeats[one.kind] = lambda q, *rest: q  # type: ignore[assignment]
    best = float("inf")
    for _ in range(20):
        start = time.process_time_ns()
        for _ in range(100):
            backend.forward(q, k, v, kv, one)
        best = min(best, (time.process_time_ns() - start) / 100 / 1000)
    assert best < 15


def test_angles_may_be_transposed() -> None:
    """As models leave them that multiply frequencies with positions and turn the result."""
    one, step = layer(), batch([3, 1, 5], [0, 6, 2])
    q, k, v = tensors(step, one)
    angles = torch.randn(8, 9).T
    cos, sin = angles.cos(), angles.sin()
    assert cos.stride() == (1, 9)
    found = []
    for rotary in (TokenRotary(cos, sin), TokenRotary(cos.contiguous(), sin.contiguous())):
        assert rotary.cos.stride(-1) == rotary.sin.stride(-1) == 1
        backend = FlashAttentionBackend()
        backend.init_forward_metadata(step)
        torch.manual_seed(0)
        found.append(backend.forward(q, k, v, cache(step, one), one, rotary))
    torch.testing.assert_close(found[0], found[1])


# --- decode steps whose kernel appends ------------------------------------------------------------------


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call to the reference appends, which it says it does in one launch."""
    kind = type(providers.get("reference"))
    run, seen = kind.run, []

    def recorded(self: Any, problem: Problem) -> tuple[Tensor, Tensor | None]:
        seen.append(problem.append is not None)
        return run(self, problem)

    monkeypatch.setattr(kind, "appends", lambda self, problem: problem.append is not None)
    monkeypatch.setattr(kind, "run", recorded)
    return seen


def angles_of(step: ForwardBatch, **more: Any) -> TokenRotary:
    angles = torch.randn(int(step.cu_seqlens_q[-1]), 8)
    return TokenRotary(angles.cos(), angles.sin(), **more)


def both_ways(step: ForwardBatch, one: AttentionLayer, rotary: TokenRotary | None) -> None:
    """A step gives the same, and writes the same, whoever appends."""
    given = [tensors(step, one) for _ in range(2)]
    kv = [cache(step, one) for _ in range(2)]
    found = []
    for most in (0, 4):
        backend = FlashAttentionBackend("reference", fused_append=False, most_appending=most)
        backend.init_forward_metadata(step)
        mine = [tuple(t.clone() for t in pair) for pair in kv]
        outs = [
            backend.forward(*qkv, pair, one, rotary)  # type: ignore[arg-type]
            for qkv, pair in zip(given, mine, strict=True)
        ]
        found.append((outs, mine))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 6])
def test_a_decode_step_is_left_to_a_kernel_that_appends(
    appended: list[bool], index: int, rotates: bool
) -> None:
    torch.manual_seed(3)
    step = batch([1, 1, 1], [9, 0, 17])
    both_ways(step, LAYERS[index], angles_of(step) if rotates else None)
    assert appended == [False, False, True, True]


def test_other_steps_are_written_beforehand(appended: list[bool]) -> None:
    torch.manual_seed(4)
    one = layer()
    many, prompt = batch([1] * 5, [3] * 5), batch([1, 6], [4, 0])
    mixed = dataclasses.replace(prompt, num_decodes=1)
    for step in (many, prompt, mixed):
        both_ways(step, one, angles_of(step))
    weights = torch.randn(2, one.head_dim)
    few = batch([1, 1], [3, 8])
    both_ways(few, one, angles_of(few, norms=HeadNorms(weights[0], weights[1], 1e-6, 0)))
    assert not any(appended)


def test_a_captured_step_appends_where_its_lengths_say(appended: list[bool]) -> None:
    """Two new tokens of each sequence, in buffers that were captured for others."""
    torch.manual_seed(5)
    one, step = layer(), batch([2, 2], [7, 3])
    q, k, v = tensors(step, one)
    rotary, kv = angles_of(step), cache(step, one)
    wanted_kv = tuple(t.clone() for t in kv)
    plain = FlashAttentionBackend("reference", fused_append=False, most_appending=0)
    plain.init_forward_metadata(step)
    wanted = plain.forward(q, k, v, wanted_kv, one, rotary)
    backend = FlashAttentionBackend("reference", fused_append=False)
    columns = step.page_table.shape[1]
    backend.init_cuda_graph_state(GraphLimits(2, columns, 16, 0, torch.device("cpu"), 2))
    backend.init_forward_metadata_capture(2)
    scratch = tuple(t.clone() for t in kv)
    for _ in range(2):  # as graphs are captured, on padding
        backend.init_forward_metadata_in_graph()
        backend.forward_decode(q, k, v, scratch, one, rotary)
    backend.init_forward_metadata_replay(step, 2)
    backend.init_forward_metadata_in_graph()
    found = backend.forward_decode(q, k, v, kv, one, rotary)
    assert appended == [False, True, True, True]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kv, wanted_kv)


def test_a_provider_that_does_not_append_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []
    kind = type(providers.get("reference"))
    monkeypatch.setattr(kind, "appends", lambda self, problem: asked.append(problem))
    one, step = layer(), batch([1, 1], [3, 8])
    backend = FlashAttentionBackend("reference", fused_append=False)
    for _ in range(3):
        backend.init_forward_metadata(step)
        for _ in range(2):
            backend.forward(*tensors(step, one), cache(step, one), one, angles_of(step))
    assert len(asked) == 1
