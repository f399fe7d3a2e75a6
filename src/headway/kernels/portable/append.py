"""Rotation of new keys and queries, and the write of new keys and values into the cache, in one kernel.

Programs along axis 1 take, in order, the KV heads of k, those of v, and, with rotary, the heads of q.
float8 elements travel as uint8 in both directions (:mod:`.numeric` converts), so that every device
rounds alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, tl
from headway.kernels.portable.numeric import cast, to_e4m3_bits, widen
from headway.kernels.portable.operands import bits, block_width, lengths, strides
from headway.kernels.portable.rotation import turned, turning_columns
from headway.kernels.portable.spans import query_span
from headway.problem import Append, KVLayout, Problem

#: Tokens per program, and warps for them; a step of one token per sequence has nothing to put together.
BLOCK_T, WARPS = 16, 4
SINGLE_T, SINGLE_WARPS = 1, 1


@jit
def rotated_rows(
    ptr,
    offsets,
    inside,
    cos,
    sin,
    positions,
    stride_cos,
    stride_sin,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(tokens, BLOCK_D) float32 rows, their first 2 * HALF columns rotated; HALF 0: as they are."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]
    x = tl.load(ptr + offsets[:, None] + cols[None, :], mask=mask, other=0)
    x = widen(x, tl.float16).to(tl.float32)
    if HALF == 0:
        return x
    else:
        partner, angle, first = turning_columns(HALF, INTERLEAVED, BLOCK_D)
        turns = inside[:, None] & (cols < 2 * HALF)[None, :]
        other = tl.load(ptr + offsets[:, None] + partner[None, :], mask=turns, other=0)
        other = widen(other, tl.float16).to(tl.float32)
        at = positions.to(tl.int64)[:, None]
        return turned(x, other, at, angle, first, turns, cos, sin, stride_cos, stride_sin)


@jit
def stored(x, source_type: tl.constexpr, ptr_type: tl.constexpr, descale):
    """float32 rows as the destination holds them; quantised where it is narrower than the source."""
    if ptr_type == tl.uint8:
        if source_type != tl.uint8:
            x = cast(x, source_type).to(tl.float32)  # a rotated row is a row of its own dtype first
            x = x / descale
        return to_e4m3_bits(x)
    else:
        return cast(x, ptr_type)


@jit
def move_rows(
    source,
    source_offsets,
    to,
    to_offsets,
    inside,
    descale,
    cos,
    sin,
    positions,
    stride_cos,
    stride_sin,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Rotate rows of one head and store them as the destination holds them."""
    x = rotated_rows(
        source,
        source_offsets,
        inside,
        cos,
        sin,
        positions,
        stride_cos,
        stride_sin,
        HALF,
        INTERLEAVED,
        WIDTH,
        BLOCK_WIDTH,
    )
    x = stored(x, source.dtype.element_ty, to.dtype.element_ty, descale)
    cols = tl.arange(0, BLOCK_WIDTH)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    tl.store(to + to_offsets[:, None] + cols[None, :], x, mask=mask)


