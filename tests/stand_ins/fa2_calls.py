"""What FlashAttention 2 computes for ragged queries, shortcuts included, for stand-ins of its packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import headway
from tests.stand_ins.compute import check_heads, check_int32, check_window

HALF = (torch.bfloat16, torch.float16)

#: Queries of a block.
_BLOCK = 64


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: Any,
    out: Tensor | None = None,
    **scores: Any,
) -> tuple[Tensor, Tensor]:
    """Check as ``mha_varlen_fwd`` does, then compute, one sequence after the other."""
    check_heads(q, k, v, HALF)
    check_int32(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    assert q.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    batch, heads = len(cu_seqlens_q) - 1, q.shape[1]
    assert batch > 0
    assert out is None or (out.dtype == q.dtype and out.shape == q.shape)
    window = _window(causal and max_seqlen_q > 1, window_size, max_seqlen_k)
    starts = cu_seqlens_q.tolist()
    if max_seqlen_q == 1 and heads > k.shape[-2] and window == (-1, -1):
        assert len(q) == batch, "reshaped to one row a sequence"
        starts = list(range(batch + 1))
    lengths = seqused_k if cu_seqlens_k is None else cu_seqlens_k.diff()
    assert lengths is not None
    got = torch.full_like(q, float("nan")) if out is None else out
    lse = torch.full((heads, len(q)), float("nan"))
    displaced = False
    for b, (start, end, length) in enumerate(
        zip(starts, starts[1:], lengths.tolist(), strict=False)
    ):
        if start >= end:
            continue
        unseeing = _unseeing(end - start, length, window[1])
        if block_table is not None and unseeing >= min(_BLOCK, end - start):
            assert batch * max_seqlen_q <= len(q), "writes behind the end of the LSE"
            displaced = True
        if length == 0:
            got[start:end], lse[:, start:end] = 0, float("inf")
            continue
        keys = _rows(k, b, length, cu_seqlens_k, block_table)
        values = _rows(v, b, length, cu_seqlens_k, block_table)
        one, its_lse = headway.flash_attn_func(
            q[start:end][None],
            keys[None],
            values[None],
            window_size=window,
            return_lse=True,
            backend="reference",
            **scores,
        )
        got[start:end], lse[:, start:end] = one[0], its_lse[0]
    if max_seqlen_k == 0:
        return got.zero_(), lse.fill_(float("inf"))
    if displaced:
        lse.fill_(float("nan"))
    return got, lse.masked_fill(lse == float("-inf"), float("inf"))


def _unseeing(queries: int, length: int, right: int) -> int:
    """How many of a sequence's queries see no key."""
    if length == 0:
        return queries
    return 0 if right < 0 else max(queries - length - right, 0)


def _window(causal: bool, window_size: Any, max_seqlen_k: int) -> tuple[int, int]:
    left, right = check_window(window_size)
    right = 0 if causal else right
    return tuple(-1 if side >= max_seqlen_k else side for side in (left, right))  # type: ignore[return-value]


def _rows(
    cache: Tensor, b: int, length: int, cu_seqlens_k: Tensor | None, table: Tensor | None
) -> Tensor:
    """Keys or values of a sequence."""
    if table is None:
        first = int(cu_seqlens_k[b])  # type: ignore[index]
        return cache[first : first + length]
    pages = table[b, : -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length]
