"""The decode kernel's consumers where a latent cache meets more than a few packed rows.

Packed rows are the 64 rows of wgmma's tiles. One warpgroup makes scores and probabilities and hands them on
through shared memory; two multiply them by half of the columns of values each, while the first is at the
next block's scores.
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
    load_scales,
    opaque,
)
from headway.kernels.hopper.decode_load import first_unit, k_tile, next_unit, v_tile
from headway.kernels.hopper.decode_merge import end_unit
from headway.kernels.hopper.decode_plan import (
    take_of,
)
from headway.kernels.hopper.decode_rows import load_descale
from headway.kernels.hopper.masks import mask_scores, row_limits
from headway.kernels.hopper.softmax import (
    LOG2E,
    partial_sums,
    rescale,
    soft_cap,
    softmax_block,
)


@gluon.jit
def _values(buffers, stage, half, cfg: gl.constexpr):
    """A consumer's columns of a stage's values."""
    return v_tile(buffers, stage, cfg).slice(half * cfg.out_width, cfg.out_width, dim=1)


@gluon.jit
def _modify(
    scores,
    start,
    batch,
    heads,
    positions,
    span,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    cfg: gl.constexpr,
):
    """Scaled scores of a block, packed rows as rows, through the call's functions."""
    keys = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(0, cfg.wide_scores))
    keys = gl.expand_dims(keys + (start - span.pad), 0)
    q_idx = gl.expand_dims(positions, 1)
    heads = gl.expand_dims(heads, 1)
    if score_mod is not None:
        scores = score_mod(scores, batch, heads, q_idx, keys, aux)
    if mask_mod is not None:
        visible = mask_mod(batch, heads, q_idx, keys, aux)
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def _scores(step, buffers, part_scales, cfg: gl.constexpr):
    """Scores of a block, by pieces of latents as they come; ``part_scales``: of keys, of latents."""
    stage = step % cfg.stages
    scores = gl.full([cfg.columns, cfg.block_n], 0.0, gl.float32, cfg.wide_scores)
    zero = opaque(0, step)
    for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
        keys = latent_piece(stage, piece, step, buffers, cfg).permute((1, 0))
        q = buffers.latent.index(zero).slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1)
        scores = warpgroup_mma(q, keys, scores, use_acc=piece > 0, is_async=True)
    rope = k_tile(buffers, stage, 0, cfg).permute((1, 0))
    if cfg.parted:
        of_keys, of_latents = part_scales
        latent_scores = warpgroup_mma_wait(0, deps=(scores,)) * of_latents
        none = gl.full([cfg.columns, cfg.block_n], 0.0, gl.float32, cfg.wide_scores)
        scores = warpgroup_mma(buffers.q.index(zero), rope, none, is_async=True)
        return warpgroup_mma_wait(0, deps=(scores,)) * of_keys + latent_scores
    else:
        scores = warpgroup_mma(buffers.q.index(zero), rope, scores, is_async=True)
        return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _hand_block(
    scores,
    row_max,
    row_sum,
    block_rows,
    scale,
    start,
    step,
    turn,
    buffers,
    span,
    batch,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    cfg: gl.constexpr,
):
    """Hand over one block's probabilities, and what was accumulated before is to be multiplied by."""
    lo, hi, heads, positions = block_rows
    if not (cfg.gathered or cfg.widened):
        if (start < span.lo) | (start + cfg.block_n > span.hi):
            values = v_tile(buffers, step % cfg.stages, cfg)
            clear_outside(values, start, span.lo, span.hi, cfg)
    scale_log2 = scale * LOG2E
    if cfg.has_soft_cap:
        scores = soft_cap(scores, scale, call.softcap)
        scale_log2 = LOG2E
    elif score_mod is not None:
        scores *= scale
        scale_log2 = LOG2E
    if score_mod is not None or mask_mod is not None:
        scores = _modify(
            scores, start, batch, heads, positions, span, score_mod, mask_mod, aux, cfg
        )
    if (start < span.full_lo) | (start + cfg.block_n > span.full_hi):
        scores = mask_scores(scores, lo, hi, start, gl.constexpr(cfg.left_limit))
    p, row_max, row_sum, factor = softmax_block(scores, row_max, row_sum, scale_log2, True)
    mbarrier.wait(buffers.taken, (turn & 1) ^ 1)
    buffers.p.index(0).store(p.to(cfg.dtype))
    buffers.row_numbers.index(0).store(factor)
    fence_async_shared()
    mbarrier.arrive(buffers.handed, count=1)
    return row_max, row_sum


