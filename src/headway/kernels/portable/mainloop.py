"""The loop over keys that every attention kernel here shares: scores, masks, online softmax, P · V.

Scores are kept in base 2 (one multiplication less per element); row maxima and sums leave in that base.

PAIRED values are float8 that is read as uint16, two columns at once, and multiplied in two products, of the
even columns and of the odd ones: shared memory gives tensor cores 16-bit elements across rows, but single
bytes one by one. Latent keys, whose values they are, lie the same way, and so do queries then.
"""

from __future__ import annotations

from headway.kernels._triton import jit, tl
from headway.kernels.portable.numeric import (
    LN2,
    LOG2E,
    cast,
    dot,
    tanh,
    widen,
    widen_even,
    widen_odd,
)


@jit
def load_rows(
    ptr, offsets, inside, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """(rows, BLOCK_WIDTH) from rows at ``offsets``; zero where not inside and right of WIDTH."""
    ZERO: tl.constexpr = 0 if ptr.dtype.element_ty.is_int() else 0.0
    cols = tl.arange(0, BLOCK_WIDTH)
    ptrs = ptr + offsets[:, None] + cols[None, :]
    if MASKED:
        mask = inside[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (cols < WIDTH)[None, :]
        return tl.load(ptrs, mask=mask, other=ZERO)
    elif WIDTH != BLOCK_WIDTH:
        return tl.load(ptrs, mask=(cols < WIDTH)[None, :], other=ZERO)
    else:
        return tl.load(ptrs)


@jit
def page_numbers(
    table,
    first,
    start,
    lo,
    hi,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Pages of keys start.. of a sequence: one number, or one per key; 0 where keys are not paged.

    ALIGNED says that a tile of BLOCK_N keys never crosses a page. Entries of keys outside [lo, hi) are
    not read: they may hold anything, or lie behind the table.
    """
    if PAGE_SIZE == 0:
        return 0
    elif ALIGNED:
        return tl.load(table + start // PAGE_SIZE, mask=start < hi, other=0).to(NUMBER)
    else:
        n = start + tl.arange(0, BLOCK_N)
        inside = n < hi
        if LEFT_EDGE:
            inside = inside & (n >= lo)
        return tl.load(table + (first + n) // PAGE_SIZE, mask=inside, other=0).to(NUMBER)


@jit
def row_places(first, start, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of keys start.. within their page, or within the sequence: (one for the tile, one per key)."""
    n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        return (first + start).to(tl.int64), n
    elif ALIGNED:
        return tl.cast(start % PAGE_SIZE, tl.int64), n
    else:
        return tl.cast(0, tl.int64), (first + start + n) % PAGE_SIZE


@jit
def load_keys(
    ptr,
    page,
    row,
    lane,
    inside,
    stride_page,
    stride_row,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    PAGE_PER_KEY: tl.constexpr,
):
    """Rows ``row + lane`` of pages, as :func:`load_rows` gives them.

    What all rows of a tile share goes into the pointer, so that a thread holds one offset of 32 bits for
    each of its rows, and the same ones for every tile.
    """
    if PAGE_PER_KEY:
        offsets = page.to(tl.int64) * stride_page + lane * stride_row
        return load_rows(ptr, offsets, inside, WIDTH, BLOCK_WIDTH, MASKED)
    else:
        base = ptr + (tl.cast(page, tl.int64) * stride_page + row * stride_row)
        return load_rows(base, lane * stride_row, inside, WIDTH, BLOCK_WIDTH, MASKED)


@jit
def attend_tile(
    acc,
    acc_odd,
    row_sum,
    row_max,
    q1,
    q1_odd,
    q2,
    pos,
    head,
    b,
    start,
    page,
    lo,
    hi,
    k1_ptr,
    k2_ptr,
    v_ptr,
    stride_k1_page,
    stride_k1_row,
    stride_k2_page,
    stride_k2_row,
    stride_v_page,
    stride_v_row,
    first,
    window_left,
    window_right,
    chunk,
    scale,
    scale1,
    scale2,
    softcap,
    aux,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORES_FIRST: tl.constexpr,
    TWO_SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
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
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
):
    """One tile of keys: returns (acc, acc_odd, row_sum, row_max) with it taken in."""
    n = start + tl.arange(0, BLOCK_N)
    inside = n < hi
    if LEFT_EDGE:
        inside = inside & (n >= lo)
    row, lane = row_places(first, start, PAGE_SIZE, BLOCK_N, ALIGNED)
    PAGE_PER_KEY: tl.constexpr = PAGE_SIZE > 0 and not ALIGNED
    VALUE_PACK: tl.constexpr = 2 if PAIRED else 1
    KEY_PACK: tl.constexpr = VALUE_PACK if V_IS_K else 1
    k1 = load_keys(
        k1_ptr,
        page,
        row,
        lane,
        inside,
        stride_k1_page,
        stride_k1_row,
        D1 // KEY_PACK,
        BLOCK_D1 // KEY_PACK,
        MASKED,
        PAGE_PER_KEY,
    )
    scores = tl.zeros([q1.shape[0], BLOCK_N], dtype=tl.float32)
    if PAIRED and V_IS_K:
        scores = dot(q1, tl.trans(widen_even(k1)), scores)
        scores = dot(q1_odd, tl.trans(widen_odd(k1)), scores)
    else:
        k1 = widen(k1, q1.dtype)
        scores = dot(q1, tl.trans(k1), scores)
    if D2 > 0:
        k2 = load_keys(
            k2_ptr,
            page,
            row,
            lane,
            inside,
            stride_k2_page,
            stride_k2_row,
            D2,
            BLOCK_D2,
            MASKED,
            PAGE_PER_KEY,
        )
        k2 = tl.trans(widen(k2, q2.dtype))
        if TWO_SCALES:
            scores2 = tl.zeros([q1.shape[0], BLOCK_N], dtype=tl.float32)
            scores = scores * scale1 + dot(q2, k2, scores2) * scale2
        else:
            scores = dot(q2, k2, scores)
    if V_IS_K:
        v = k1
    else:
        v = load_keys(
            v_ptr,
            page,
            row,
            lane,
            inside,
            stride_v_page,
            stride_v_row,
            DV // VALUE_PACK,
            BLOCK_DV // VALUE_PACK,
            MASKED,
            PAGE_PER_KEY,
        )
        if not PAIRED:
            v = widen(v, tl.float16)

    score_scale = scale
    if ROW_SCALES:
        score_scale = scale[:, None]
    if SCORES_FIRST:
        scores = scores * score_scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        # The hook: score_mod(score, b, h, q_idx, kv_idx, aux) -> score, and below
        # mask_mod(b, h, q_idx, kv_idx, aux) -> bool, are jit functions as headway.kernels.mods
        # makes them. score is float32 in natural units; b a scalar, h and q_idx (rows, 1), kv_idx
        # (1, BLOCK_N), all int32.
        if score_mod is not None:
            scores = score_mod(scores, b, head[:, None], pos[:, None], n[None, :], aux)
        scores = scores * LOG2E
    if MASKED:
        visible = inside[None, :]
        if HAS_LEFT and LEFT_EDGE:
            visible = visible & (n[None, :] >= pos[:, None] - window_left)
        if HAS_RIGHT:
            visible = visible & (n[None, :] <= pos[:, None] + window_right)
        if HAS_CHUNK:
            chunk_lo = tl.maximum(pos, 0) // chunk * chunk
            if LEFT_EDGE:
                visible = visible & (n[None, :] >= chunk_lo[:, None])
            visible = visible & (n[None, :] < chunk_lo[:, None] + chunk) & (pos >= 0)[:, None]
        if mask_mod is not None:
            visible = visible & mask_mod(b, head[:, None], pos[:, None], n[None, :], aux)
        scores = tl.where(visible, scores, float("-inf"))

    if SCORES_FIRST:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    shift = new_max
    if MASKED or score_mod is not None:  # rows may have seen nothing yet
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if SCORES_FIRST:
        p = tl.exp2(scores - shift[:, None])
    else:
        p = tl.exp2(scores * score_scale - shift[:, None])
    alpha = tl.exp2(row_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if PAIRED:
        p = cast(p, tl.float16)
        acc = dot(p, widen_even(v), acc)
        acc_odd = dot(p, widen_odd(v), acc_odd * alpha[:, None])
    else:
        acc = dot(cast(p, v.dtype), v, acc)
    return acc, acc_odd, row_sum, new_max


@jit
def attend(
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
    k1_ptr,
    k2_ptr,
    v_ptr,
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
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORES_FIRST: tl.constexpr,
    TWO_SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
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
):
    """Attention of one tile of query rows to keys [begin, end), both multiples of BLOCK_N.

    Interior tiles, whose keys all rows see, run without masks: at most three loops, left edge,
    interior, right edge. Without HOIST what does not change from step to step is computed in each,
    which costs instructions and saves registers. Returns (acc, row_sum, row_max): unnormalised, base 2.
    """
    acc_odd = 0.0
    if PAIRED:
        acc = tl.zeros([BLOCK_M, BLOCK_DV // 2], dtype=tl.float32)
        acc_odd = acc
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    HAS_EDGE: tl.constexpr = HAS_LEFT or HAS_CHUNK
    # Pairs of latents take every register there is: half of one each is saved.
    PAGE_NUMBER: tl.constexpr = tl.int32 if PAIRED and V_IS_K else tl.int64
    interior_begin = begin
    if HAS_LEFT or HAS_CHUNK:
        interior_begin = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, begin), end)
    interior_end = tl.maximum(tl.minimum(full_hi // BLOCK_N * BLOCK_N, end), interior_begin)
    if mask_mod is not None:
        interior_begin = begin
        interior_end = begin
    for part in tl.static_range(3):
        if part == 0:
            part_begin = begin
            part_end = interior_begin
        elif part == 1:
            part_begin = interior_begin
            part_end = interior_end
        else:
            part_begin = interior_end
            part_end = end
        if part == 2 or (mask_mod is None and (part == 1 or HAS_LEFT or HAS_CHUNK)):
            # Page numbers are read one step ahead, so that no copy of keys waits for its own.
            page = page_numbers(
                table,
                first,
                part_begin,
                lo,
                hi,
                PAGE_SIZE,
                BLOCK_N,
                ALIGNED,
                HAS_EDGE and (part == 0 or mask_mod is not None),
                PAGE_NUMBER,
            )
            # Edges are short: buffers beyond the second would cost them registers and gain nothing.
            for start in tl.range(
                part_begin,
                part_end,
                BLOCK_N,
                num_stages=None if part == 1 or mask_mod is not None else EDGE_STAGES,
                disable_licm=not HOIST,
            ):
                following = start + BLOCK_N
                page_after = page_numbers(
                    table,
                    first,
                    following,
                    lo,
                    hi,
                    PAGE_SIZE,
                    BLOCK_N,
                    ALIGNED,
                    HAS_EDGE and (part == 0 or mask_mod is not None),
                    PAGE_NUMBER,
                )
                acc, acc_odd, row_sum, row_max = attend_tile(
                    acc,
                    acc_odd,
                    row_sum,
                    row_max,
                    q1,
                    q1_odd,
                    q2,
                    pos,
                    head,
                    b,
                    start,
                    page,
                    lo,
                    hi,
                    k1_ptr,
                    k2_ptr,
                    v_ptr,
                    stride_k1_page,
                    stride_k1_row,
                    stride_k2_page,
                    stride_k2_row,
                    stride_v_page,
                    stride_v_row,
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
                    BLOCK_N,
                    part != 1,
                    HAS_EDGE and (part == 0 or mask_mod is not None),
                )
                page = page_after
    if PAIRED:
        acc = tl.interleave(acc, acc_odd)
    return acc, row_sum, row_max


@jit
def finish(acc, row_sum, row_max, sink):
    """Normalised output and its natural-log LSE. ``sink`` (natural units, per row) or None."""
    if sink is not None:
        sink2 = sink * LOG2E
        top = tl.maximum(row_max, sink2)
        shift = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.exp2(sink2 - shift)
        acc = acc * alpha[:, None]
        row_max = top
    empty = row_sum == 0.0
    out = acc * tl.where(empty, 0.0, 1.0 / row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)
    return out, lse
