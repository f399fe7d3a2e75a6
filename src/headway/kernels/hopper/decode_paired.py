"""The decode kernel where a latent cache meets many packed rows, and tensor cores are the limit.

Packed rows are the 64 rows of wgmma's tiles. Two warpgroups hold half of the output's columns each; of
every block of keys, the first makes scores and probabilities of one half and the second those of the other.
Each multiplies both by its columns of values, with maxima that both know: while one is at its softmax,
products of the other keep the tensor cores busy. Half a block is a stage, whose columns are asked for again
as soon as whoever needed them last is done.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import (
    aggregate,
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
    fetch_piece,
    fetch_queries,
    opaque,
)
from headway.kernels.hopper.decode_load import first_unit, load_boxes, next_unit, pages_of_block
from headway.kernels.hopper.decode_merge import end_unit
from headway.kernels.hopper.decode_plan import (
    take_of,
)
from headway.kernels.hopper.masks import mask_scores, row_limits
from headway.kernels.hopper.softmax import (
    LOG2E,
    partial_sums,
    rescale,
    soft_cap,
    softmax_block,
)

#: Pieces of columns in which half of the values' columns arrive.
SIDE_PIECES: gl.constexpr = gl.constexpr(2)
#: Barriers of a stage that say what has come: rope, and pieces of latents.
FULLS: gl.constexpr = gl.constexpr(5)
#: Barriers of a stage that say what may be overwritten: rope, and each half of the columns of latents.
EMPTIES: gl.constexpr = gl.constexpr(3)
#: Pieces of latents that the second warpgroup multiplies by queries before it waits for probabilities of
#: the first, which are about as long in the making.
EARLY: gl.constexpr = gl.constexpr(3)


@aggregate
class Paired:
    """Shared memory of a worker. A stage holds the keys of one warpgroup."""

    q: gl.shared_memory_descriptor  # (1, 64, v_width), queries of latents
    #: (2, 64, keys), probabilities; the second holds rope's queries first
    p: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor  # (2, 1, 1, keys, k_width)
    v: gl.shared_memory_descriptor  # (2, 1, 1, keys, v_width)
    full: gl.shared_memory_descriptor  # (2 * FULLS, 1)
    empty: gl.shared_memory_descriptor  # (2 * EMPTIES, 1)
    handed: gl.shared_memory_descriptor  # (2, 1): a warpgroup's probabilities and maxima are there
    met: gl.shared_memory_descriptor  # (1,): both warpgroups came by
    row_numbers: gl.shared_memory_descriptor  # (4, 64) float32: maxima of each, sums of each

    @gluon.constexpr_function
    def __init__(self, q, p, k, v, full, empty, handed, met, row_numbers):
        self.q = q
        self.p = p
        self.k = k
        self.v = v
        self.full = full
        self.empty = empty
        self.handed = handed
        self.met = met
        self.row_numbers = row_numbers


@gluon.jit
def allocate_paired(cfg: gl.constexpr):
    """Shared memory, with its barriers set up."""
    q = gl.allocate_shared_memory(cfg.dtype, [1, TILE_ROWS, cfg.v_width], cfg.latent_smem)
    p = gl.allocate_shared_memory(cfg.dtype, [2, TILE_ROWS, cfg.stage_keys], cfg.p_smem)
    k_shape: gl.constexpr = [2, 1, 1, cfg.stage_keys, cfg.k_width]
    k = gl.allocate_shared_memory(cfg.kv_dtype, k_shape, cfg.k_boxes)
    v_shape: gl.constexpr = [2, 1, 1, cfg.stage_keys, cfg.v_width]
    v = gl.allocate_shared_memory(cfg.kv_dtype, v_shape, cfg.v_boxes)
    numbers = gl.allocate_shared_memory(gl.float32, [4, TILE_ROWS], cfg.row_numbers)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [2 * FULLS, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [2 * EMPTIES, 1], barrier)
    handed = gl.allocate_shared_memory(gl.int64, [3, 1], barrier)
    met = handed.index(2)
    for i in gl.static_range(2 * FULLS):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(2 * EMPTIES):
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(handed.index(i), count=1)
    mbarrier.init(met, count=2)
    fence_async_shared()
    return Paired(q, p, k, v, full, empty, handed, met, numbers)


@gluon.jit
def produce_paired(k_desc, v_desc, num_pages, work, cfg: gl.constexpr):
    """One warp: this worker's blocks in order, and of each what is freed first."""
    BOXES: gl.constexpr = cfg.boxes
    KEYS: gl.constexpr = cfg.stage_keys
    buffers, page_table, spans, works, units, stride_table = work
    unit, batch, span, within, left = first_unit(works, cfg)
    step = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        start = (span.first_block + first) * cfg.block_n
        table = page_table
        if cfg.page_size > 0:
            table = page_table + span.cache_row.to(gl.int64) * stride_table
        here = pages_of_block(span, table, start, num_pages, 0, BOXES, cfg)
        there = pages_of_block(span, table, start + KEYS, num_pages, 0, BOXES, cfg)
        for _ in range(count):
            after = start + cfg.block_n
            here_ahead = pages_of_block(span, table, after, num_pages, 0, BOXES, cfg)
            there_ahead = pages_of_block(span, table, after + KEYS, num_pages, 0, BOXES, cfg)
            # Queries of rope are in registers: these products are asked for while others still run.
            _load_rope(k_desc, here, unit, start, step, 0, buffers, cfg)
            _load_rope(k_desc, there, unit, start + KEYS, step, 1, buffers, cfg)
            _load_side(v_desc, here, unit, start, step, 0, 0, buffers, cfg)
            _load_side(v_desc, here, unit, start, step, 0, 1, buffers, cfg)
            _load_side(v_desc, there, unit, start + KEYS, step, 1, 1, buffers, cfg)
            _load_side(v_desc, there, unit, start + KEYS, step, 1, 0, buffers, cfg)
            here = here_ahead
            there = there_ahead
            start = after
            step += 1
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, units, left)