@gluon.jit
def _add_block(acc, step, turn, buffers, half: gl.constexpr, cfg: gl.constexpr):
    """Take one block in: products of handed probabilities with a consumer's columns."""
    stage = step % cfg.stages
    mbarrier.wait(buffers.handed, turn & 1)
    acc = rescale(acc, buffers.row_numbers.index(0).load(cfg.wide_out_row))
    # Values came through the copy engine, or were made visible to it before they were handed over.
    acc = warpgroup_mma(buffers.p.index(0), _values(buffers, stage, half, cfg), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.taken, count=1)
    mbarrier.arrive(buffers.empty.index(stage), count=1)
    return acc


@gluon.jit
def _hand_sums(row_max, row_sum, turn, buffers):
    """Hand over row maxima and sums of a unit."""
    mbarrier.wait(buffers.taken, (turn & 1) ^ 1)
    buffers.row_numbers.index(0).store(row_max)
    buffers.row_numbers.index(1).store(row_sum)
    mbarrier.arrive(buffers.handed, count=1)


@gluon.jit
def _take_sums(turn, buffers, cfg: gl.constexpr):
    """(row_max, row_sum) of a unit, in rows of the output."""
    mbarrier.wait(buffers.handed, turn & 1)
    row_max = buffers.row_numbers.index(0).load(cfg.wide_out_row)
    row_sum = buffers.row_numbers.index(1).load(cfg.wide_out_row)
    mbarrier.arrive(buffers.taken, count=1)
    return row_max, row_sum


@gluon.jit
def score_wide(
    tensors,
    buffers,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    cfg: gl.constexpr,
):
    """One warpgroup: scores and probabilities, unit after unit."""
    q_ptr, qv_ptr, _out, _lse, _sinks, descales, spans, works, _share = tensors
    tile = gl.program_id(0) % cfg.m_tiles
    unit, batch, span, within, left = first_unit(works, cfg)
    step = 0
    turn = 0  # of handing over: one per block, and one per unit
    rows = tile * TILE_ROWS + gl.arange(0, cfg.columns, layout=cfg.wide_row)
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        row_max = gl.full([cfg.columns], float("-inf"), gl.float32, cfg.wide_row)
        none = gl.full([cfg.columns, cfg.block_n], 0.0, gl.float32, cfg.wide_scores)
        row_sum = partial_sums(none)
        start = (span.first_block + first) * cfg.block_n
        scale = call.scale * load_queries(
            q_ptr, qv_ptr, buffers, span, batch, unit, tile * TILE_ROWS, 0, call, cfg
        )
        of_scores, of_keys, of_latents, _ = load_scales(descales, batch, unit, cfg)
        scale *= of_scores
        heads = unit * cfg.group + rows % cfg.group
        positions = span.position + rows // cfg.group
        lo, hi = row_limits(positions, span.keys, call, cfg)
        lo = gl.maximum(lo, 0) + span.pad
        hi += span.pad
        block_rows = lo, hi, heads, positions
        for _ in range(count):
            scores = _scores(step, buffers, (of_keys, of_latents), cfg)
            row_max, row_sum = _hand_block(
                scores, row_max, row_sum, block_rows, scale, start, step, turn, buffers, span,
                batch, call, score_mod, mask_mod, aux, cfg,
            )  # fmt: skip
            start += cfg.block_n
            step += 1
            turn += 1
        row_sum = gl.convert_layout(gl.sum(row_sum, 1), cfg.wide_row)
        _hand_sums(row_max, row_sum, turn, buffers)
        turn += 1
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, call.units, left)


@gluon.jit
def consume_wide(tensors, buffers, parts, call, half: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup: half of the columns of the output, unit after unit."""
    descales, spans, works, share_ptr = tensors[5:]
    _q_descale, _k_descale, v_descale = descales
    columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, cfg.wide_output))
    columns += half * cfg.out_width
    worker = gl.program_id(0) // cfg.m_tiles
    tile = gl.program_id(0) % cfg.m_tiles
    unit, batch, span, within, left = first_unit(works, cfg)
    share = gl.load(share_ptr)
    line = worker * share
    step = 0
    turn = 0  # of handing over: one per block, and one per unit
    rows = tile * TILE_ROWS + gl.arange(0, cfg.columns, layout=cfg.wide_out_row)
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        acc = gl.full([cfg.columns, cfg.out_width], 0.0, gl.float32, cfg.wide_output)
        for _ in range(count):
            acc = _add_block(acc, step, turn, buffers, half, cfg)
            step += 1
            turn += 1
        row_max, row_sum = _take_sums(turn, buffers, cfg)
        turn += 1
        end_unit(
            tensors,
            parts,
            acc,
            row_max,
            row_sum,
            rows,
            columns,
            load_descale(v_descale, batch, unit),
            span,
            batch,
            unit,
            first,
            count,
            line - within,
            share,
            call,
            half,
            cfg,
        )
        left -= take
        line += take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, call.units, left)
