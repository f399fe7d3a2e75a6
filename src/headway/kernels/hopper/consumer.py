"""A consumer warpgroup of the forward kernel: QK, softmax and PV for 64 query rows, and their output."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import (
    aggregate,
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    tma,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper import pipeline
from headway.kernels.hopper.masks import mask_scores, row_limits
from headway.kernels.hopper.softmax import (
    LOG2E,
    finish,
    partial_sums,
    rescale,
    soft_cap,
    softmax_block,
)

#: Takes the place of a scale of 0.
LEAST_SCALE: gl.constexpr = gl.constexpr(1e-37)


@aggregate
class Rows:
    """The rows of one warpgroup in a tile, and the key blocks they see: [begin, end), of which the last
    ``right`` and the first ``left`` need a mask."""

    batch: gl.tensor
    head: gl.tensor  # (64,)
    position: gl.tensor  # (64,) absolute
    lo: gl.tensor  # (64,) first visible key
    hi: gl.tensor  # (64,) end of the visible keys
    seqlen_k: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    left: gl.tensor
    right: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, head, position, lo, hi, seqlen_k, begin, end, left, right):
        self.batch = batch
        self.head = head
        self.position = position
        self.lo = lo
        self.hi = hi
        self.seqlen_k = seqlen_k
        self.begin = begin
        self.end = end
        self.left = left
        self.right = right


@gluon.jit
def _clamp(x, low, high):
    return gl.minimum(gl.maximum(x, low), high)


@gluon.jit
def _rows_of(tile, call, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    first = tile.row + WARPGROUP * 64
    last = gl.minimum(first + 64, tile.rows) - 1
    offset = tile.seqlen_k - tile.rows // cfg.pack
    row = first + gl.arange(0, 64, layout=cfg.scores_row)
    position = row // cfg.pack + offset
    first_lo, first_hi = row_limits(first // cfg.pack + offset, tile.seqlen_k, call, cfg)
    last_lo, last_hi = row_limits(last // cfg.pack + offset, tile.seqlen_k, call, cfg)
    lo, hi = row_limits(position, tile.seqlen_k, call, cfg)
    begin = _clamp(first_lo // cfg.block_n, tile.block_begin, tile.block_end)
    end = _clamp(gl.cdiv(last_hi, cfg.block_n), begin, tile.block_end)
    end = gl.where(first > last, begin, end)
    return Rows(
        tile.batch,
        tile.head * cfg.pack + row % cfg.pack,
        position,
        lo,
        hi,
        tile.seqlen_k,
        begin,
        end,
        _clamp(gl.cdiv(last_lo, cfg.block_n), begin, end) - begin,
        end - _clamp(gl.maximum(first_hi, 0) // cfg.block_n, begin, end),
    )


@gluon.jit
def _adjust(
    scores,
    rows,
    block,
    masked,
    scale,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    cfg: gl.constexpr,
):
    """Everything between QK and the softmax: soft cap, score and mask functions, and the mask."""
    if cfg.has_soft_cap:
        scores = soft_cap(scores, scale, call.softcap)
    elif cfg.prescaled or score_mod is not None:
        scores = scores * scale
    if score_mod is not None or mask_mod is not None:
        columns = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(0, cfg.scores))
        kv_idx = gl.expand_dims(block * cfg.block_n + columns, 0)
        q_idx = gl.expand_dims(rows.position, 1)
        head = gl.expand_dims(rows.head, 1)
        if score_mod is not None:
            scores = score_mod(scores, rows.batch, head, q_idx, kv_idx, aux)
        if mask_mod is not None:
            visible = mask_mod(rows.batch, head, q_idx, kv_idx, aux)
            scores = gl.where(visible, scores, float("-inf"))
    if masked:
        scores = mask_scores(scores, rows.lo, rows.hi, block * cfg.block_n, cfg.left_limit)
    return scores


@gluon.jit
def _scaled(accumulator, factor, cfg: gl.constexpr):
    return rescale(accumulator, gl.convert_layout(factor, cfg.output_row, assert_trivial=True))


@gluon.jit
def _as_operand(probabilities, cfg: gl.constexpr):
    return gl.convert_layout(probabilities.to(cfg.dtype), cfg.p_operand, assert_trivial=True)


@gluon.jit
def _advance(
    buffers,
    held_q,
    slot,
    k_at,
    v_at,
    block,
    carried,
    accumulator,
    row_max,
    row_sum,
    scale,
    scale_log2,
    rows,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    MASKED: gl.constexpr,
    cfg: gl.constexpr,
):
    """PV of ``block`` together with QK of ``block`` - 1. Between calls one block is carried: as raw
    scores, or with ``overlap`` as probabilities. In float32 either way: 16-bit values that cross
    iterations are unpacked and packed again by the compiler, an eighth of all instructions."""
    MAY_BE_EMPTY: gl.constexpr = MASKED or score_mod is not None or mask_mod is not None
    if not cfg.overlap:
        carried = _adjust(carried, rows, block, MASKED, scale, call, score_mod, mask_mod, aux, cfg)
        carried, row_max, row_sum, factor = softmax_block(
            carried, row_max, row_sum, scale_log2, MAY_BE_EMPTY
        )
        accumulator = _scaled(accumulator, factor, cfg)
    p = _as_operand(carried, cfg)
    if MASKED and not cfg.exact_k:
        pipeline.await_v(buffers, v_at, cfg)
        pipeline.clear_tail(buffers, v_at.stage, rows.seqlen_k - block * cfg.block_n, cfg)
    pipeline.await_k(buffers, k_at, cfg)
    scores = pipeline.issue_qk(buffers, held_q, slot, k_at.stage, cfg)
    if not (MASKED and not cfg.exact_k):
        pipeline.await_v(buffers, v_at, cfg)
    product = warpgroup_mma(p, buffers.v.index(v_at.stage), accumulator, is_async=True)
    if cfg.overlap:
        scores = warpgroup_mma_wait(1, deps=[scores])
        pipeline.release_k(buffers, k_at)
        scores = _adjust(
            scores, rows, block - 1, MASKED, scale, call, score_mod, mask_mod, aux, cfg
        )
        carried, row_max, row_sum, factor = softmax_block(
            scores, row_max, row_sum, scale_log2, MAY_BE_EMPTY
        )
        # Without the end of a basic block ptxas sinks the softmax below the wait for PV, which undoes the
        # overlap. A wait for the next block would do, but hold this one's release up until that is there.
        pipeline.await_v_again(buffers, v_at)
        accumulator = warpgroup_mma_wait(0, deps=[product])
        pipeline.release_v(buffers, v_at)
        accumulator = _scaled(accumulator, factor, cfg)
    else:
        carried, accumulator = warpgroup_mma_wait(0, deps=[scores, product])
        pipeline.release_kv(buffers, k_at, v_at)
    k_at = pipeline.ring_step(k_at, cfg.stages)
    v_at = pipeline.ring_step(v_at, cfg.stages_v)
    return carried, accumulator, row_max, row_sum, k_at, v_at


@gluon.jit
def _release_output(buffers, order, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    """Once tile ``order``'s output has left shared memory, hand its slot back for another Q."""
    tma.store_wait(0)
    pipeline.release_q(buffers, order % cfg.q_slots * cfg.warpgroups + WARPGROUP)


