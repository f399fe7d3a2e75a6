"""MLABackend: absorbed decode, prefill in chunks of the prefix, and float8, against plain attention over
the projected keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway.errors import HeadwayError
from headway.problem import Mask
from headway.serving.base import ForwardBatch, GraphLimits
from headway.serving.mla import MLABackend, MLALayer
from tests.serving.test_flash import PAGE_SIZE, batch, layer

HEADS, NOPE, ROPE, VALUE, LATENT = 4, 16, 8, 12, 32


def latent_layer() -> MLALayer:
    return MLALayer(
        layer_id=0,
        num_q_heads=HEADS,
        num_kv_heads=1,
        head_dim=LATENT + ROPE,
        head_dim_v=LATENT,
        softmax_scale=0.2,
        mask=Mask(causal=True, window_right=0),
        w_uk=torch.randn(HEADS, NOPE, LATENT) / LATENT**0.5,
        w_uv=torch.randn(HEADS, VALUE, LATENT) / LATENT**0.5,
    )


def cached(step: ForwardBatch) -> tuple[Tensor, Tensor]:
    pages = torch.randn(step.page_table.numel(), PAGE_SIZE, 1, LATENT + ROPE)
    return pages, pages[..., :LATENT]


def new_tokens(step: ForwardBatch) -> tuple[Tensor, Tensor]:
    rows = int(step.cu_seqlens_q[-1])
    return torch.randn(rows, HEADS, NOPE + ROPE), torch.randn(rows, 1, LATENT + ROPE)


def plain(q: Tensor, k: Tensor, cache: Tensor, step: ForwardBatch, one: MLALayer) -> Tensor:
    """Each sequence by itself, every head's keys and values spelt out, in float64."""
    outs = []
    for b in range(step.batch_size):
        rows = slice(int(step.cu_seqlens_q[b]), int(step.cu_seqlens_q[b + 1]))
        before = int(step.seqlens_k[b])
        old = cache[step.page_table[b].long()].flatten(0, 2)[:before]
        latent = torch.cat((old, k[rows, 0])).double()
        keys = torch.einsum("tl,hnl->thn", latent[:, :LATENT], one.w_uk.double())
        rope = latent[:, None, LATENT:].expand(-1, HEADS, -1)
        keys = torch.cat((keys, rope), dim=-1)
        values = torch.einsum("tl,hvl->thv", latent[:, :LATENT], one.w_uv.double())
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) * one.softmax_scale
        places = torch.arange(len(latent))
        seen = places[None] <= places[before:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khv->qhv", weights, values))
    return torch.cat(outs).float()


STEPS = [([1, 1, 1], [9, 0, 17]), ([7, 1, 12], [0, 6, 3]), ([5], [0]), ([1, 30, 3], [40, 0, 25])]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 30, 1000])
@pytest.mark.parametrize(("new", "before"), STEPS)
def test_equals_plain_attention(
    new: list[int], before: list[int], chunk_tokens: int, known: bool
) -> None:
    torch.manual_seed(3)
    one, step = latent_layer(), batch(new, before)
    leading = next((i for i, n in enumerate(new) if n != 1), len(new))
    host = (step.cu_seqlens_q.numpy(), step.seqlens_k.numpy()) if known else None
    step = ForwardBatch(
        step.cu_seqlens_q,
        step.seqlens_k,
        step.page_table,
        max(new),
        step.max_seqlen_k,
        leading,
        host,
    )
    q, k = new_tokens(step)
    kv = cached(step)
    wanted = plain(q, k, kv[0].clone(), step, one)
    backend = MLABackend(chunk_tokens=chunk_tokens)
    backend.init_forward_metadata(step)
    for _ in range(2):  # the second layer goes by what the first has found
        out = backend.forward(q, k, k[..., :LATENT], kv, one)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    for b in range(step.batch_size):  # new latents lie behind the old ones
        flat = kv[0][step.page_table[b].long()].flatten(0, 2)
        rows = slice(int(step.cu_seqlens_q[b]), int(step.cu_seqlens_q[b + 1]))
        assert torch.equal(flat[before[b] : before[b] + new[b]], k[rows, 0])


def test_float8_prefill_with_a_prefix() -> None:
    """Within the error of float8 products: inputs of magnitude 1 carry 2^-4 each."""
    torch.manual_seed(4)
    one, step = latent_layer(), batch([20, 9], [0, 13])
    q, k = new_tokens(step)
    kv = cached(step)
    wanted = plain(q, k, kv[0].clone(), step, one)
    backend = MLABackend(fp8_prefill=True, chunk_tokens=8)
    backend.init_forward_metadata(step)
    out = backend.forward(q, k, k[..., :LATENT], kv, one)
    error = (out - wanted).norm() / wanted.norm()
    assert 1e-3 < error < 5e-2


def test_captured_decode_follows_its_buffers() -> None:
    torch.manual_seed(5)
    one = latent_layer()
    backend = MLABackend()
    whole = batch([1, 1, 1], [9, 3, 17])
    limits = GraphLimits(4, whole.page_table.shape[1] + 1, 64, 99, torch.device("cpu"))
    backend.init_cuda_graph_state(limits)
    backend.init_forward_metadata_capture(4)
    pages = torch.randn(100, PAGE_SIZE, 1, LATENT + ROPE)
    kv = pages, pages[..., :LATENT]
    q, k = torch.zeros(4, HEADS, NOPE + ROPE), torch.zeros(4, 1, LATENT + ROPE)
    for before in ([9, 3, 17], [2, 11, 4]):
        step = batch([1, 1, 1], before)
        rows = new_tokens(step)
        q[:3].copy_(rows[0])
        k[:3].copy_(rows[1])
        wanted = plain(*rows, pages.clone(), step, one)
        backend.init_forward_metadata_replay(step, 4)
        backend.init_forward_metadata_in_graph()
        out = backend.forward(q, k, k[..., :LATENT], kv, one)[:3]
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_other_layers_are_refused() -> None:
    step = batch([1], [3])
    backend = MLABackend()
    backend.init_forward_metadata(step)
    q, k = new_tokens(step)
    with pytest.raises(HeadwayError, match="MLALayers"):
        backend.forward(q, k, k[..., :LATENT], cached(step), layer())
