"""A consumer warpgroup of float8 prefill: 64 query rows of a tile, from the last key to the first."""

from __future__ import annotations

from headway.kernels._triton import (
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper import cast_rows
from headway.kernels.hopper.masks import mask_scores
from headway.kernels.hopper.mla_prefill_pipeline import (
    FACTS,
    Q_EVENTS,
    RECORD_BYTES,
    Tile,
    await_full,
    release,
)
from headway.kernels.hopper.softmax import LN2, partial_sums

#: log2 of a row's largest weight: float8 holds up to 448.
WEIGHT_BITS: gl.constexpr = gl.constexpr(8.0)


@gluon.jit
def _fact(buffers, slot, FIELD: gl.constexpr, cfg: gl.constexpr):
    return gl.max(buffers.facts.index(slot * FACTS + FIELD).load(cfg.four_warps), 0)


@gluon.jit
def _await_tile(buffers, order, cfg: gl.constexpr):
    slot = await_full(buffers.q_full, order, cfg.q_slots)
    tile = Tile(
        _fact(buffers, slot, 0, cfg),
        _fact(buffers, slot, 1, cfg),
        _fact(buffers, slot, 2, cfg),
        _fact(buffers, slot, 3, cfg),
        _fact(buffers, slot, 4, cfg),
        _fact(buffers, slot, 5, cfg),
        _fact(buffers, slot, 6, cfg),
        _fact(buffers, slot, 7, cfg),
        _fact(buffers, slot, 8, cfg).to(gl.float32, bitcast=True),
        _fact(buffers, slot, 9, cfg).to(gl.float32, bitcast=True),
        _fact(buffers, slot, 10, cfg).to(gl.float32, bitcast=True),
    )
    return slot, tile


@gluon.jit
def _cast_queries(buffers, event, tile, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    """This warpgroup's queries, from the ring to its operand in float8; the factors of its rows' scores."""
    if WARPGROUP == 1:
        await_full(buffers.k_full, event, cfg.stages)
        release(buffers.empty, event, cfg.stages)
    stage = await_full(buffers.k_full, event + WARPGROUP, cfg.stages)
    wide = buffers.k_wide.index(stage)._reinterpret(gl.int32, [64, 64], cfg.q_words)
    narrow = buffers.k_narrow.index(stage)._reinterpret(gl.int32, [64, 32], cfg.q_words)
    wide, narrow = wide.load(cfg.q_wide_rows), narrow.load(cfg.q_narrow_rows)
    cta_barrier()  # all have read, and the products of the tile before are done
    release(buffers.empty, event + WARPGROUP, cfg.stages)
    if WARPGROUP == 0:
        await_full(buffers.k_full, event + 1, cfg.stages)
        release(buffers.empty, event + 1, cfg.stages)
    row_scale = gl.full([64], 0.0, gl.float32, cfg.scores_row) + tile.scale
    if cfg.scale_rows:
        of_wide = cast_rows.largest_pairs(wide, cfg.q_type)
        of_narrow = cast_rows.largest_pairs(narrow, cfg.q_type)
        q_scale = cast_rows.scale_of(of_wide, of_narrow, cfg.q_type)
        row_scale *= gl.convert_layout(q_scale, cfg.scores_row)
    else:
        q_scale = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, cfg.q_wide_rows)) + tile.q_scale
    factor = 1.0 / q_scale
    to_wide = buffers.q_wide.index(WARPGROUP)._reinterpret(gl.int32, [64, 32], cfg.q_words)
    to_narrow = buffers.q_narrow.index(WARPGROUP)._reinterpret(
        gl.int32, [64, 16], cfg.q_words_narrow
    )
    to_wide.store(cast_rows.cast(wide, factor, cfg.q_type))
    to_narrow.store(cast_rows.cast(narrow, factor, cfg.q_type))
    fence_async_shared()
    cta_barrier()
    return row_scale