@gluon.jit
def _load_rope(
    k_desc, pages, unit, start, step, stage: gl.constexpr, buffers, cfg: gl.constexpr
):  # fmt: skip
    full = buffers.full.index(stage * FULLS)
    mbarrier.wait(buffers.empty.index(stage * EMPTIES), (step & 1) ^ 1)
    mbarrier.expect(full, cfg.k_bytes)
    load_boxes(k_desc, pages, unit, start, 0, full, buffers.k.index(stage), 0, cfg)


@gluon.jit
def _load_side(
    v_desc, pages, unit, start, step, stage: gl.constexpr, side: gl.constexpr, buffers,
    cfg: gl.constexpr,
):  # fmt: skip
    """Half of the columns of a stage's latents."""
    mbarrier.wait(buffers.empty.index(stage * EMPTIES + 1 + side), (step & 1) ^ 1)
    for i in gl.static_range(SIDE_PIECES):
        column = (side * SIDE_PIECES + i) * cfg.v_box_width
        full = buffers.full.index(stage * FULLS + 1 + side * SIDE_PIECES + i)
        mbarrier.expect(full, cfg.v_piece_bytes)
        tile = buffers.v.index(stage).slice(
            (side * SIDE_PIECES + i) * cfg.v_box_width, cfg.v_box_width, dim=3
        )
        load_boxes(v_desc, pages, unit, start, column, full, tile, 0, cfg)


@gluon.jit
def _latents(stage, buffers, cfg: gl.constexpr):
    """A stage's (keys, v_width) latents."""
    return buffers.v.index(stage)._reinterpret(
        cfg.kv_dtype, [cfg.stage_keys, cfg.v_width], cfg.v_stage
    )


@gluon.jit
def _values(stage: gl.constexpr, half: gl.constexpr, step, buffers, cfg: gl.constexpr):
    """A warpgroup's columns of a stage's values."""
    latents = _latents(opaque(stage, step), buffers, cfg)
    return latents.slice(half * cfg.out_width, cfg.out_width, dim=1)


@gluon.jit
def _meet(buffers, meeting):
    """Wait until both warpgroups are here; ``meeting`` counts how often they were."""
    mbarrier.arrive(buffers.met, count=1)
    mbarrier.wait(buffers.met, meeting & 1)
    return meeting + 1


@gluon.jit
def _share_queries(
    q_ptr, qv_ptr, span, batch, unit, tile_row, meeting, half: gl.constexpr, buffers, call,
    cfg: gl.constexpr,
):  # fmt: skip
    """A unit's queries: those of latents into shared memory, half the columns by each warpgroup, and those
    of rope as operand in registers. Returns (the latter, meeting)."""
    strides = call.stride_qv_batch, call.stride_qv_row, call.stride_qv_head
    column: gl.constexpr = half * cfg.out_width
    queries = fetch_queries(
        qv_ptr, strides, span, batch, unit, tile_row, column, gl.constexpr(cfg.out_width),
        gl.constexpr(cfg.head_dim_v), gl.constexpr(cfg.half_rows), call, cfg,
    )  # fmt: skip
    meeting = _meet(buffers, meeting)  # nobody needs what is overwritten
    buffers.q.index(0).slice(column, cfg.out_width, dim=1).store(queries)
    if half == 0:
        # Probabilities come here only after the other warpgroup was handed some that these queries made.
        buffers.p.index(1).store(fetch_piece(q_ptr, span, batch, unit, tile_row, 0, call, cfg))
    fence_async_shared()
    meeting = _meet(buffers, meeting)
    return buffers.p.index(1).load(cfg.rope_operand), meeting