@gluon.jit
def _release_previous(buffers, order, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    if cfg.q_slots > 1 and not cfg.early_q:
        if order > 0:
            _release_output(buffers, order - 1, WARPGROUP, cfg)


@gluon.jit
def mark(aux, order, WARPGROUP: gl.constexpr, K: gl.constexpr, cfg: gl.constexpr):
    if cfg.trace:
        if order < 24:
            t = gl.inline_asm_elementwise(
                "mov.u32 $0, %clock; // $1", "=r,r", [order], dtype=gl.int32, is_pure=False, pack=1
            )
            gl.store(aux + ((gl.program_id(0) * 2 + WARPGROUP) * 24 + order) * 16 + K, t)


@gluon.jit
def _attend(
    buffers,
    slot,
    order,
    k_at,
    v_at,
    tile,
    rows,
    scale,
    scale_log2,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    WARPGROUP: gl.constexpr,
    cfg: gl.constexpr,
):
    """(unnormalised output, row maxima, row sums, places of K and V) of this warpgroup's rows of a tile."""
    accumulator = gl.full([64, cfg.head_dim_v], 0.0, gl.float32, cfg.output)
    row_max = gl.full([64], float("-inf"), gl.float32, cfg.scores_row)
    row_sum = partial_sums(gl.full([64, cfg.block_n], 0.0, gl.float32, cfg.scores))
    blocks = rows.end - rows.begin
    if blocks > 0:
        k_at, v_at = pipeline.skip_blocks(buffers, k_at, v_at, tile.block_end - rows.end, cfg)
        held_q = pipeline.registers_of_q(buffers, slot, cfg)
        top = rows.end - 1
        carried = pipeline.first_scores(buffers, held_q, slot, k_at, cfg)
        k_at = pipeline.ring_step(k_at, cfg.stages)
        _release_previous(buffers, order, WARPGROUP, cfg)
        last = blocks - 1
        if cfg.overlap:
            masked = (rows.right > 0) | (rows.left >= blocks)
            carried = _adjust(
                carried, rows, top, masked, scale, call, score_mod, mask_mod, aux, cfg
            )
            carried, row_max, row_sum, _ = softmax_block(
                carried, row_max, row_sum, scale_log2, True
            )
            # Call i adjusts block i + 1 of the tile, counted from the right.
            right = _clamp(rows.right - 1, 0, last)
            left = gl.maximum(right, last - rows.left)
        else:
            right = gl.minimum(rows.right, last)
            left = _clamp(blocks - rows.left, right, last)
        if not cfg.exact_k:
            # The block that may end in a tail goes through the loop that clears it.
            right = gl.minimum(gl.maximum(right, 1), last)
            left = gl.maximum(left, right)
        for i in range(right):
            carried, accumulator, row_max, row_sum, k_at, v_at = _advance(
                buffers, held_q, slot, k_at, v_at, top - i, carried, accumulator, row_max,
                row_sum, scale, scale_log2, rows, call, score_mod, mask_mod, aux, True, cfg,
            )  # fmt: skip
        for i in range(right, left):
            carried, accumulator, row_max, row_sum, k_at, v_at = _advance(
                buffers, held_q, slot, k_at, v_at, top - i, carried, accumulator, row_max,
                row_sum, scale, scale_log2, rows, call, score_mod, mask_mod, aux, False, cfg,
            )  # fmt: skip
        if cfg.left_limit:
            for i in range(left, last):
                carried, accumulator, row_max, row_sum, k_at, v_at = _advance(
                    buffers, held_q, slot, k_at, v_at, top - i, carried, accumulator, row_max,
                    row_sum, scale, scale_log2, rows, call, score_mod, mask_mod, aux, True, cfg,
                )  # fmt: skip
        if cfg.early_q:
            pipeline.release_q(buffers, slot)
        if not cfg.overlap:
            masked = (last < rows.right) | (rows.left > 0)
            carried = _adjust(
                carried, rows, rows.begin, masked, scale, call, score_mod, mask_mod,
                aux, cfg,
            )  # fmt: skip
            carried, row_max, row_sum, factor = softmax_block(
                carried, row_max, row_sum, scale_log2, True
            )
            accumulator = _scaled(accumulator, factor, cfg)
        p = _as_operand(carried, cfg)
        pipeline.await_v(buffers, v_at, cfg)
        if not cfg.exact_k:
            seen = rows.seqlen_k - rows.begin * cfg.block_n
            pipeline.clear_tail(buffers, v_at.stage, seen, cfg)
        product = warpgroup_mma(p, buffers.v.index(v_at.stage), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=[product])
        pipeline.release_v(buffers, v_at)
        v_at = pipeline.ring_step(v_at, cfg.stages_v)
        k_at, v_at = pipeline.skip_blocks(buffers, k_at, v_at, rows.begin - tile.block_begin, cfg)
    else:
        count = tile.block_end - tile.block_begin
        k_at, v_at = pipeline.skip_blocks(buffers, k_at, v_at, count, cfg)
        _release_previous(buffers, order, WARPGROUP, cfg)
        if cfg.early_q:
            pipeline.release_q(buffers, slot)
    return accumulator, row_max, row_sum, k_at, v_at


@gluon.jit
def _write_boxes(
    staged, tile, batch, start, first_column, out_desc, COLUMNS: gl.constexpr, cfg: gl.constexpr
):
    view = staged._reinterpret(cfg.dtype, [COLUMNS // 64, 64, 64], cfg.box_smem)
    fence_async_shared()
    cta_barrier()
    row = (tile.first_row + start) // cfg.pack
    for c in gl.static_range(gl.constexpr(COLUMNS // 64)):
        box = view.index(c)._reinterpret(cfg.dtype, out_desc.block_shape, out_desc.layout)
        if cfg.pack > 1:
            tma_store(out_desc, [batch, tile.head, row, 0, first_column + c * 64], box)
        else:
            tma_store(out_desc, [batch, tile.head, row, first_column + c * 64], box)


@gluon.jit
def _rows_of_output(tile, row, out, batch, call, cfg: gl.constexpr):
    """Where rows of the tile's sequence start in ``out``."""
    token = ((tile.first_row + row) // cfg.pack).to(gl.int64)
    head = (tile.head * cfg.pack + row % cfg.pack).to(gl.int64)
    at = token * call.stride_out_row + head * call.stride_out_head
    return out + batch.to(gl.int64) * call.stride_out_batch + at


@gluon.jit
def _write_rows(
    staged, tile, batch, start, first_column, out, call, COLUMNS: gl.constexpr, cfg: gl.constexpr
):
    """Only the rows that belong to the sequence: another one's follow in memory."""
    row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, cfg.store_layout))
    column = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, cfg.store_layout))
    at = _rows_of_output(tile, row, out, batch, call, cfg)
    mask = gl.expand_dims(row < tile.rows, 1) & gl.expand_dims(column < call.head_dim_v, 0)
    values = staged.load(cfg.store_layout)
    gl.store(gl.expand_dims(at, 1) + gl.expand_dims(column, 0), values, mask=mask)
    fence_async_shared()


@gluon.jit
def _write_staged(
    staged,
    values,
    tile,
    batch,
    start,
    first_column,
    out_desc,
    out,
    call,
    cfg: gl.constexpr,
):
    """Columns of the output, from ``first_column``, by way of shared memory."""
    COLUMNS: gl.constexpr = values.shape[1]
    staged.store(values.to(cfg.dtype))
    if cfg.exact_q or start + 64 <= tile.rows:
        _write_boxes(staged, tile, batch, start, first_column, out_desc, COLUMNS, cfg)
    else:
        _write_rows(staged, tile, batch, start, first_column, out, call, COLUMNS, cfg)


@gluon.jit
def _write_through_buffer(
    buffers,
    values,
    tile,
    batch,
    start,
    out_desc,
    out,
    call,
    WARPGROUP: gl.constexpr,
    cfg: gl.constexpr,
):
    """The output in two halves, each through the buffer that is there for it."""
    parts = gl.permute(gl.reshape(values, [64, 2, cfg.out_columns]), [0, 2, 1])
    left, right = gl.split(parts)
    halves = (left, right)
    staged = buffers.out.index(WARPGROUP)
    for half in gl.static_range(2):
        tma.store_wait(0)
        cta_barrier()
        _write_staged(
            staged,
            halves[half],
            tile,
            batch,
            start,
            half * cfg.out_columns,
            out_desc,
            out,
            call,
            cfg,
        )


@gluon.jit
def _write_partial(values, tile, batch, start, out, call, cfg: gl.constexpr):
    """Float32, for a merge with the tile's other pieces."""
    row = start + gl.arange(0, 64, layout=cfg.output_row)
    column = gl.arange(0, cfg.head_dim_v, layout=gl.SliceLayout(0, cfg.output))
    out += tile.split.to(gl.int64) * call.stride_out_split
    at = _rows_of_output(tile, row, out, batch, call, cfg)
    mask = gl.expand_dims(row < tile.rows, 1) & gl.expand_dims(column < call.head_dim_v, 0)
    gl.store(gl.expand_dims(at, 1) + gl.expand_dims(column, 0), values, mask=mask)


@gluon.jit
def _descales_at(tile, call):
    """Where the two factors of the tile's keys and values are."""
    return (tile.batch * (call.num_heads // call.group) + tile.head // call.group) * 2


@gluon.jit
def _scale_of(descales, tile, call):
    """What scores are multiplied by. Above 0, for 0 times what is masked were no number."""
    scale = call.softmax_scale * gl.load(descales + _descales_at(tile, call))
    return gl.where(scale == 0.0, LEAST_SCALE, scale)


@gluon.jit
def _write(
    buffers,
    slot,
    tile,
    rows,
    accumulator,
    row_max,
    row_sum,
    out_desc,
    out,
    lse,
    sinks,
    descales,
    call,
    WARPGROUP: gl.constexpr,
    cfg: gl.constexpr,
):
    """Normalise and store this warpgroup's rows."""
    start = tile.row + WARPGROUP * 64
    row = start + gl.arange(0, 64, layout=cfg.scores_row)
    if sinks is not None:
        sink = gl.load(sinks + rows.head).to(gl.float32)
    else:
        sink = gl.full([64], float("-inf"), gl.float32, cfg.scores_row)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), cfg.scores_row, assert_trivial=True)
    factor, natural = finish(row_max, row_sum, sink)
    batch = tile.batch
    if cfg.ragged_q:
        batch = gl.to_tensor(0)
    if lse is not None:
        at = (
            batch.to(gl.int64) * call.stride_lse_batch
            + rows.head.to(gl.int64) * call.stride_lse_head
        )
        at += (tile.first_row + row) // cfg.pack
        at += tile.split.to(gl.int64) * call.stride_lse_split
        gl.store(lse + at, natural, mask=row < tile.rows)
    if descales is not None:
        factor *= gl.load(descales + _descales_at(tile, call) + 1)
    factor = gl.convert_layout(factor, cfg.output_row, assert_trivial=True)
    result = accumulator * gl.expand_dims(factor, 1)
    if cfg.split:
        if rows.begin < rows.end:
            _write_partial(result, tile, batch, start, out, call, cfg)
    elif cfg.out_columns > 0:
        _write_through_buffer(
            buffers, result, tile, batch, start, out_desc, out, call, WARPGROUP, cfg
        )
    else:
        # By way of this warpgroup's own Q buffer, which is idle now.
        staged = buffers.q.index(slot * cfg.pieces)._reinterpret(
            cfg.dtype, [64, cfg.head_dim_v], cfg.o_smem
        )
        _write_staged(staged, result, tile, batch, start, 0, out_desc, out, call, cfg)


@gluon.jit
def consume(
    buffers,
    out_desc,
    out,
    lse,
    sinks,
    descales,
    call,
    aux,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    WARPGROUP: gl.constexpr,
    cfg: gl.constexpr,
):
    """Tiles in the order the producer publishes them, until it ends the work."""
    k_at = pipeline.ring_start()
    v_at = pipeline.ring_start()
    order = gl.to_tensor(0)
    slot, tile = pipeline.await_tile(buffers, order, WARPGROUP, cfg)
    while tile.batch >= 0:
        rows = _rows_of(tile, call, WARPGROUP, cfg)
        if descales is not None:
            scale = _scale_of(descales, tile, call)
        else:
            scale = call.softmax_scale
        if cfg.has_soft_cap or cfg.prescaled or score_mod is not None:
            scale_log2 = LOG2E
        else:
            scale_log2 = scale * LOG2E
        accumulator, row_max, row_sum, k_at, v_at = _attend(
            buffers,
            slot,
            order,
            k_at,
            v_at,
            tile,
            rows,
            scale,
            scale_log2,
            call,
            score_mod,
            mask_mod,
            aux,
            WARPGROUP,
            cfg,
        )
        _write(
            buffers,
            slot,
            tile,
            rows,
            accumulator,
            row_max,
            row_sum,
            out_desc,
            out,
            lse,
            sinks,
            descales,
            call,
            WARPGROUP,
            cfg,
        )
        if cfg.q_slots == 1 and not cfg.early_q:
            _release_output(buffers, order, WARPGROUP, cfg)
        order += 1
        slot, tile = pipeline.await_tile(buffers, order, WARPGROUP, cfg)
    tma.store_wait(0)