@gluon.jit
def _record(buffers, stage, FIELD: gl.constexpr, cfg: gl.constexpr):
    """A float about the block of keys in a stage: its scale, its values', and 1 over that."""
    words: gl.constexpr = RECORD_BYTES // 4
    floats = buffers.records._reinterpret(gl.float32, [cfg.stages * words, 1], cfg.facts)
    return gl.max(floats.index(stage * words + FIELD).load(cfg.four_warps), 0)


@gluon.jit
def _issue_qk(buffers, operand, stage, cfg: gl.constexpr):
    scores = gl.full([64, cfg.block_n], 0.0, gl.float32, cfg.scores)
    scores = warpgroup_mma(
        buffers.q_wide.index(operand),
        buffers.k_wide.index(stage).permute((1, 0)),
        scores,
        use_acc=False,
        is_async=True,
    )
    return warpgroup_mma(
        buffers.q_narrow.index(operand),
        buffers.k_narrow.index(stage).permute((1, 0)),
        scores,
        is_async=True,
    )


@gluon.jit
def _packed(weights, cfg: gl.constexpr):
    """Weights as float8, four to an int32, in the order of the values' keys: (64, block_n / 4).

    Words, because 8-bit values that cross iterations are taken apart and put together again. The changes
    of order and layout only rename registers.
    """
    n: gl.constexpr = cfg.block_n
    pairs = gl.permute(gl.reshape(weights, [64, n // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    ordered = gl.convert_layout(gl.reshape(pairs, [64, n]), cfg.p_operand, assert_trivial=True)
    even, odd = gl.split(gl.reshape(ordered, [64, n // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _as_operand(words, cfg: gl.constexpr):
    """Words of :func:`_packed` as the left operand of PV; the same registers."""
    n: gl.constexpr = cfg.block_n
    halves = gl.join(words.to(gl.int16), (words >> 16).to(gl.int16))
    halves = gl.reshape(halves, [64, n // 2])
    values = gl.join(halves.to(gl.int8), (halves >> 8).to(gl.int8))
    values = gl.reshape(values, [64, n]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(values, cfg.p_operand, assert_trivial=True)


@gluon.jit
def _issue_pv(operand, buffers, stage, cfg: gl.constexpr):
    """Start P V of one block, from zero."""
    v = buffers.v.index(stage).permute((1, 0))
    product = gl.full([64, 128], 0.0, gl.float32, cfg.output)
    return warpgroup_mma(operand, v, product, use_acc=False, is_async=True)


@gluon.jit
def _weigh(scores, row_max, row_sum, scale, MASKED: gl.constexpr):
    """(weights of a block, row maxima in log2, row sums as partial_sums makes them, factor for what was
    summed before). MASKED: rows may hold only -inf."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    shift = new_max
    if MASKED:
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    factor = gl.exp2(row_max - shift)
    weights = gl.exp2(scores * gl.expand_dims(scale, 1) - gl.expand_dims(shift - WEIGHT_BITS, 1))
    spread: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    row_factor = gl.expand_dims(gl.convert_layout(factor, spread, assert_trivial=True), 1)
    return weights, new_max, row_sum * row_factor + partial_sums(weights), factor


@gluon.jit
def _added(accumulator, factor, product, cfg: gl.constexpr):
    factor = gl.convert_layout(factor, cfg.output_row, assert_trivial=True)
    return accumulator * gl.expand_dims(factor, 1) + product


@gluon.jit
def _advance(
    buffers,
    operand,
    event,
    first_key,
    words,
    product,
    accumulator,
    factors,
    row_max,
    row_sum,
    unit,
    scale,
    limit,
    MASKED: gl.constexpr,
    cfg: gl.constexpr,
):
    """PV of block ``event``, beside QK and softmax of the next, which begins at ``first_key``.

    ``product`` is the PV of the block before, which is added here, while QK runs. ``factors`` bring the
    accumulator to the row maxima that go with it, and with ``words``.
    """
    before, now = factors
    p = _as_operand(words, cfg)
    stage = await_full(buffers.k_full, event + 1, cfg.stages)
    step = unit
    if cfg.scale_blocks:
        scale *= _record(buffers, stage, 0, cfg)
        step *= _record(buffers, stage, 2, cfg)
        unit = _record(buffers, stage, 1, cfg)
    scores = _issue_qk(buffers, operand, stage, cfg)
    accumulator = _added(accumulator, before, product, cfg)
    stage = await_full(buffers.v_full, event, cfg.stages)
    product = _issue_pv(p, buffers, stage, cfg)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = mask_scores(scores, limit, limit, first_key, False)
    weights, row_max, row_sum, coming = _weigh(scores, row_max, row_sum, scale, MASKED)
    if cfg.scale_blocks:
        coming *= step
    # The wait takes no time but ends a basic block: else ptxas sinks the softmax below the wait for PV.
    await_full(buffers.v_full, event, cfg.stages)
    product = warpgroup_mma_wait(0, deps=[product])
    release(buffers.empty, event, cfg.stages)
    words = _packed(weights, cfg)
    return words, product, accumulator, (now, coming), row_max, row_sum, unit, event + 1


@gluon.jit
def _attend(buffers, slot, event, tile, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    """(unnormalised output, row maxima, row sums, event) of this warpgroup's rows of a tile."""
    n: gl.constexpr = cfg.block_n
    accumulator = gl.full([64, 128], 0.0, gl.float32, cfg.output)
    row_max = gl.full([64], float("-inf"), gl.float32, cfg.scores_row)
    row_sum = partial_sums(gl.full([64, n], 0.0, gl.float32, cfg.scores))
    unit = tile.v_scale
    scale = gl.full([64], 0.0, gl.float32, cfg.scores_row) + tile.scale
    end, full = tile.end_key, tile.end_key
    limit = gl.full([64], 0, gl.int32, cfg.scores_row) + tile.end_key
    if cfg.causal:
        position = tile.position + WARPGROUP * 64
        row = gl.arange(0, 64, layout=cfg.scores_row)
        limit = gl.minimum(limit, position + row + 1)
        end = gl.minimum(end, tile.position + gl.minimum(tile.rows, WARPGROUP * 64 + 64))
        full = gl.minimum(full, position + 1)
    blocks = gl.cdiv(gl.maximum(end - tile.first_key, 0), n)
    blocks = gl.where(tile.rows > WARPGROUP * 64, blocks, 0)
    if cfg.casts_q:
        if tile.blocks > 0:
            scale = _cast_queries(buffers, event, tile, WARPGROUP, cfg)
            event += Q_EVENTS
    for _ in range(tile.blocks - blocks):
        await_full(buffers.k_full, event, cfg.stages)
        await_full(buffers.v_full, event, cfg.stages)
        release(buffers.empty, event, cfg.stages)
        event += 1
    if blocks > 0:
        operand = slot % cfg.operand_slots * 2 + WARPGROUP
        first_key = tile.first_key + (blocks - 1) * n
        stage = await_full(buffers.k_full, event, cfg.stages)
        scores = _issue_qk(buffers, operand, stage, cfg)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = mask_scores(scores, limit, limit, first_key, False)
        of_block = scale
        if cfg.scale_blocks:
            of_block *= _record(buffers, stage, 0, cfg)
            unit = _record(buffers, stage, 1, cfg)
        weights, row_max, row_sum, factor = _weigh(scores, row_max, row_sum, of_block, True)
        words = _packed(weights, cfg)
        product = gl.full([64, 128], 0.0, gl.float32, cfg.output)
        factors = (factor, factor)
        masked = blocks - gl.maximum(full - tile.first_key, 0) // n
        masked = gl.minimum(gl.maximum(masked, 1), blocks)
        for i in range(1, masked):
            words, product, accumulator, factors, row_max, row_sum, unit, event = _advance(
                buffers, operand, event, first_key - i * n, words, product, accumulator, factors,
                row_max, row_sum, unit, scale, limit, True, cfg,
            )  # fmt: skip
        for _ in range(masked, blocks):
            words, product, accumulator, factors, row_max, row_sum, unit, event = _advance(
                buffers, operand, event, first_key, words, product, accumulator, factors,
                row_max, row_sum, unit, scale, limit, False, cfg,
            )  # fmt: skip
        release(buffers.q_empty, slot, cfg.q_slots)
        before, now = factors
        accumulator = _added(accumulator, before, product, cfg)
        stage = await_full(buffers.v_full, event, cfg.stages)
        product = _issue_pv(_as_operand(words, cfg), buffers, stage, cfg)
        product = warpgroup_mma_wait(0, deps=[product])
        release(buffers.empty, event, cfg.stages)
        accumulator = _added(accumulator, now, product, cfg)
        event += 1
    else:
        release(buffers.q_empty, slot, cfg.q_slots)
    return accumulator, row_max, row_sum, unit, event


@gluon.jit
def _store_rows(ptr, stride_row, values, rows, layout: gl.constexpr):
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(row * stride_row, 1) + gl.expand_dims(column, 0)
    gl.store(ptr + at, values, mask=gl.expand_dims(row < rows, 1))


@gluon.jit
def _write(
    tile, accumulator, row_max, row_sum, unit, outputs, WARPGROUP: gl.constexpr, cfg: gl.constexpr
):
    """Normalise this warpgroup's rows and store them, to the output or to the partial buffers."""
    (
        out,
        lse,
        partial_out,
        partial_lse,
        heads,
        stride_out_row,
        stride_out_head,
        stride_lse_row,
        stride_lse_head,
    ) = outputs
    total = gl.convert_layout(gl.sum(row_sum, 1), cfg.scores_row, assert_trivial=True)
    empty = total == 0.0
    factor = gl.where(empty, 0.0, unit / total)
    natural = gl.where(empty, float("-inf"), (row_max + gl.log2(total) - WEIGHT_BITS) * LN2)
    factor = gl.convert_layout(factor, cfg.output_row, assert_trivial=True)
    result = accumulator * gl.expand_dims(factor, 1)
    head = tile.head.to(gl.int64)
    first = (tile.first_row + WARPGROUP * 64).to(gl.int64)
    rows = tile.rows - WARPGROUP * 64
    row = gl.arange(0, 64, layout=cfg.scores_row)
    if tile.partial > 0:
        lse_at = partial_lse + first * heads + head
        gl.store(lse_at + row * heads, natural, mask=row < rows)
        at = partial_out + (first * heads + head) * 128
        _store_rows(at, heads * 128, result, rows, gl.constexpr(cfg.output))
    else:
        if lse is not None:
            to = lse + first * stride_lse_row + head * stride_lse_head
            gl.store(to + row * stride_lse_row, natural, mask=row < rows)
        to_out = out + first * stride_out_row + head * stride_out_head
        values = gl.convert_layout(result.to(out.dtype.element_ty), cfg.store)
        _store_rows(to_out, stride_out_row, values, rows, gl.constexpr(cfg.store))


@gluon.jit
def consume(buffers, outputs, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    """Tiles in the order the producer publishes them, until it ends the work."""
    event = gl.to_tensor(0)
    order = gl.to_tensor(0)
    slot, tile = _await_tile(buffers, order, cfg)
    while tile.blocks >= 0:
        accumulator, row_max, row_sum, unit, event = _attend(
            buffers, slot, event, tile, WARPGROUP, cfg
        )
        _write(tile, accumulator, row_max, row_sum, unit, outputs, WARPGROUP, cfg)
        order += 1
        slot, tile = _await_tile(buffers, order, cfg)
