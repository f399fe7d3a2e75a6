"""The attention kernel: one program takes one tile of query rows over all its keys, or over a split.

Rows of a tile are queries of one head; with PACK heads of a KV head packed, row r is query r // PACK of
head r % PACK, which fills tiles when queries are few. With a work list, programs take (sequence, split)
pairs off it and leave normalised partial results for :mod:`.combine`; a sequence in one piece is
finished here. :mod:`.forward`, :mod:`.decode` and :mod:`.mla` launch it, each with tiles of its own.
"""

from __future__ import annotations

from typing import Any

from headway.kernels._triton import gdc_launch_dependents, jit, tl
from headway.kernels.portable.mainloop import attend, finish, load_rows
from headway.kernels.portable.numeric import (
    cast,
    program_ids_again,
    recomputed,
    row_magnitude,
    widen,
)
from headway.kernels.portable.spans import key_span, query_span, visible_span


@jit
def tile_rows(tile, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile's rows: (first query, each one's query relative to it, each one's head in its pack)."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile * BLOCK_M // PACK
    if PACK == 1:
        return first, tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], dtype=tl.int32)
    else:
        return first, rows // PACK - first, rows % PACK


@jit
def attention_kernel(
    q1_ptr,
    q2_ptr,
    k1_ptr,
    k2_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks,
    q_descale,
    k_descale,
    v_descale,
    cu_seqlens_q,
    seqused_q,
    cu_seqlens_k,
    seqlens_k,
    cu_seqlens_new,
    leftpad_k,
    cache_batch_idx,
    page_table,
    aux,
    work,
    num_splits,
    split_start,
    part_out,
    part_lse,
    rows_q,
    capacity,
    num_new,
    stride_q1_batch,
    stride_q1_row,
    stride_q1_head,
    stride_q2_batch,
    stride_q2_row,
    stride_q2_head,
    stride_k1_page,
    stride_k1_row,
    stride_k1_head,
    stride_k2_page,
    stride_k2_row,
    stride_k2_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    stride_table,
    stride_q_descale_batch,
    stride_q_descale_head,
    stride_k_descale_batch,
    stride_k_descale_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    softmax_scale,
    softcap,
    window_left,
    window_right,
    chunk,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORES_FIRST: tl.constexpr,
    TWO_SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    FP8_DOT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    PACK: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    V_IS_K: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HOIST: tl.constexpr,
    K1_ROW: tl.constexpr,
    K2_ROW: tl.constexpr,
    NVIDIA: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    VALUE_UNIT: tl.constexpr = STRIDE_UNIT // 2 if PAIRED else STRIDE_UNIT
    KEY_UNIT: tl.constexpr = VALUE_UNIT if V_IS_K else STRIDE_UNIT
    if PAIRED:
        v_ptr = v_ptr.to(tl.pointer_type(tl.uint16))
        if V_IS_K:
            k1_ptr = k1_ptr.to(tl.pointer_type(tl.uint16))
    stride_k1_page = tl.cast(stride_k1_page, tl.int64) * KEY_UNIT
    stride_k1_row *= KEY_UNIT
    stride_k1_head *= KEY_UNIT
    stride_k2_page = tl.cast(stride_k2_page, tl.int64) * STRIDE_UNIT
    stride_k2_row *= STRIDE_UNIT
    stride_k2_head *= STRIDE_UNIT
    stride_v_page = tl.cast(stride_v_page, tl.int64) * VALUE_UNIT
    stride_v_row *= VALUE_UNIT
    stride_v_head *= VALUE_UNIT
    if K1_ROW > 0:
        stride_k1_row = K1_ROW * KEY_UNIT // STRIDE_UNIT
        stride_k2_row = K2_ROW
    b = tl.program_id(2)
    split = 0
    splits = 1
    if work is not None:
        b = tl.load(work + b)
        if b < 0:
            return
        split = tl.program_id(2) - tl.load(split_start + b)
        splits = tl.load(num_splits + b)
    # Last tiles see the most keys under a causal mask: start them first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first_head = tl.program_id(0) * PACK
    kv_head = tl.program_id(0)
    if PACK != HEADS_PER_KV:
        kv_head = first_head // HEADS_PER_KV

    q_first, seqlen_q = query_span(b, cu_seqlens_q, seqused_q, rows_q)
    if tile * BLOCK_M >= seqlen_q * PACK:
        return
    cache_row, first, seqlen_k = key_span(
        b, seqlens_k, num_new, cu_seqlens_new, cu_seqlens_k, leftpad_k, cache_batch_idx, capacity
    )
    q_tile, local, member = tile_rows(tile, PACK, BLOCK_M)
    q_idx = q_tile + local
    head = first_head + member
    in_use = q_idx < seqlen_q
    pos = q_idx + (seqlen_k - seqlen_q)
    q_last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PACK, seqlen_q - 1)
    lo, hi, full_lo, full_hi = visible_span(
        q_tile + (seqlen_k - seqlen_q),
        q_last + (seqlen_k - seqlen_q),
        seqlen_k,
        window_left,
        window_right,
        chunk,
        HAS_LEFT,
        HAS_RIGHT,
        HAS_CHUNK,
    )
    begin = lo // BLOCK_N * BLOCK_N
    end = tl.where(hi > lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N, begin)
    if work is not None:
        share = tl.cdiv((end - begin) // BLOCK_N, splits) * BLOCK_N
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)

    # What the rows of a tile share goes into the pointers: a thread holds 32 bits for each of its rows.
    row = (q_first + q_tile).to(tl.int64)
    batch = b.to(tl.int64)
    head_0 = first_head.to(tl.int64)
    q1 = load_rows(
        q1_ptr + (batch * stride_q1_batch + row * stride_q1_row + head_0 * stride_q1_head),
        local * stride_q1_row + member * stride_q1_head,
        in_use,
        D1,
        BLOCK_D1,
        True,
    )
    q2 = q1
    if D2 > 0:
        q2 = load_rows(
            q2_ptr + (batch * stride_q2_batch + row * stride_q2_row + head_0 * stride_q2_head),
            local * stride_q2_row + member * stride_q2_head,
            in_use,
            D2,
            BLOCK_D2,
            True,
        )
    if not FP8_DOT:
        q1 = widen(q1, tl.float16)
        q2 = widen(q2, tl.float16)
    scale1 = 1.0
    scale2 = 1.0
    if q_descale is not None:
        at = b * stride_q_descale_batch + kv_head * stride_q_descale_head
        scale2 *= tl.load(q_descale + at)
    if k_descale is not None:
        at = b * stride_k_descale_batch + kv_head * stride_k_descale_head
        scale2 *= tl.load(k_descale + at)
    v_scale = 1.0
    if v_descale is not None:
        at = b * stride_v_descale_batch + kv_head * stride_v_descale_head
        v_scale = tl.load(v_descale + at)
    scale = softmax_scale
    if TWO_SCALES:  # qv · v takes v's scale, q · k the other two
        scale1 = v_scale
    else:
        scale = softmax_scale * scale2
    if ROW_SCALES:
        # float8 keys become float16 in one step and bfloat16 in three; rows of bfloat16 queries,
        # brought to magnitude 1, fit float16 without loss.
        magnitude = row_magnitude(q1)
        if D2 > 0:
            magnitude = tl.maximum(magnitude, row_magnitude(q2))
        q1 = (q1.to(tl.float32) / magnitude[:, None]).to(tl.float16)
        q2 = (q2.to(tl.float32) / magnitude[:, None]).to(tl.float16)
        scale = scale * magnitude
    table = page_table
    if PAGE_SIZE > 0:
        table = page_table + cache_row.to(tl.int64) * stride_table
        cache_row = 0
    cache_row = tl.cast(cache_row, tl.int64)
    kv_head_wide = kv_head.to(tl.int64)
    q1_odd = q1
    if PAIRED and V_IS_K:
        q1, q1_odd = tl.split(tl.reshape(q1, [BLOCK_M, BLOCK_D1 // 2, 2]))
    acc, row_sum, row_max = attend(
        q1,
        q1_odd,
        q2,
        pos,
        head,
        b,
        begin,
        end,
        lo,
        hi,
        full_lo,
        full_hi,
        k1_ptr + cache_row * stride_k1_page + kv_head_wide * stride_k1_head,
        k2_ptr + cache_row * stride_k2_page + kv_head_wide * stride_k2_head,
        v_ptr + cache_row * stride_v_page + kv_head_wide * stride_v_head,
        stride_k1_page,
        stride_k1_row,
        stride_k2_page,
        stride_k2_row,
        stride_v_page,
        stride_v_row,
        table,
        first,
        window_left,
        window_right,
        chunk,
        scale,
        scale1,
        scale2,
        softcap,
        aux,
        score_mod,
        mask_mod,
        HAS_LEFT,
        HAS_RIGHT,
        HAS_CHUNK,
        HAS_SOFTCAP,
        SCORES_FIRST,
        TWO_SCALES,
        ROW_SCALES,
        PAGE_SIZE,
        ALIGNED,
        PAIRED,
        V_IS_K,
        D1,
        D2,
        DV,
        BLOCK_D1,
        BLOCK_D2,
        BLOCK_DV,
        BLOCK_M,
        BLOCK_N,
        EDGE_STAGES,
        HOIST,
    )
    acc *= v_scale
    # Rows are computed again: kept over the loops, they would cost registers there. Beside the widest
    # accumulators there are none left even for numbers, which are read again.
    item = tl.program_id(2)
    pack = tl.program_id(0)
    if not V_IS_K:
        tile = recomputed(tile, NVIDIA)
    else:
        pack, tile, item = program_ids_again(NVIDIA)
        b = item
        if work is not None:
            b = tl.load(work + item)
            splits = tl.load(num_splits + b)
        q_first, seqlen_q = query_span(b, cu_seqlens_q, seqused_q, rows_q)
        batch = b.to(tl.int64)
        first_head = pack * PACK
    q_tile, local, member = tile_rows(tile, PACK, BLOCK_M)
    head = first_head + member
    in_use = q_tile + local < seqlen_q
    row = (q_first + q_tile).to(tl.int64)
    head_0 = first_head.to(tl.int64)
    cols = tl.arange(0, BLOCK_DV)
    out_mask = in_use[:, None] & (cols < DV)[None, :]
    if work is not None:
        if splits > 1:
            out, lse = finish(acc, row_sum, row_max, None)
            part = item.to(tl.int64) * tl.num_programs(0) + pack
            part_rows = part * (rows_q * PACK) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(part_out + part_rows[:, None] * DV + cols[None, :], out, mask=out_mask)
            tl.store(part_lse + part_rows, lse, mask=in_use)
            return
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head, mask=in_use, other=0.0).to(tl.float32)
    out, lse = finish(acc, row_sum, row_max, sink)
    out_tile = out_ptr + (
        batch * stride_out_batch + row * stride_out_row + head_0 * stride_out_head
    )
    out_offsets = local * stride_out_row + member * stride_out_head
    tl.store(
        out_tile + out_offsets[:, None] + cols[None, :],
        cast(out, out_ptr.dtype.element_ty),
        mask=out_mask,
    )
    if lse_ptr is not None:
        lse_tile = lse_ptr + (batch * stride_lse_batch + row)
        tl.store(lse_tile + head.to(tl.int64) * stride_lse_head + local, lse, mask=in_use)


#: Arguments of a launch without a work list.
UNSPLIT: dict[str, Any] = dict.fromkeys(
    ("work", "num_splits", "split_start", "part_out", "part_lse")
) | {"DEPENDENT": False}
