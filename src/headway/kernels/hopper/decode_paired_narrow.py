"""The decode kernel's consumers where a float8 latent cache meets more than a few packed rows.

Keys are wgmma's rows and packed rows its columns, so float8 numbers are widened in registers, on their way
from stages to products. Two warpgroups have half of the values' columns each and take turns at the scores
of blocks: while one widens keys or is at its softmax, products of the other keep the tensor cores busy.
Probabilities, and maxima where they rise, pass from one to the other through shared memory.
"""

from __future__ import annotations

from headway.kernels._triton import (
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper.decode_config import KEY_COLUMNS as _KEY_COLUMNS
from headway.kernels.hopper.decode_config import VALUE_KEYS as _VALUE_KEYS
from headway.kernels.hopper.decode_consumer import (
    TILE_ROWS,
    WIDEN,
    WIDEN_ACROSS,
    as_multiplied,
    column_max,
    fetch_piece,
    fetch_queries,
    largest_magnitude,
    load_scales,
    mask_columns,
    modify_columns,
    opaque,
    packed_rows,
    widen,
)
from headway.kernels.hopper.decode_load import next_unit
from headway.kernels.hopper.decode_merge import end_unit
from headway.kernels.hopper.decode_plan import (
    BATCH,
    LEFT,
    UNIT,
    WIDTH,
    WITHIN,
    load_span,
    take_of,
)
from headway.kernels.hopper.masks import row_limits
from headway.kernels.hopper.softmax import LAG, LOG2E, soft_cap

KEY_COLUMNS: gl.constexpr = gl.constexpr(_KEY_COLUMNS)
VALUE_KEYS: gl.constexpr = gl.constexpr(_VALUE_KEYS)
#: The maximum of a row that has seen nothing: finite, so that differences of maxima are numbers.
LOWEST: gl.constexpr = gl.constexpr(-1e38)


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
    """A unit's queries into shared memory, half of the latents' columns by each warpgroup.

    Returns what scores must be multiplied by because of how queries were stored, and meeting.
    """
    strides = call.stride_qv_batch, call.stride_qv_row, call.stride_qv_head
    column: gl.constexpr = half * cfg.out_width
    latents = fetch_queries(
        qv_ptr, strides, span, batch, unit, tile_row, column, gl.constexpr(cfg.out_width),
        gl.constexpr(cfg.head_dim_v), gl.constexpr(cfg.half_rows), call, cfg,
    )  # fmt: skip
    rope = fetch_piece(q_ptr, span, batch, unit, tile_row, 0, call, cfg)
    meeting = _meet(buffers, meeting)  # nobody needs what is overwritten
    factor = 1.0
    if cfg.scaled:
        largest = gl.maximum(largest_magnitude(latents), largest_magnitude(rope))
        everywhere = gl.full([cfg.columns], 0.0, gl.float32, cfg.row) + largest
        buffers.row_numbers.index(half).store(everywhere)
        meeting = _meet(buffers, meeting)
        theirs = gl.max(buffers.row_numbers.index(1 - half).load(cfg.row), 0)
        largest = gl.maximum(largest, theirs)
        # A power of two: float16 then holds all eight bits of a bfloat16 down to 2^-29 of the largest.
        factor = gl.where(largest > 0.0, gl.exp2(14.0 - gl.floor(gl.log2(largest))), 1.0)
    latents = as_multiplied(latents, factor, gl.constexpr(cfg.out_width), cfg)
    buffers.latent.index(0).slice(column, cfg.out_width, dim=1).store(latents)
    if half == 0:
        buffers.q.index(0).store(as_multiplied(rope, factor, gl.constexpr(cfg.k_width), cfg))
    fence_async_shared()
    meeting = _meet(buffers, meeting)
    return 1.0 / factor, meeting


@gluon.jit
def _keys(tile, column, layout: gl.constexpr, cfg: gl.constexpr):
    """KEY_COLUMNS of a tile of keys, widened, as wgmma's first operand."""
    pairs = tile.slice(column // 2, KEY_COLUMNS // 2, dim=1).load(layout)
    keys = widen(pairs, WIDEN)
    keys = keys.reshape([cfg.block_n, KEY_COLUMNS // 16, 8, 2]).permute((0, 1, 3, 2))
    keys = keys.reshape([cfg.block_n, KEY_COLUMNS])
    return gl.convert_layout(keys, cfg.operand, assert_trivial=True)


@gluon.jit
def _add_scores(scores, turn: gl.constexpr, step, buffers, cfg: gl.constexpr):
    """Begin to add products of queries and keys of the ``turn``-th piece of columns, of latents and then of
    rope: (scores, the piece)."""
    LATENTS: gl.constexpr = cfg.v_width // KEY_COLUMNS
    stage = step % cfg.stages
    zero = opaque(0, step)
    column: gl.constexpr = (turn if turn < LATENTS else turn - LATENTS) * KEY_COLUMNS
    if turn < LATENTS:
        if column % cfg.v_box_width == 0:
            full = buffers.full.index(stage * cfg.v_pieces + column // cfg.v_box_width)
            mbarrier.wait(full, (step // cfg.stages) & 1)
        tile = buffers.v.index(stage)._reinterpret(
            gl.int16, [cfg.block_n, cfg.v_width // 2], cfg.v_pairs
        )
        queries = buffers.latent.index(zero)
    else:
        tile = buffers.k.index(stage)._reinterpret(
            gl.int16, [cfg.block_n, cfg.k_width // 2], cfg.k_pairs
        )
        queries = buffers.q.index(zero)
    keys = _keys(tile, column, gl.constexpr(cfg.key_pairs), cfg)
    q = queries.slice(column, KEY_COLUMNS, dim=1).permute((1, 0))
    return warpgroup_mma(keys, q, scores, use_acc=turn > 0, is_async=True), keys


@gluon.jit
def _scores(step, buffers, ratio, cfg: gl.constexpr):
    """Scores of a block, of latents ``ratio`` times. A piece is widened while products with the one before
    run."""
    LATENTS: gl.constexpr = cfg.v_width // KEY_COLUMNS
    scores = gl.full([cfg.block_n, cfg.columns], 0.0, gl.float32, cfg.product)
    scores, older = _add_scores(scores, 0, step, buffers, cfg)
    for turn in gl.static_range(1, LATENTS + cfg.k_width // KEY_COLUMNS):
        if cfg.parted and turn == LATENTS:
            scores, _ = warpgroup_mma_wait(0, deps=(scores, older))
            scores *= ratio
        scores, newest = _add_scores(scores, turn, step, buffers, cfg)
        warpgroup_mma_wait(1, deps=(older,))
        older = newest
    scores, _ = warpgroup_mma_wait(0, deps=(scores, older))
    return scores


@gluon.jit
def _part_scales(of_keys, of_latents, cfg: gl.constexpr):
    """(what all scores are multiplied by, what those of latents are multiplied by before): descales."""
    if cfg.parted:
        # Next to nothing is as good as nothing, and can be divided by.
        of_keys = gl.where(of_keys == 0.0, 2.0**-40, of_keys)
        return of_keys, of_latents / of_keys
    else:
        return 1.0, 1.0


@gluon.jit
def _values(
    turn: gl.constexpr, stage, start, cut, half: gl.constexpr, buffers, span, cfg: gl.constexpr
):
    """VALUE_KEYS of 64 columns of values, widened and transposed, as wgmma's first operand; where the block
    is ``cut``, rows that may hold anything are zeros. Columns of each 16 are in another order."""
    TURNS: gl.constexpr = cfg.block_n // VALUE_KEYS
    column: gl.constexpr = half * cfg.out_width + turn // TURNS * 64
    key: gl.constexpr = turn % TURNS * VALUE_KEYS
    layout: gl.constexpr = cfg.value_pairs
    tile = buffers.v.index(stage)._reinterpret(
        gl.int16, [cfg.block_n, cfg.v_width // 2], cfg.v_pairs
    )
    pairs = tile.slice(column // 2, 32, dim=1).slice(key, VALUE_KEYS, dim=0).load(layout)
    if cut:
        rows = gl.arange(0, VALUE_KEYS, layout=gl.SliceLayout(1, layout)) + (start + key)
        inside = gl.expand_dims((rows >= span.lo) & (rows < span.hi), 1)
        pairs = gl.where(inside, pairs, gl.zeros_like(pairs))
    values = widen(pairs, WIDEN_ACROSS)
    values = values.reshape([VALUE_KEYS, 4, 8, 2]).permute((1, 3, 2, 0)).reshape([64, VALUE_KEYS])
    return gl.convert_layout(values, cfg.operand, assert_trivial=True)


@gluon.jit
def _add_piece(
    acc, turn: gl.constexpr, before, place, half: gl.constexpr, buffers, cfg: gl.constexpr
):
    """Begin to add the ``turn``-th piece of values times probabilities to its columns of the output, and
    wait for products with the piece ``before``: (acc, the piece)."""
    stage, start, cut, zero, span = place
    LAST: gl.constexpr = turn + 1 == 4 * (cfg.block_n // VALUE_KEYS)
    key: gl.constexpr = turn % (cfg.block_n // VALUE_KEYS) * VALUE_KEYS
    values = _values(turn, stage, start, cut, half, buffers, span, cfg)
    if LAST:
        mbarrier.arrive(buffers.empty.index(stage), count=1)
    p = buffers.p.index(zero).slice(key, VALUE_KEYS, dim=1).permute((1, 0))
    acc = warpgroup_mma(values, p, acc, is_async=True)
    if turn > 0 and not LAST:
        warpgroup_mma_wait(1, deps=(before,))
    return acc, values


@gluon.jit
def _add_values(acc, step, start, half: gl.constexpr, buffers, span, cfg: gl.constexpr):
    """Add a block's values times the probabilities that lie in shared memory, and free its stage. A piece
    is widened while products with the one before run."""
    gl.static_assert(cfg.out_width == 256)
    gl.static_assert(cfg.block_n == 2 * VALUE_KEYS)
    # A gathering producer has cleared rows that may hold anything.
    cut = (start < span.lo) | (start + cfg.block_n > span.hi) if not cfg.gathered else False
    place = step % cfg.stages, start, cut, opaque(0, step), span
    first, second, third, fourth = acc
    first, a = _add_piece(first, 0, None, place, half, buffers, cfg)
    first, b = _add_piece(first, 1, a, place, half, buffers, cfg)
    second, a = _add_piece(second, 2, b, place, half, buffers, cfg)
    second, b = _add_piece(second, 3, a, place, half, buffers, cfg)
    third, a = _add_piece(third, 4, b, place, half, buffers, cfg)
    third, b = _add_piece(third, 5, a, place, half, buffers, cfg)
    fourth, a = _add_piece(fourth, 6, b, place, half, buffers, cfg)
    fourth, b = _add_piece(fourth, 7, a, place, half, buffers, cfg)
    first, second, third, fourth, _, _ = warpgroup_mma_wait(
        0, deps=(first, second, third, fourth, a, b)
    )
    return first, second, third, fourth


@gluon.jit
def _lower(acc, row_sum, buffers, cfg: gl.constexpr):
    """What was accumulated, times the factor that lies in shared memory: a maximum rose."""
    row_sum *= buffers.row_numbers.index(1).load(row_sum.type.layout)
    factor = gl.expand_dims(buffers.row_numbers.index(1).load(cfg.row), 0)
    first, second, third, fourth = acc
    return (first * factor, second * factor, third * factor, fourth * factor), row_sum


@gluon.jit
def _take_block(
    acc, row_sum, start, step, turn, half: gl.constexpr, buffers, span, cfg: gl.constexpr
):
    """A block whose probabilities the other warpgroup makes: (acc, row_sum)."""
    mbarrier.wait(buffers.handed.index(1 - half), turn & 1)
    raised = gl.max(buffers.raised.load(gl.constexpr(cfg.flag)), 0)
    if raised > 0:
        acc, row_sum = _lower(acc, row_sum, buffers, cfg)
    acc = _add_values(acc, step, start, half, buffers, span, cfg)
    return acc, row_sum


@gluon.jit
def _final_scores(
    scores, scale, start, step, place, call, score_mod: gl.constexpr, mask_mod: gl.constexpr, aux,
    cfg: gl.constexpr,
):  # fmt: skip
    """Scores as they are exponentiated, but for a factor: (scores, factor)."""
    span, batch, unit, tile_row = place
    scale_log2 = scale * LOG2E
    if cfg.has_soft_cap:
        scores = soft_cap(scores, scale, call.softcap)
        scale_log2 = LOG2E
    elif score_mod is not None:
        scores *= scale
        scale_log2 = LOG2E
    cut = (start < span.full_lo) | (start + cfg.block_n > span.full_hi)
    if cut or score_mod is not None or mask_mod is not None:
        # Numbers of rows take many registers: the compiler is not to keep them.
        rows = opaque(tile_row, step) + gl.arange(0, cfg.columns, layout=cfg.row)
        positions = span.position + rows // cfg.group
        if score_mod is not None or mask_mod is not None:
            heads = unit * cfg.group + rows % cfg.group
            scores = modify_columns(
                scores, start, batch, heads, positions, span, score_mod, mask_mod, aux, cfg
            )
        if cut:
            lo, hi = row_limits(positions, span.keys, call, cfg)
            lo = gl.maximum(lo, 0) + span.pad
            scores = mask_columns(scores, lo, hi + span.pad, start, cfg)
    return scores, scale_log2


@gluon.jit
def _raise_max(scores, scale_log2, row_max, buffers, cfg: gl.constexpr):
    """New maxima, where scores exceed the old ones by more than LAG, and the factor of what was
    accumulated, into shared memory."""
    highest = gl.maximum(row_max, column_max(scores, cfg) * scale_log2)
    new_max = gl.where(highest - row_max > LAG, highest, row_max)
    buffers.row_numbers.index(0).store(new_max)
    buffers.row_numbers.index(1).store(gl.exp2(row_max - new_max))


@gluon.jit
def _hand_block(
    scores, scale_log2, acc, row_sum, their_turn, FIRST: gl.constexpr, half: gl.constexpr,
    buffers, cfg: gl.constexpr,
):  # fmt: skip
    """Hand over a block's probabilities: (acc, row_sum), scaled where a maximum rose."""
    if FIRST:
        raised = True
        none = gl.full([cfg.columns], LOWEST, gl.float32, cfg.row)
        _raise_max(scores, scale_log2, none, buffers, cfg)
    else:
        row_max = buffers.row_numbers.index(0).load(cfg.row)
        above = scores * scale_log2 - gl.expand_dims(row_max, 0)
        # By warp, and then all warps' by every thread.
        most = gl.max(above.reshape([4, 16 * cfg.columns]), 1)
        raised = gl.max(gl.convert_layout(most, cfg.by_warp), 0) > LAG
        # The other warpgroup may still multiply the probabilities of its own block.
        mbarrier.wait(buffers.added.index(1 - half), their_turn & 1)
        if raised:
            _raise_max(scores, scale_log2, row_max, buffers, cfg)
            acc, row_sum = _lower(acc, row_sum, buffers, cfg)
    # Read again: there are no registers to keep maxima in.
    row_max = buffers.row_numbers.index(0).load(cfg.row)
    exponents = scores * scale_log2 - gl.expand_dims(row_max, 0)
    p = gl.exp2(exponents)
    buffers.p.index(0).store(p.to(cfg.dtype).permute((1, 0)))
    buffers.raised.store(gl.full([1], 0, gl.int32, cfg.flag) + raised)
    fence_async_shared()
    mbarrier.arrive(buffers.handed.index(half), count=1)
    cta_barrier()
    # A thread keeps the sum of one row: what it has of all of its rows would take more registers.
    by_warp = gl.sum(p.reshape([4, 16, cfg.columns]), 1)
    row_sum += gl.sum(gl.convert_layout(by_warp, cfg.row_sums), 0)
    return acc, row_sum


@gluon.jit
def _own_block(
    acc, row_sum, scores, scale, start, step, their_turn, place, FIRST: gl.constexpr,
    half: gl.constexpr, buffers, call, score_mod: gl.constexpr, mask_mod: gl.constexpr, aux,
    cfg: gl.constexpr,
):  # fmt: skip
    """A block whose scores are this warpgroup's: (acc, row_sum)."""
    scores, scale_log2 = _final_scores(
        scores, scale, start, step, place, call, score_mod, mask_mod, aux, cfg
    )
    acc, row_sum = _hand_block(
        scores, scale_log2, acc, row_sum, their_turn, FIRST, half, buffers, cfg
    )
    acc = _add_values(acc, step, start, half, buffers, place[0], cfg)
    mbarrier.arrive(buffers.added.index(half), count=1)
    return acc, row_sum


@gluon.jit
def _attend(
    scale, ratio, start, step, count, theirs, place, half: gl.constexpr, buffers, call,
    score_mod: gl.constexpr, mask_mod: gl.constexpr, aux, cfg: gl.constexpr,
):  # fmt: skip
    """``count`` blocks of a unit: (acc, sums of the rows of its own blocks). ``theirs`` counts blocks of
    which the other warpgroup made probabilities before."""
    span = place[0]
    zeros = gl.full([64, cfg.columns], 0.0, gl.float32, cfg.product)
    acc = zeros, zeros, zeros, zeros
    row_sum = gl.full([cfg.columns], 0.0, gl.float32, gl.SliceLayout(0, cfg.row_sums))
    if half == 0:
        if count > 0:
            scores = _scores(step, buffers, ratio, cfg)
            acc, row_sum = _own_block(
                acc, row_sum, scores, scale, start, step, theirs, place, True, half, buffers, call,
                score_mod, mask_mod, aux, cfg,
            )  # fmt: skip
    end = step + count
    start -= step * cfg.block_n  # of step 0, in a way
    for at in range(step + 2 - half, end, 2):
        scores = _scores(at, buffers, ratio, cfg)
        begin = start + at * cfg.block_n
        acc, row_sum = _take_block(
            acc, row_sum, begin - cfg.block_n, at - 1, theirs, half, buffers, span, cfg
        )
        acc, row_sum = _own_block(
            acc, row_sum, scores, scale, begin, at, theirs, place, False, half, buffers, call,
            score_mod, mask_mod, aux, cfg,
        )  # fmt: skip
        theirs += 1
    if (count > 0) & ((count & 1) == half):
        begin = start + (end - 1) * cfg.block_n
        acc, row_sum = _take_block(acc, row_sum, begin, end - 1, theirs, half, buffers, span, cfg)
    return acc, row_sum


@gluon.jit
def _share_sums(row_sum, meeting, half: gl.constexpr, buffers, cfg: gl.constexpr):
    """(row_max, row_sum) of a unit, of both warpgroups together, and meeting."""
    row_max = buffers.row_numbers.index(0).load(cfg.row)
    meeting = _meet(buffers, meeting)
    buffers.row_numbers.index(half).store(row_sum)
    meeting = _meet(buffers, meeting)
    row_sum = buffers.row_numbers.index(0).load(cfg.row) + buffers.row_numbers.index(1).load(
        cfg.row
    )
    return gl.where(row_sum == 0.0, float("-inf"), row_max), row_sum, meeting


@gluon.jit
def consume_paired_narrow(
    tensors, buffers, parts, call, score_mod: gl.constexpr, mask_mod: gl.constexpr, aux,
    half: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """One of two warpgroups, unit after unit."""
    q_ptr, qv_ptr, descales = tensors[0], tensors[1], tensors[5]
    spans, works, share_ptr = tensors[6], tensors[7], tensors[8]
    worker = gl.program_id(0) // cfg.m_tiles
    tile_row = gl.program_id(0) % cfg.m_tiles * TILE_ROWS
    record = works + worker * WIDTH
    span = load_span(record)
    batch = gl.load(record + BATCH)
    unit = gl.load(record + UNIT)
    within = gl.load(record + WITHIN)
    left = gl.load(record + LEFT)
    share = gl.load(share_ptr)
    line = worker * share
    step = 0
    meeting = 0
    theirs = 0  # blocks of which the other warpgroup made probabilities
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        unscale, meeting = _share_queries(
            q_ptr, qv_ptr, span, batch, unit, tile_row, meeting, half, buffers, call, cfg
        )
        of_scores, of_keys, of_latents, v_scale = load_scales(descales, batch, unit, cfg)
        of_all, ratio = _part_scales(of_keys, of_latents, cfg)
        acc, row_sum = _attend(
            call.scale * unscale * of_scores * of_all, ratio,
            (span.first_block + first) * cfg.block_n, step, count, theirs,
            (span, batch, unit, tile_row), half, buffers, call, score_mod, mask_mod, aux, cfg,
        )  # fmt: skip
        step += count
        theirs += (count + half) // 2
        row_max, row_sum, meeting = _share_sums(row_sum, meeting, half, buffers, cfg)
        acc = gl.join(gl.join(acc[0], acc[1]), gl.join(acc[2], acc[3])).permute((3, 2, 0, 1))
        out = packed_rows(acc.reshape([cfg.out_width, cfg.columns]), cfg)
        rows = tile_row + gl.arange(0, cfg.columns, layout=cfg.row)
        columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, out.type.layout))
        end_unit(
            tensors, parts, out, row_max, row_sum, rows, half * cfg.out_width + columns, v_scale,
            span, batch, unit, first, count, line - within, share, call, half, cfg,
        )  # fmt: skip
        left -= take
        line += take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, call.units, left)
