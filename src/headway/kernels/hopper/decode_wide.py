"""The decode kernel's consumers where a latent cache meets more than a few packed rows.

Packed rows are the 64 rows of wgmma's tiles. The first consumer makes scores and probabilities, hands them
to the second through shared memory, and both multiply them by half of the columns of values.
"""

from __future__ import annotations

from headway.kernels._triton import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper.decode_consumer import (
    TILE_ROWS,
    clear_outside,
    latent_piece,
    load_queries,
    load_sinks,
    merge_unit,
    opaque,
    store_lse,
    store_out,
)
from headway.kernels.hopper.decode_load import k_tile, next_unit, v_tile
from headway.kernels.hopper.decode_merge import is_last, leave_part
from headway.kernels.hopper.decode_plan import (
    BATCH,
    LEFT,
    UNIT,
    WIDTH,
    WITHIN,
    cost_of,
    load_span,
    take_of,
)
from headway.kernels.hopper.masks import mask_scores, row_limits
from headway.kernels.hopper.softmax import LAG, LOG2E, finish, soft_cap


@gluon.jit
def _softmax_block(scores, row_max, row_sum, scale_log2):
    """One block of scores: (probabilities, row_max, row_sum, factor for what was accumulated before).

    ``row_max`` is in units of log2 and may lag the true one by LAG; -inf: the row has seen nothing.
    """
    block_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    row_max_new = gl.where(block_max - row_max > LAG, block_max, row_max)
    shift = gl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    factor = gl.exp2(row_max - shift)
    probabilities = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 1))
    return probabilities, row_max_new, row_sum * factor + gl.sum(probabilities, 1), factor


@gluon.jit
def _values(buffers, stage, half, cfg: gl.constexpr):
    """A consumer's columns of a stage's values."""
    return v_tile(buffers, stage, cfg).slice(half * cfg.out_width, cfg.out_width, dim=1)


