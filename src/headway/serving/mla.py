"""MLABackend: multi-head latent attention (DeepSeek V2, V3, R1) over a cache of latent vectors.

Per token the cache holds one vector: the latent keys and values of all heads, and the rotary part of the
keys behind it. Decoding absorbs the up-projections into queries and outputs and attends to these vectors
themselves. Prefill projects them up: causal attention over the new tokens, then, for tokens that are in the
cache already, a pass per chunk of them whose results are merged by their LSEs, so that no more than a
chunk is ever projected up. In float8 both run over persistent schedules, planned once per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headway import mla
from headway.errors import HeadwayError
from headway.interface import flash_attn_varlen_func, merge_states
from headway.persistent import DeviceWork
from headway.serving.base import (
    AttentionBackend,
    AttentionLayer,
    ForwardBatch,
    GraphLimits,
    TokenRotary,
)
from headway.serving.flash import FlashAttentionBackend, KVPages

#: Cached tokens that are projected up at a time, over all sequences of a step.
CHUNK_TOKENS = 32768


@dataclass(frozen=True)
class MLALayer(AttentionLayer):
    """A latent attention layer. As an :class:`AttentionLayer` it says what its absorbed form is: head_dim
    is latent plus rope, head_dim_v the latent, with one KV head.

    A float8 cache holds keys and values once, so ``k_descale`` and ``v_descale`` are the same number.

    Args:
        w_uk: (H, nope, latent), projects latents up to keys; w_uv: (H, v, latent), to values.
    """

    w_uk: Tensor = field(kw_only=True)
    w_uv: Tensor = field(kw_only=True)

    @property
    def latent_dim(self) -> int:
        return self.head_dim_v

    @property
    def nope_dim(self) -> int:
        return self.w_uk.shape[1]

    @property
    def value_dim(self) -> int:
        return self.w_uv.shape[1]


@dataclass(frozen=True)
class _Chunk:
    """Tokens that are attended to together: cached ones of a step, or its new ones."""

    slots: Tensor | None  # (tokens,) int64 in the flattened cache; None: the new ones
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    plan: DeviceWork | None


@dataclass
class _Prefill:
    """The sequences of a step that are not decoding, with lengths on the host."""

    batch: ForwardBatch
    ends: np.ndarray  # (B + 1,)
    before: np.ndarray  # (B,)
    plan: DeviceWork | None = None
    chunks: list[_Chunk] | None = None


class MLABackend(AttentionBackend):
    """Latent attention through Headway's providers.

    ``forward`` takes q (total_q, H, nope + rope) and k (total_q, 1, latent + rope), both rotated; v is k's
    latent part; the caches are pages (num_pages, page_size, 1, latent + rope) and their latent columns. It
    returns (total_q, H, v).

    Args:
        backend, ver: as for :class:`FlashAttentionBackend`.
        fp8_prefill: multiply prefill in float8; default: HEADWAY_FP8_PREFILL.
        chunk_tokens: cached tokens that are projected up at a time.
    """

    def __init__(
        self,
        backend: str = "auto",
        ver: Literal[3, 4] | None = None,
        *,
        fp8_prefill: bool | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._absorbed = FlashAttentionBackend(backend, ver, fused_append=False)
        self._writer = FlashAttentionBackend(backend, ver, fused_append=False)
        self._fp8 = fp8_prefill
        self._chunk_tokens = chunk_tokens
        self._prefill: _Prefill | None = None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._batch, self._prefill = batch, None
        if batch.is_decode:
            self._absorbed.init_forward_metadata(batch)
            return
        others = batch
        if batch.num_decodes:
            decodes, others = batch.split()
            self._absorbed.init_forward_metadata(decodes)
        self._writer.init_forward_metadata(others)
        ends, before = others.lengths_on_host()
        self._prefill = _Prefill(others, ends, before)

    def init_cuda_graph_state(self, limits: GraphLimits) -> None:
        self._absorbed.init_cuda_graph_state(limits)

    def init_forward_metadata_capture(self, batch_size: int) -> None:
        self._absorbed.init_forward_metadata_capture(batch_size)
        self._batch, self._prefill = self._absorbed.batch, None

    def init_forward_metadata_in_graph(self) -> None:
        self._absorbed.init_forward_metadata_in_graph()

    def init_forward_metadata_replay(self, batch: ForwardBatch, batch_size: int) -> None:
        self._absorbed.init_forward_metadata_replay(batch, batch_size)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        layer = _latent(layer, rotary)
        nope = layer.nope_dim
        latent = torch.einsum("thn,hnl->thl", q[..., :nope], layer.w_uk)
        absorbed = torch.cat((latent, q[..., nope:]), dim=-1)
        attended = self._absorbed.forward_decode(absorbed, k, v, kv_cache, layer)
        return torch.einsum("thl,hvl->thv", attended, layer.w_uv)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        layer = _latent(layer, rotary)
        step = self._prefill
        if step is None:
            raise HeadwayError("the step has no such sequences")
        self._writer.write(q, k, v, kv_cache, layer)
        chunks = self._chunks(step, kv_cache[0].shape[1], layer)
        new = _Chunk(None, step.batch.cu_seqlens_q, step.batch.max_seqlen_q, step.plan)
        if not chunks:
            return self._attend(q, k[:, 0], layer, step, new, with_lse=False)[0]
        parts = [self._attend(q, k[:, 0], layer, step, new)]
        for chunk in chunks:
            latent = _stored(kv_cache[0], chunk, layer, q.dtype)
            parts.append(self._attend(q, latent, layer, step, chunk))
        return _merged(parts).to(q.dtype)

    def _attend(
        self,
        q: Tensor,
        latent: Tensor,
        layer: MLALayer,
        step: _Prefill,
        keys_of: _Chunk,
        *,
        with_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention to latent vectors (tokens, latent + rope), causal where they are the step's own.

        Returns:
            (total_q, H, v), and the LSE, (H, total_q), or (0,) where nobody wants it.
        """
        keys, rope, values = _projected(latent, layer)
        lengths = step.batch.cu_seqlens_q, keys_of.cu_seqlens_k
        longest = step.batch.max_seqlen_q, keys_of.max_seqlen_k
        causal = keys_of.slots is None
        scale = layer.softmax_scale
        if mla.multiplies_float8(self._fp8, q.device, layer.num_q_heads):
            attended = mla.prefill(
                q,
                keys,
                values,
                *lengths,
                max_seqlen_q=longest[0],
                max_seqlen_k=longest[1],
                softmax_scale=scale,
                causal=causal,
                fp8=True,
                k_rope=rope,
                plan=keys_of.plan,
                return_lse=with_lse,
            )
        else:
            attended = flash_attn_varlen_func(
                q,
                torch.cat((keys, rope.expand(-1, keys.shape[1], -1)), dim=-1),
                values,
                *lengths,
                *longest,
                softmax_scale=scale,
                causal=causal,
                return_lse=with_lse,
                backend=self._absorbed.backend,
                ver=self._absorbed.ver,
            )
        return attended if isinstance(attended, tuple) else (attended, q.new_empty(0))

    # --- once per step ----------------------------------------------------------------------------

    def _plan(
        self, step: _Prefill, keys: np.ndarray, layer: MLALayer, *, causal: bool
    ) -> DeviceWork | None:
        """The schedule of one pass over ``keys`` (B + 1,) cumulated lengths; None where it needs none."""
        device = step.batch.seqlens_k.device
        if not mla.multiplies_float8(self._fp8, device, layer.num_q_heads):
            return None
        return mla.plan_prefill(
            torch.from_numpy(step.ends),
            torch.from_numpy(keys),
            num_heads_k=layer.num_q_heads,
            causal=causal,
            device=device,
        )

    def _chunks(self, step: _Prefill, page_size: int, layer: MLALayer) -> list[_Chunk]:
        """The cached tokens of a step, in chunks; found, and all passes planned, by its first layer."""
        if step.chunks is None:
            step.plan = self._plan(step, step.ends, layer, causal=True)
            each = max(1, self._chunk_tokens // max(1, len(step.before)))
            longest = int(step.before.max(initial=0))
            starts = range(0, longest, each)
            step.chunks = [self._chunk(step, first, each, page_size, layer) for first in starts]
        return step.chunks

    def _chunk(
        self, step: _Prefill, first: int, each: int, page_size: int, layer: MLALayer
    ) -> _Chunk:
        """Tokens ``first`` to ``first + each`` of every sequence that has them in the cache."""
        lengths = np.clip(step.before - first, 0, each)
        ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(ends[-1]) - ends[sequence] + first
        device = step.batch.seqlens_k.device
        rows, columns, offsets = (
            torch.from_numpy(a).to(device)
            for a in (sequence, position // page_size, position % page_size)
        )
        slots = step.batch.page_table[rows, columns].long() * page_size + offsets
        plan = self._plan(step, ends, layer, causal=False)
        return _Chunk(slots, torch.from_numpy(ends).to(device), int(lengths.max()), plan)


def _latent(layer: AttentionLayer, rotary: TokenRotary | None) -> MLALayer:
    if not isinstance(layer, MLALayer):
        raise HeadwayError(f"MLABackend runs MLALayers; layer {layer.layer_id} is none")
    if rotary is not None:
        raise HeadwayError("MLABackend takes queries and keys that are rotated")
    return layer


def _stored(cache: Tensor, chunk: _Chunk, layer: MLALayer, dtype: torch.dtype) -> Tensor:
    """The latent vectors of cached tokens, (tokens, latent + rope)."""
    assert chunk.slots is not None
    latent = cache.flatten(0, 2)[chunk.slots].to(dtype)
    return latent if layer.k_descale is None else latent * layer.k_descale.to(dtype)


def _projected(latent: Tensor, layer: MLALayer) -> tuple[Tensor, Tensor, Tensor]:
    """Of latent vectors (tokens, latent + rope): keys (tokens, H, nope), their columns that all heads
    share (tokens, 1, rope), and values (tokens, H, v)."""
    compressed, rope = latent.split((layer.latent_dim, latent.shape[-1] - layer.latent_dim), dim=-1)
    heads, nope, width = layer.w_uk.shape
    keys = (compressed @ layer.w_uk.reshape(heads * nope, width).T).unflatten(-1, (heads, nope))
    values = compressed @ layer.w_uv.reshape(heads * layer.value_dim, width).T
    return keys, rope[:, None], values.unflatten(-1, (heads, layer.value_dim))


def _merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    outs, lses = zip(*parts, strict=True)
    return merge_states(outs, lses)[0]