@gluon.jit
def _scores_of_rope(rope, step, half: gl.constexpr, buffers, cfg: gl.constexpr):
    """Begin scores of a warpgroup's keys."""
    mbarrier.wait(buffers.full.index(half * FULLS), step & 1)
    keys = buffers.k.index(opaque(half, step))
    keys = keys._reinterpret(cfg.kv_dtype, [cfg.stage_keys, cfg.k_width], cfg.k_stage)
    none = gl.full([TILE_ROWS, cfg.stage_keys], 0.0, gl.float32, cfg.wide_scores)
    return warpgroup_mma(rope, keys.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _add_scores(scores, step, half: gl.constexpr, turn: gl.constexpr, buffers, cfg: gl.constexpr):
    """Add products with the piece of latents that comes ``turn``-th."""
    piece: gl.constexpr = turn ^ (half * SIDE_PIECES)
    column: gl.constexpr = piece * cfg.v_box_width
    mbarrier.wait(buffers.full.index(half * FULLS + 1 + piece), step & 1)
    keys = _latents(opaque(half, step), buffers, cfg).slice(column, cfg.v_box_width, dim=1)
    q = buffers.q.index(opaque(0, step)).slice(column, cfg.v_box_width, dim=1)
    return warpgroup_mma(q, keys.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _first_scores(rope, step, half: gl.constexpr, buffers, cfg: gl.constexpr):
    """Scores of a unit's first block, as far as a warpgroup has them when its turn begins."""
    TURNS: gl.constexpr = 2 * SIDE_PIECES if half == 0 else EARLY
    scores = _scores_of_rope(rope, step, half, buffers, cfg)
    for turn in gl.static_range(TURNS):
        scores = _add_scores(scores, step, half, turn, buffers, cfg)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _next_scores(acc, rope, step, half: gl.constexpr, buffers, cfg: gl.constexpr):
    """The same of the next block, begun while the last products with values run: (scores, acc)."""
    TURNS: gl.constexpr = 2 * SIDE_PIECES if half == 0 else EARLY
    scores = _scores_of_rope(rope, step, half, buffers, cfg)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(buffers.empty.index(EMPTIES + 1 + half), count=1)
    for turn in gl.static_range(TURNS):
        scores = _add_scores(scores, step, half, turn, buffers, cfg)
    return warpgroup_mma_wait(0, deps=(scores,)), acc


@gluon.jit
def _last_products(acc, half: gl.constexpr, buffers):
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.empty.index(EMPTIES + 1 + half), count=1)
    return acc


@gluon.jit
def _modify(
    scores, start, span, batch, unit, rows, positions, score_mod: gl.constexpr,
    mask_mod: gl.constexpr, aux, cfg: gl.constexpr,
):  # fmt: skip
    """Scaled scores through the call's functions."""
    keys = gl.arange(0, cfg.stage_keys, layout=gl.SliceLayout(0, cfg.wide_scores))
    keys = gl.expand_dims(keys + (start - span.pad), 0)
    q_idx = gl.expand_dims(positions, 1)
    heads = gl.expand_dims(unit * cfg.group + rows % cfg.group, 1)
    if score_mod is not None:
        scores = score_mod(scores, batch, heads, q_idx, keys, aux)
    if mask_mod is not None:
        visible = mask_mod(batch, heads, q_idx, keys, aux)
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def _hand_over(
    scores, row_max, row_sum, start, place, half: gl.constexpr, buffers, call,
    score_mod: gl.constexpr, mask_mod: gl.constexpr, aux, cfg: gl.constexpr,
):  # fmt: skip
    """Softmax of a warpgroup's keys, for both: (probabilities as operand, row_max, row_sum, factor)."""
    span, batch, unit, tile_row = place
    mbarrier.arrive(buffers.empty.index(half * EMPTIES), count=1)
    if (start < span.lo) | (start + cfg.stage_keys > span.hi):
        clear_outside(_latents(half, buffers, cfg), start, span.lo, span.hi, cfg)
    scale_log2 = call.scale * LOG2E
    if cfg.has_soft_cap:
        scores = soft_cap(scores, call.scale, call.softcap)
        scale_log2 = LOG2E
    elif score_mod is not None:
        scores *= call.scale
        scale_log2 = LOG2E
    rows = tile_row + gl.arange(0, TILE_ROWS, layout=cfg.wide_row)
    positions = span.position + rows // cfg.group
    if score_mod is not None or mask_mod is not None:
        scores = _modify(
            scores, start, span, batch, unit, rows, positions, score_mod, mask_mod, aux, cfg
        )
    if (start < span.full_lo) | (start + cfg.stage_keys > span.full_hi):
        lo, hi = row_limits(positions, span.keys, call, cfg)
        lo = gl.maximum(lo, 0) + span.pad
        scores = mask_scores(scores, lo, hi + span.pad, start, gl.constexpr(cfg.left_limit))
    p, row_max, row_sum, factor = softmax_block(scores, row_max, row_sum, scale_log2, True)
    p = p.to(cfg.dtype)
    buffers.p.index(half).store(p)
    buffers.row_numbers.index(half).store(row_max)
    fence_async_shared()
    mbarrier.arrive(buffers.handed.index(half), count=1)
    return gl.convert_layout(p, cfg.wide_operand, assert_trivial=True), row_max, row_sum, factor


@gluon.jit
def _raised(row_max, new_max):
    """The factor of what was accumulated, where maxima rise from ``row_max`` to ``new_max``."""
    return gl.exp2(row_max - gl.where(new_max == float("-inf"), 0.0, new_max))


@gluon.jit
def _to_output(factor, cfg: gl.constexpr):
    return gl.convert_layout(factor, cfg.wide_out_row, assert_trivial=True)


@gluon.jit
def _scale_sums(row_sum, factor):
    spread: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    return row_sum * gl.expand_dims(gl.convert_layout(factor, spread, assert_trivial=True), 1)


@gluon.jit
def _first_turn(
    scores, acc, row_max, row_sum, rope, start, step, place, buffers, call,
    score_mod: gl.constexpr, mask_mod: gl.constexpr, aux, MORE: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """A block by the first warpgroup: (scores of the next if there are MORE, acc, row_max, row_sum)."""
    p, row_max, row_sum, factor = _hand_over(
        scores, row_max, row_sum, start, place, 0, buffers, call, score_mod, mask_mod, aux, cfg
    )
    acc = rescale(acc, _to_output(factor, cfg))
    acc = warpgroup_mma(p, _values(0, 0, step, buffers, cfg), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.empty.index(1), count=1)

    mbarrier.wait(buffers.handed.index(1), step & 1)
    new_max = buffers.row_numbers.index(1).load(cfg.wide_row)
    factor = _raised(row_max, new_max)
    acc = rescale(acc, _to_output(factor, cfg))
    p = buffers.p.index(opaque(1, step))
    acc = warpgroup_mma(p, _values(1, 0, step, buffers, cfg), acc, is_async=True)
    row_sum = _scale_sums(row_sum, factor)
    if MORE:
        scores, acc = _next_scores(acc, rope, step + 1, 0, buffers, cfg)
    else:
        acc = _last_products(acc, 0, buffers)
    return scores, acc, new_max, row_sum


@gluon.jit
def _second_turn(
    scores, acc, row_max, row_sum, rope, start, step, place, buffers, call,
    score_mod: gl.constexpr, mask_mod: gl.constexpr, aux, MORE: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """A block by the second warpgroup: the first half is multiplied during the softmax of the second."""
    mbarrier.wait(buffers.handed.index(0), step & 1)
    new_max = buffers.row_numbers.index(0).load(cfg.wide_row)
    factor = _raised(row_max, new_max)
    # While no product runs: the compiler would wait for all of them before it lets registers be scaled.
    acc = rescale(acc, _to_output(factor, cfg))
    row_sum = _scale_sums(row_sum, factor)
    for turn in gl.static_range(EARLY, 2 * SIDE_PIECES):
        scores = _add_scores(scores, step, 1, turn, buffers, cfg)
    p = buffers.p.index(opaque(0, step))
    acc = warpgroup_mma(p, _values(0, 1, step, buffers, cfg), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))

    p, row_max, row_sum, factor = _hand_over(
        scores, new_max, row_sum, start + cfg.stage_keys, place, 1, buffers, call, score_mod,
        mask_mod, aux, cfg,
    )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(buffers.empty.index(2), count=1)
    acc = rescale(acc, _to_output(factor, cfg))
    acc = warpgroup_mma(p, _values(1, 1, step, buffers, cfg), acc, is_async=True)
    if MORE:
        scores, acc = _next_scores(acc, rope, step + 1, 1, buffers, cfg)
    else:
        acc = _last_products(acc, 1, buffers)
    return scores, acc, row_max, row_sum


@gluon.jit
def _turn(
    scores, acc, row_max, row_sum, rope, start, step, place, buffers, call,
    score_mod: gl.constexpr, mask_mod: gl.constexpr, aux, half: gl.constexpr, MORE: gl.constexpr,
    cfg: gl.constexpr,
):  # fmt: skip
    if half == 0:
        return _first_turn(
            scores, acc, row_max, row_sum, rope, start, step, place, buffers, call, score_mod,
            mask_mod, aux, MORE, cfg,
        )  # fmt: skip
    else:
        return _second_turn(
            scores, acc, row_max, row_sum, rope, start, step, place, buffers, call, score_mod,
            mask_mod, aux, MORE, cfg,
        )  # fmt: skip


@gluon.jit
def _attend(
    rope, start, step, count, place, half: gl.constexpr, buffers, call, score_mod: gl.constexpr,
    mask_mod: gl.constexpr, aux, cfg: gl.constexpr,
):  # fmt: skip
    """``count`` blocks of a unit: (acc, row sums by thread). Maxima are both warpgroups'."""
    acc = gl.full([TILE_ROWS, cfg.out_width], 0.0, gl.float32, cfg.wide_output)
    row_max = gl.full([TILE_ROWS], float("-inf"), gl.float32, cfg.wide_row)
    none = gl.full([TILE_ROWS, cfg.stage_keys], 0.0, gl.float32, cfg.wide_scores)
    row_sum = partial_sums(none)
    if count > 0:
        scores = _first_scores(rope, step, half, buffers, cfg)
        for _ in range(count - 1):
            scores, acc, row_max, row_sum = _turn(
                scores, acc, row_max, row_sum, rope, start, step, place, buffers, call, score_mod,
                mask_mod, aux, half, True, cfg,
            )  # fmt: skip
            start += cfg.block_n
            step += 1
        scores, acc, row_max, row_sum = _turn(
            scores, acc, row_max, row_sum, rope, start, step, place, buffers, call, score_mod,
            mask_mod, aux, half, False, cfg,
        )  # fmt: skip
    return acc, row_sum


@gluon.jit
def _share_sums(row_sum, meeting, half: gl.constexpr, buffers, cfg: gl.constexpr):
    """(row_max, row_sum) of a unit, of both warpgroups together, in rows of the output, and meeting."""
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), cfg.wide_row)
    buffers.row_numbers.index(2 + half).store(row_sum)
    meeting = _meet(buffers, meeting)
    row_sum = buffers.row_numbers.index(2).load(cfg.wide_out_row)
    row_sum += buffers.row_numbers.index(3).load(cfg.wide_out_row)
    return buffers.row_numbers.index(1).load(cfg.wide_out_row), row_sum, meeting


