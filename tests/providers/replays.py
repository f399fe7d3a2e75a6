"""Steps of FlashAttentionBackend that are recorded once and replayed for other lengths and pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import headway
from headway.engine.graphs import Record
from headway.problem import Mask
from headway.serving.base import AttentionLayer, ForwardBatch, GraphLimits
from headway.serving.flash import FlashAttentionBackend

PAGE_SIZE, MAX_PAGES = 16, 12
WINDOW = 20

#: Tokens in the cache before each step; fewer sequences than a graph's are padded.
STEPS = ((1, 0, 90, 17), (150, 16, 31, 160), (5, 63), (100,), (150, 0, 1, 2))


def layers(head_dim: int) -> list[AttentionLayer]:
    """Of two kinds; the last is of the first one's."""
    masks = (None, WINDOW, None)
    return [
        AttentionLayer(
            layer_id=index,
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=head_dim,
            head_dim_v=head_dim,
            softmax_scale=head_dim**-0.5,
            mask=Mask(causal=True, window_left=window, window_right=0),
        )
        for index, window in enumerate(masks)
    ]


class Recorded:
    """A step of ``size`` sequences with ``new`` tokens each, through all layers."""

    def __init__(
        self,
        backend: FlashAttentionBackend,
        record: Record,
        size: int,
        limits: GraphLimits,
        head_dim: int,
    ) -> None:
        self.new, self.size, self.backend = limits.tokens_per_sequence, size, backend
        self.layers = layers(head_dim)
        where = {"dtype": torch.bfloat16, "device": limits.device}

        def tensors(*shape: int) -> list[Tensor]:
            return [torch.randn(*shape, **where) for _ in self.layers]  # type: ignore[call-overload]

        rows = size * self.new
        self.q, self.k, self.v = (tensors(rows, heads, head_dim) for heads in (4, 2, 2))
        pages = limits.padding_page + 1, PAGE_SIZE, 2, head_dim
        self.caches = list(zip(tensors(*pages), tensors(*pages), strict=True))
        backend.init_forward_metadata_capture(size)
        self._replay = record(self._step)

    def _step(self) -> Tensor:
        self.backend.init_forward_metadata_in_graph()
        each = zip(self.q, self.k, self.v, self.caches, self.layers, strict=True)
        return torch.stack([self.backend.forward(*layer) for layer in each])

    def replay(self, step: ForwardBatch) -> Tensor:
        """(layers, rows in use, Hq, D)."""
        self.backend.init_forward_metadata_replay(step, self.size)
        return self._replay()[:, : step.batch_size * self.new]

    def assert_replays(self, before: Sequence[int], *, known: bool = True) -> None:
        """A replay computes what the reference does. ``known``: the host is told the lengths."""
        step = batch(before, self.new, self.q[0].device, known=known)
        for tensor in (*self.q, *self.k, *self.v):
            tensor.normal_()
        got = self.replay(step)
        used = len(before)
        for index, layer in enumerate(self.layers):
            want = headway.flash_attn_with_kvcache(
                self.q[index][: used * self.new].unflatten(0, (used, self.new)),
                *self.caches[index],
                cache_seqlens=step.seqlens_k + self.new,
                page_table=step.page_table,
                softmax_scale=layer.softmax_scale,
                causal=True,
                window_size=(layer.mask.window_left, 0),
                backend="reference",
            )
            assert isinstance(want, Tensor)
            torch.testing.assert_close(got[index].view(want.shape), want, atol=2e-2, rtol=2e-2)


def batch(before: Sequence[int], new: int, device: torch.device, *, known: bool) -> ForwardBatch:
    """Sequences with so many old tokens, in pages that lie anywhere; no entry behind them is a page."""
    ends = np.arange(len(before) + 1, dtype=np.int32) * new
    lengths = np.array(before, dtype=np.int32)
    longest = int(lengths.max()) + new
    table = torch.full((len(before), -(-longest // PAGE_SIZE)), 2147480000, dtype=torch.int32)
    pages = iter(torch.randperm(num_pages(4)).tolist())
    for row, length in enumerate(before):
        for column in range(-(-(length + new) // PAGE_SIZE)):
            table[row, column] = next(pages)
    step = ForwardBatch(
        torch.from_numpy(ends).to(device),
        torch.from_numpy(lengths).to(device),
        table.to(device),
        new,
        longest,
        len(before),
    )
    return dataclasses.replace(step, host_lengths=(ends, lengths) if known else None)


def num_pages(sequences: int) -> int:
    return sequences * MAX_PAGES


def limits(new: int, device: torch.device) -> GraphLimits:
    """Of graphs for up to four sequences; the page behind all others is padding."""
    return GraphLimits(
        max_batch_size=4,
        max_pages=MAX_PAGES,
        max_seqlen_k=MAX_PAGES * PAGE_SIZE,
        padding_page=num_pages(4),
        device=device,
        tokens_per_sequence=new,
    )