@gluon.jit
def _lead_block(
    acc, row_max, row_sum, lo, hi, scale, start, step, turn, buffers, span, call, cfg: gl.constexpr
):
    """Take one block in: scores, probabilities for both consumers, products with the first columns."""
    stage = step % cfg.stages
    scores = gl.full([cfg.columns, cfg.block_n], 0.0, gl.float32, cfg.wide_scores)
    zero = opaque(0, step)
    for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
        keys = latent_piece(stage, piece, step, buffers, cfg).permute((1, 0))
        q = buffers.latent.index(zero).slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1)
        scores = warpgroup_mma(q, keys, scores, use_acc=piece > 0, is_async=True)
    rope = k_tile(buffers, stage, 0, cfg).permute((1, 0))
    scores = warpgroup_mma(buffers.q.index(zero), rope, scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if not cfg.gathered:
        if (start < span.lo) | (start + cfg.block_n > span.hi):
            clear_outside(v_tile(buffers, stage, cfg), start, span.lo, span.hi, cfg)
    scale_log2 = scale * LOG2E
    if cfg.has_soft_cap:
        scores = soft_cap(scores, scale, call.softcap)
        scale_log2 = LOG2E
    if (start < span.full_lo) | (start + cfg.block_n > span.full_hi):
        scores = mask_scores(scores, lo, hi, start, gl.constexpr(cfg.left_limit))
    p, row_max, row_sum, factor = _softmax_block(scores, row_max, row_sum, scale_log2)
    p = p.to(cfg.dtype)
    mbarrier.wait(buffers.taken, (turn & 1) ^ 1)
    buffers.p.index(0).store(p)
    buffers.row_numbers.index(0).store(factor)
    fence_async_shared()
    mbarrier.arrive(buffers.handed, count=1)
    factor = gl.convert_layout(factor, cfg.wide_out_row, assert_trivial=True)
    acc *= gl.expand_dims(factor, 1)
    p = gl.convert_layout(p, cfg.wide_operand, assert_trivial=True)
    acc = warpgroup_mma(p, _values(buffers, stage, 0, cfg), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.empty.index(stage), count=1)
    return acc, row_max, row_sum


@gluon.jit
def _follow_block(acc, step, turn, buffers, cfg: gl.constexpr):
    """Take one block in: products of the first consumer's probabilities with the other columns."""
    stage = step % cfg.stages
    mbarrier.wait(buffers.handed, turn & 1)
    acc *= gl.expand_dims(buffers.row_numbers.index(0).load(cfg.wide_out_row), 1)
    # Values came through the copy engine, or were made visible to it before they were handed over.
    acc = warpgroup_mma(buffers.p.index(0), _values(buffers, stage, 1, cfg), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.taken, count=1)
    mbarrier.arrive(buffers.empty.index(stage), count=1)
    return acc


@gluon.jit
def _share_sums(row_max, row_sum, turn, buffers, half: gl.constexpr, cfg: gl.constexpr):
    """Row maxima and sums of a unit, in both consumers: (row_max, row_sum) in rows of the output."""
    if half == 0:
        mbarrier.wait(buffers.taken, (turn & 1) ^ 1)
        buffers.row_numbers.index(0).store(row_max)
        buffers.row_numbers.index(1).store(row_sum)
        mbarrier.arrive(buffers.handed, count=1)
        row_max = gl.convert_layout(row_max, cfg.wide_out_row, assert_trivial=True)
        row_sum = gl.convert_layout(row_sum, cfg.wide_out_row, assert_trivial=True)
    else:
        mbarrier.wait(buffers.handed, turn & 1)
        row_max = buffers.row_numbers.index(0).load(cfg.wide_out_row)
        row_sum = buffers.row_numbers.index(1).load(cfg.wide_out_row)
        mbarrier.arrive(buffers.taken, count=1)
    return row_max, row_sum


@gluon.jit
def consume_wide(tensors, buffers, parts, call, half: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup: the first consumer or the second, unit after unit."""
    q_ptr, qv_ptr, out_ptr, lse_ptr, sinks, _descales, spans, works, share_ptr = tensors
    columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, cfg.wide_output))
    columns += half * cfg.out_width
    worker = gl.program_id(0) // cfg.m_tiles
    tile = gl.program_id(0) % cfg.m_tiles
    record = works + worker * WIDTH
    span = load_span(record)
    batch = gl.load(record + BATCH)
    unit = gl.load(record + UNIT)
    within = gl.load(record + WITHIN)
    left = gl.load(record + LEFT)
    share = gl.load(share_ptr)
    line = worker * share
    step = 0
    turn = 0  # of handing over: one per block, and one per unit
    tile_row = tile * TILE_ROWS
    rows = tile_row + gl.arange(0, cfg.columns, layout=cfg.wide_out_row)
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        acc = gl.full([cfg.columns, cfg.out_width], 0.0, gl.float32, cfg.wide_output)
        row_max = gl.full([cfg.columns], float("-inf"), gl.float32, cfg.wide_row)
        row_sum = gl.full([cfg.columns], 0.0, gl.float32, cfg.wide_row)
        start = (span.first_block + first) * cfg.block_n
        if half == 0:
            load_queries(q_ptr, qv_ptr, buffers, span, batch, unit, tile_row, 0, call, cfg)
            score_rows = tile_row + gl.arange(0, cfg.columns, layout=cfg.wide_row)
            lo, hi = row_limits(span.position + score_rows // cfg.group, span.keys, call, cfg)
            lo = gl.maximum(lo, 0) + span.pad
            hi += span.pad
            for _ in range(count):
                acc, row_max, row_sum = _lead_block(
                    acc,
                    row_max,
                    row_sum,
                    lo,
                    hi,
                    call.scale,
                    start,
                    step,
                    turn,
                    buffers,
                    span,
                    call,
                    cfg,
                )
                start += cfg.block_n
                step += 1
                turn += 1
        else:
            for _ in range(count):
                acc = _follow_block(acc, step, turn, buffers, cfg)
                step += 1
                turn += 1
        row_max, row_sum = _share_sums(row_max, row_sum, turn, buffers, half, cfg)
        turn += 1
        if count == span.blocks:
            factor, lse = finish(row_max, row_sum, load_sinks(sinks, unit, rows, call, cfg))
            out = acc * gl.expand_dims(factor, 1)
            store_out(out_ptr, out, rows, columns, span, batch, unit, call, cfg)
            store_lse(lse_ptr, lse, rows, span, batch, unit, call, cfg)
        elif count > 0:
            leave_part(
                parts.out,
                parts.sums,
                (2 * worker + gl.where(first == 0, 1, 0)) * cfg.m_tiles + tile,
                acc,
                row_max,
                row_sum,
                rows - tile_row,
                rows - tile_row,
                columns,
                gl.minimum(call.num_rows - tile_row, TILE_ROWS),
                cfg,
            )
            blocks_line = line - within + cost_of(span.blocks, cfg)
            first_worker = blocks_line // share
            workers = (blocks_line + span.blocks - 1) // share - first_worker + 1
            arrivals = (batch * call.units + unit) * cfg.m_tiles + tile
            if is_last(parts.arrivals + arrivals * cfg.consumers + half, workers):
                merge_unit(
                    out_ptr,
                    lse_ptr,
                    sinks,
                    parts,
                    (2 * first_worker + 1) * cfg.m_tiles + tile,
                    workers,
                    span,
                    batch,
                    unit,
                    tile_row,
                    0,
                    TILE_ROWS,
                    half * cfg.out_width,
                    1.0,
                    call,
                    cfg,
                )
        left -= take
        line += take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, call.units, left)