@gluon.jit
def consume_paired(
    tensors,
    buffers,
    parts,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    half: gl.constexpr,
    cfg: gl.constexpr,
):
    """One of two warpgroups, unit after unit."""
    q_ptr, qv_ptr, _out, _lse, _sinks, _descales, spans, works, share_ptr = tensors
    columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, cfg.wide_output))
    columns += half * cfg.out_width
    worker = gl.program_id(0) // cfg.m_tiles
    tile = gl.program_id(0) % cfg.m_tiles
    unit, batch, span, within, left = first_unit(works, cfg)
    share = gl.load(share_ptr)
    line = worker * share
    step = 0
    meeting = 0
    tile_row = tile * TILE_ROWS
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        rope, meeting = _share_queries(
            q_ptr, qv_ptr, span, batch, unit, tile_row, meeting, half, buffers, call, cfg
        )
        start = (span.first_block + first) * cfg.block_n
        place = span, batch, unit, tile_row
        acc, row_sum = _attend(
            rope, start, step, count, place, half, buffers, call, score_mod, mask_mod, aux, cfg
        )
        step += count
        row_max, row_sum, meeting = _share_sums(row_sum, meeting, half, buffers, cfg)
        rows = tile_row + gl.arange(0, TILE_ROWS, layout=cfg.wide_out_row)
        end_unit(
            tensors,
            parts,
            acc,
            row_max,
            row_sum,
            rows,
            columns,
            1.0,
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
