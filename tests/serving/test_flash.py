"""FlashAttentionBackend: each layer of a step is the call it stands for, and little more."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway.errors import HeadwayError, InvalidInputError
from headway.problem import Mask
from headway.serving.base import AttentionLayer, ForwardBatch, GraphLimits, TokenRotary
from headway.serving.flash import FlashAttentionBackend
from tests.stand_ins import installed

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


def batch(new: list[int], before: list[int], page_size: int = PAGE_SIZE) -> ForwardBatch:
    """Sequences with that many new and old tokens, in pages that lie in a random order."""
    total = [a + b for a, b in zip(new, before, strict=True)]
    columns = -(-max(total) // page_size)
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


def cache(
    step: ForwardBatch, one: AttentionLayer, page_size: int = PAGE_SIZE
) -> tuple[Tensor, Tensor]:
    shape = (step.page_table.numel(), page_size, one.num_kv_heads)
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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("new", "decodes"), [([1, 1], 2), ([5, 3], 0), ([1, 1, 4, 2], 2)])
def test_results_go_where_they_belong(new: list[int], decodes: int, fused: bool) -> None:
    one = layer()
    step = dataclasses.replace(batch(new, [9] * len(new)), num_decodes=decodes)
    q, k, v = tensors(step, one)
    kv = cache(step, one)
    backend = FlashAttentionBackend(fused_append=fused)
    found = []
    for out in (None, torch.full((2, *q.shape), float("nan")).transpose(0, 1)[:, 0]):
        backend.init_forward_metadata(step)
        found.append(backend.forward(q, k, v, kv, one, out=out))
    assert found[1] is out or found[1].data_ptr() == out.data_ptr()
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(out, found[0])


#: Providers with the device and the package that each is asked on, and pages that it takes.
PACKAGES = (
    ("fa2", "sm90", "fa2", 256),
    ("fa2", "sm90", "vllm", 16),
    ("fa3", "sm90", "sgl", 16),
    ("fa3", "sm90", "vllm", 16),
    ("fa4", "sm90", "fa4", 128),
    ("flashinfer", "sm90", "flashinfer", 16),
    ("mate", "mp31", "mate", 16),
)


@pytest.mark.parametrize(("provider", "kind", "package", "page_size"), PACKAGES)
@pytest.mark.parametrize("known", [False, True])
def test_every_package_leaves_results_where_they_belong(
    provider: str, kind: str, package: str, page_size: int, known: bool
) -> None:
    """In rows of memory that the next product reads, whatever the step and its layers are."""
    torch.manual_seed(3)
    layers = [layer(0, head_dim=64, head_dim_v=64), layer(1, head_dim=64, head_dim_v=64)]
    layers.append(dataclasses.replace(layers[0], mask=Mask(True, 5, 0)))
    steps = [([1, 1, 1], 3), ([9, 3], 0), ([1, 1, 9, 3], 2), ([4, 4, 4], 0), ([1, 4, 4], 1)]
    for new, decodes in steps:
        step = batch(new, [7 * i for i, _ in enumerate(new)], page_size)
        lengths = (step.cu_seqlens_q.numpy(), step.seqlens_k.numpy()) if known else None
        step = dataclasses.replace(step, num_decodes=decodes, host_lengths=lengths)
        kv = tuple(t.bfloat16() for t in cache(step, layers[0], page_size))
        wanted, mine = (FlashAttentionBackend(b, fused_append=False) for b in ("cpu", provider))
        wanted.init_forward_metadata(step)
        mine.init_forward_metadata(step)
        for one in layers:
            q, k, v = (t.bfloat16() for t in tensors(step, one))
            memory = torch.full((len(q) + 2, 4 * 64), float("nan"), dtype=torch.bfloat16)
            out = memory[: len(q)].unflatten(-1, (4, 64))
            want = wanted.forward(q, k, v, kv, one)
            with installed(kind, package):
                mine.forward(q, k, v, kv, one, out=out)
            torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
            assert memory[len(q) :].isnan().all()


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


def test_a_part_of_a_step_has_its_own_longest_sequence() -> None:
    step = batch([1, 1, 3, 2], [60, 9, 4, 7])
    known = step.cu_seqlens_q.numpy(), step.seqlens_k.numpy()
    step = dataclasses.replace(step, num_decodes=2, host_lengths=known)
    decodes, others = step.split()
    assert (decodes.batch_size, decodes.max_seqlen_q, decodes.max_seqlen_k) == (2, 1, 61)
    assert (others.batch_size, others.max_seqlen_q, others.max_seqlen_k) == (2, 3, 9)
    assert others.cu_seqlens_q.tolist() == others.lengths_on_host()[0].tolist() == [0, 3, 5]
    assert dataclasses.replace(step, host_lengths=None).split()[1].max_seqlen_k == 61
    alone, none = decodes.split()
    assert (alone.batch_size, none.batch_size, none.max_seqlen_k) == (2, 0, 0)


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


def test_padding_of_a_captured_step_writes_to_no_sequence() -> None:
    """Not where its new tokens are more than a page holds either."""
    one, new, padding = layer(), 6, 8
    backend = FlashAttentionBackend(fused_append=False)
    backend.init_cuda_graph_state(GraphLimits(2, 4, 16, padding, torch.device("cpu"), new))
    backend.init_forward_metadata_capture(2)
    kv = (torch.randn(9, PAGE_SIZE, 2, 16), torch.randn(9, PAGE_SIZE, 2, 16))
    pages = torch.arange(8, dtype=torch.int32).view(2, 4)
    for used in (2, 1):
        before = torch.full((used,), 9, dtype=torch.int32)
        ends = torch.arange(used + 1, dtype=torch.int32) * new
        kept = [t[4:8].clone() for t in kv]
        backend.init_forward_metadata_replay(
            ForwardBatch(ends, before, pages[:used], new, 15, used), 2
        )
        backend.init_forward_metadata_in_graph()
        q, k, v = (torch.randn(2 * new, heads, 16) for heads in (4, 2, 2))
        backend.forward(q, k, v, kv, one)
    assert all(torch.equal(now[4:8], was) for now, was in zip(kv, kept, strict=True))