@jit
def append_kernel(
    k_new,
    v_new,
    q,
    k_cache,
    v_cache,
    q_out,
    cos,
    sin,
    rotary_seqlens,
    k_descale,
    v_descale,
    seqlens_k,
    cu_seqlens_new,
    cache_batch_idx,
    page_table,
    cu_seqlens_q,
    seqused_q,
    rows_q,
    num_new,
    stride_k_new_batch,
    stride_k_new_row,
    stride_k_new_head,
    stride_v_new_batch,
    stride_v_new_row,
    stride_v_new_head,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_q_out_batch,
    stride_q_out_row,
    stride_q_out_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_table,
    stride_cos,
    stride_sin,
    stride_k_descale_batch,
    stride_k_descale_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_AT_OWN_POSITION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(2)
    h = tl.program_id(1).to(tl.int64)  # heads may lie further apart than 32 bits reach
    step = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = b.to(tl.int64)
    old = tl.load(seqlens_k + b)
    base = old
    if rotary_seqlens is not None:
        base = tl.load(rotary_seqlens + b)

    if h >= 2 * KV_HEADS:
        head = h - 2 * KV_HEADS
        first, length = query_span(b, cu_seqlens_q, seqused_q, rows_q)
        turn = base + step
        if not Q_AT_OWN_POSITION:
            turn = base + step * 0
        q_rows = (first + step).to(tl.int64)
        move_rows(
            q + batch * stride_q_batch + head * stride_q_head,
            q_rows * stride_q_row,
            q_out + batch * stride_q_out_batch + head * stride_q_out_head,
            q_rows * stride_q_out_row,
            step < length,
            1.0,
            cos,
            sin,
            turn,
            stride_cos,
            stride_sin,
            HALF,
            INTERLEAVED,
            D,
            BLOCK_D,
        )
        return

    first_new = 0
    count = num_new
    if cu_seqlens_new is not None:
        first_new = tl.load(cu_seqlens_new + b)
        count = tl.load(cu_seqlens_new + b + 1) - first_new
    inside = step < count
    source_row = (first_new + step).to(tl.int64)
    at = old + step
    cache_row = b
    if cache_batch_idx is not None:
        cache_row = tl.load(cache_batch_idx + b)
    if PAGE_SIZE > 0:
        table = page_table + cache_row.to(tl.int64) * stride_table
        page = tl.load(table + at // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        row = (at % PAGE_SIZE).to(tl.int64)
    else:
        page = cache_row.to(tl.int64)
        row = at.to(tl.int64)
    descale = 1.0
    if h < KV_HEADS:
        if k_descale is not None:
            descale = tl.load(k_descale + b * stride_k_descale_batch + h * stride_k_descale_head)
        move_rows(
            k_new + batch * stride_k_new_batch + h * stride_k_new_head,
            source_row * stride_k_new_row,
            k_cache + h * stride_k_head,
            page * stride_k_page + row * stride_k_row,
            inside,
            descale,
            cos,
            sin,
            base + step,
            stride_cos,
            stride_sin,
            HALF,
            INTERLEAVED,
            D,
            BLOCK_D,
        )
    else:
        v_head = h - KV_HEADS
        if v_descale is not None:
            scale_at = b * stride_v_descale_batch + v_head * stride_v_descale_head
            descale = tl.load(v_descale + scale_at)
        move_rows(
            v_new + batch * stride_v_new_batch + v_head * stride_v_new_head,
            source_row * stride_v_new_row,
            v_cache + v_head * stride_v_head,
            page * stride_v_page + row * stride_v_row,
            inside,
            descale,
            cos,
            sin,
            base + step,
            stride_cos,
            stride_sin,
            0,
            INTERLEAVED,
            DV,
            BLOCK_DV,
        )


def _row_strides(prefix: str, tensor: Tensor, ragged: bool) -> dict[str, int]:
    if ragged:
        return {f"stride_{prefix}_batch": 0} | strides(prefix, tensor, ("row", "head"))
    return strides(prefix, tensor, ("batch", "row", "head"))


def append(problem: Problem, new: Append) -> Tensor:
    """Write the new keys and values in place; return q, a rotated copy of it where rotary is given."""
    p, rotary = problem, new.rotary
    places = lengths(p)
    q_out = torch.empty_like(p.q) if rotary is not None else p.q
    longest = new.k.shape[0] if new.cu_seqlens is not None else new.k.shape[1]
    if new.cu_seqlens is not None:
        longest = min(longest, max(p.max_seqlen_k, 1))
        if new.cu_seqlens is p.cu_seqlens_q:
            longest = min(longest, p.max_seqlen_q)
    if rotary is not None:
        longest = max(longest, places["rows_q"])
    heads = 2 * p.num_kv_heads + (p.num_q_heads if rotary is not None else 0)
    block_t, warps = (SINGLE_T, SINGLE_WARPS) if longest == 1 else (BLOCK_T, WARPS)
    grid = (cdiv(longest, block_t), heads, p.batch_size)
    if 0 in grid:
        return q_out
    ragged_new = new.cu_seqlens is not None
    append_kernel[grid](
        k_new=bits(new.k, False),
        v_new=bits(new.v, False),
        q=bits(p.q, False),
        k_cache=bits(p.k, False),
        v_cache=bits(p.v, False),
        q_out=bits(q_out, False),
        cos=rotary.cos if rotary is not None else None,
        sin=rotary.sin if rotary is not None else None,
        rotary_seqlens=rotary.seqlens if rotary is not None else None,
        k_descale=p.descales.k,
        v_descale=p.descales.v,
        page_table=p.page_table,
        stride_table=p.page_table.stride(0) if p.page_table is not None else 0,
        stride_cos=rotary.cos.stride(0) if rotary is not None else 0,
        stride_sin=rotary.sin.stride(0) if rotary is not None else 0,
        KV_HEADS=p.num_kv_heads,
        HALF=rotary.cos.shape[1] if rotary is not None else 0,
        INTERLEAVED=rotary is not None and rotary.interleaved,
        Q_AT_OWN_POSITION=p.mask.causal or p.mask.is_local,
        PAGE_SIZE=p.page_size if p.kv_layout is KVLayout.PAGED else 0,
        D=p.head_dim,
        DV=p.head_dim_v,
        BLOCK_D=block_width(p.head_dim),
        BLOCK_DV=block_width(p.head_dim_v),
        BLOCK_T=block_t,
        num_warps=warps,
        **{name: places[name] for name in _PLACES},
        **_row_strides("k_new", new.k, ragged_new),
        **_row_strides("v_new", new.v, ragged_new),
        **_row_strides("q", p.q, p.ragged_q),
        **_row_strides("q_out", q_out, p.ragged_q),
        **strides("k", p.k, ("page", "row", "head")),
        **strides("v", p.v, ("page", "row", "head")),
        **strides("k_descale", p.descales.k, ("batch", "head")),
        **strides("v_descale", p.descales.v, ("batch", "head")),
    )
    return q_out


_PLACES = (
    "seqlens_k",
    "cu_seqlens_new",
    "cache_batch_idx",
    "cu_seqlens_q",
    "seqused_q",
    "rows_q",
    "num_new",
)
