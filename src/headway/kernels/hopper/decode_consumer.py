"""The decode kernel's consumer: attention of a worker's blocks by one warpgroup, unit after unit."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import (
    aggregate,
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper.decode_append import (
    fetch_new,
    is_due,
    rotary_base,
    rotated,
    write_new,
)
from headway.kernels.hopper.decode_config import TILE_ROWS as _TILE_ROWS
from headway.kernels.hopper.decode_load import (
    first_unit,
    k_tile,
    next_unit,
    v_tile,
)
from headway.kernels.hopper.decode_merge import end_unit
from headway.kernels.hopper.decode_plan import (
    take_of,
)
from headway.kernels.hopper.decode_rows import load_descale, own_columns, row_descales
from headway.kernels.hopper.masks import row_limits
from headway.kernels.hopper.softmax import LAG, LOG2E, soft_cap

TILE_ROWS: gl.constexpr = gl.constexpr(_TILE_ROWS)


@aggregate
class Call:
    """The numbers of a call. Strides are in elements."""

    units: gl.tensor  # KV heads times tiles of query rows
    num_rows: gl.tensor  # packed query rows of a KV head
    stride_q_batch: gl.tensor
    stride_q_row: gl.tensor
    stride_q_head: gl.tensor
    stride_qv_batch: gl.tensor
    stride_qv_row: gl.tensor
    stride_qv_head: gl.tensor
    stride_out_batch: gl.tensor
    stride_out_row: gl.tensor
    stride_out_head: gl.tensor
    stride_lse_batch: gl.tensor
    stride_lse_head: gl.tensor
    scale: gl.tensor
    softcap: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    chunk: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self,
        units,
        num_rows,
        stride_q_batch,
        stride_q_row,
        stride_q_head,
        stride_qv_batch,
        stride_qv_row,
        stride_qv_head,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        scale,
        softcap,
        window_left,
        window_right,
        chunk,
    ):
        self.units = units
        self.num_rows = num_rows
        self.stride_q_batch = stride_q_batch
        self.stride_q_row = stride_q_row
        self.stride_q_head = stride_q_head
        self.stride_qv_batch = stride_qv_batch
        self.stride_qv_row = stride_qv_row
        self.stride_qv_head = stride_qv_head
        self.stride_out_batch = stride_out_batch
        self.stride_out_row = stride_out_row
        self.stride_out_head = stride_out_head
        self.stride_lse_batch = stride_lse_batch
        self.stride_lse_head = stride_lse_head
        self.scale = scale
        self.softcap = softcap
        self.window_left = window_left
        self.window_right = window_right
        self.chunk = chunk


@gluon.jit
def fetch_queries(
    ptr,
    strides,
    span,
    batch,
    head,
    first_row,
    column,
    WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    layout: gl.constexpr,
    call,
    cfg: gl.constexpr,
    turn=None,
    TURNS: gl.constexpr = False,
):
    """A consumer's packed rows of a unit's queries, WIDTH columns of HEAD_DIM; zero where there is none.
    If ``TURNS`` they are rotated by ``turn``: (position of the first, angles)."""
    stride_batch, stride_row, stride_head = strides
    rows = gl.arange(0, cfg.columns, layout=gl.SliceLayout(1, layout))
    rows += first_row
    token = rows // cfg.group
    inside = (rows < call.num_rows) & (token < span.q_rows)
    offsets = (span.q_first + token).to(gl.int64) * stride_row
    offsets += batch.to(gl.int64) * stride_batch
    offsets += (head * cfg.group + rows % cfg.group) * stride_head
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)) + column
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < HEAD_DIM, 0)
    if cfg.abreast > 1:
        # Zeros in the columns of other heads, whose keys then add nothing to scores.
        offsets, own = own_columns(offsets, rows, columns, HEAD_DIM, cfg)
        mask = mask & own
    pointers = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    pointers = gl.multiple_of(pointers, [16, 16])
    queries = gl.load(pointers, mask=mask, other=0.0)
    if TURNS:
        positions = turn[0] + (token if cfg.q_turns else token * 0)
        turned = rotated(queries, ptr, offsets, inside, columns, positions, turn[1], cfg)
        queries = turned.to(queries.dtype)
    return queries


@gluon.jit
def fetch_piece(q_ptr, span, batch, head, first_row, piece, call, cfg: gl.constexpr, turn=None):
    """A piece of the queries of keys."""
    strides = call.stride_q_batch, call.stride_q_row, call.stride_q_head
    return fetch_queries(
        q_ptr,
        strides,
        span,
        batch,
        head,
        first_row,
        piece * cfg.k_width,
        gl.constexpr(cfg.k_width),
        gl.constexpr(cfg.head_dim),
        gl.constexpr(cfg.q_rows),
        call,
        cfg,
        turn,
        gl.constexpr(cfg.rotates),
    )


@gluon.jit
def _fetch_latent(qv_ptr, span, batch, head, first_row, piece, call, cfg: gl.constexpr):
    """A piece of the queries of values."""
    strides = call.stride_qv_batch, call.stride_qv_row, call.stride_qv_head
    return fetch_queries(
        qv_ptr,
        strides,
        span,
        batch,
        head,
        first_row,
        piece * cfg.v_box_width,
        gl.constexpr(cfg.v_box_width),
        gl.constexpr(cfg.head_dim_v),
        gl.constexpr(cfg.latent_rows),
        call,
        cfg,
    )


@gluon.jit
def _as_multiplied(queries, factor, WIDTH: gl.constexpr, cfg: gl.constexpr):
    """Queries (columns, WIDTH) times ``factor`` where they are scaled, in the dtype and order of keys."""
    if cfg.scaled:
        queries = queries.to(gl.float32) * factor
    if cfg.narrow:  # columns in the order of widened keys
        queries = queries.reshape([cfg.columns, WIDTH // 16, 4, 2, 2])
        queries = queries.permute((0, 1, 3, 2, 4)).reshape([cfg.columns, WIDTH])
    return queries.to(cfg.dtype)


@gluon.jit
def _largest(queries):
    """The largest magnitude of a tile."""
    wide = queries.to(gl.float32)
    return gl.max(gl.max(gl.maximum(wide, -wide), 1), 0)


@gluon.jit
def load_queries(
    q_ptr, qv_ptr, buffers, span, batch, head, first_row, half, call, cfg: gl.constexpr, turn=None
):
    """A unit's queries into shared memory; all threads sync.

    Returns what scores must be multiplied by because of how the queries were stored.
    """
    factor = 1.0
    if cfg.scaled:
        largest = 0.0
        for piece in gl.static_range(gl.constexpr(cfg.pieces)):
            queries = fetch_piece(q_ptr, span, batch, head, first_row, piece, call, cfg, turn)
            largest = gl.maximum(largest, _largest(queries))
        if cfg.latent:
            for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
                queries = _fetch_latent(qv_ptr, span, batch, head, first_row, piece, call, cfg)
                largest = gl.maximum(largest, _largest(queries))
        # A power of two: float16 then holds all eight bits of a bfloat16 down to 2^-29 of the largest.
        factor = gl.where(largest > 0.0, gl.exp2(14.0 - gl.floor(gl.log2(largest))), 1.0)
    for piece in gl.static_range(gl.constexpr(cfg.pieces)):
        queries = fetch_piece(q_ptr, span, batch, head, first_row, piece, call, cfg, turn)
        queries = _as_multiplied(queries, factor, gl.constexpr(cfg.k_width), cfg)
        buffers.q.index(half * cfg.pieces + piece).store(queries)
    if cfg.latent:
        for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
            queries = _fetch_latent(qv_ptr, span, batch, head, first_row, piece, call, cfg)
            queries = _as_multiplied(queries, factor, gl.constexpr(cfg.v_box_width), cfg)
            tile = buffers.latent.index(half)
            tile.slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1).store(queries)
    fence_async_shared()
    cta_barrier()
    return 1.0 / factor


@gluon.jit
def begin_unit(
    tensors,
    buffers,
    new,
    span,
    batch,
    unit,
    first,
    count,
    first_row,
    half: gl.constexpr,
    call,
    cfg: gl.constexpr,
):
    """A unit's queries into shared memory, and new rows that this worker's blocks hold into the cache.

    Returns what scores must be multiplied by because of how the queries were stored.
    """
    q_ptr, qv_ptr, descales = tensors[0], tensors[1], tensors[5]
    if cfg.new_tokens > 0 and half == 0:
        # Before the queries, so that all loads are under way together.
        rows = fetch_new(new, descales, span, batch, unit, first, count, cfg)
    if cfg.rotates:
        turn = rotary_base(span, new, batch), new[1]
        unscale = load_queries(
            q_ptr, qv_ptr, buffers, span, batch, unit, first_row, half, call, cfg, turn
        )
    else:
        unscale = load_queries(
            q_ptr, qv_ptr, buffers, span, batch, unit, first_row, half, call, cfg
        )
    if cfg.new_tokens > 0 and half == 0:
        if is_due(span, first, count, cfg):
            write_new(rows, new[2], unit, cfg)
            mbarrier.arrive(buffers.written, count=1)
    return unscale


@gluon.jit
def clear_outside(tile, start, lo, hi, cfg: gl.constexpr):
    """Zero the rows of a block of values outside [lo, hi): they may hold NaN, and 0 · NaN is NaN."""
    ROWS: gl.constexpr = min(cfg.stage_keys, 8192 // cfg.v_width)
    for part in gl.static_range(cfg.stage_keys // ROWS):
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, cfg.v_rows)) + start + part * ROWS
        some = tile.slice(part * ROWS, ROWS)
        values = some.load(cfg.v_rows)
        inside = gl.expand_dims((rows >= lo) & (rows < hi), 1)
        some.store(gl.where(inside, values, gl.zeros_like(values)))
    fence_async_shared()
    cta_barrier()


@gluon.jit
def load_scales(descales, batch, head, cfg: gl.constexpr):
    """What float8 tensors multiply: (all scores, scores of keys, scores of latents, output)."""
    q_descale, k_descale, v_descale = descales
    of_keys = load_descale(q_descale, batch, head) * load_descale(k_descale, batch, head)
    of_values = load_descale(v_descale, batch, head)
    if cfg.parted:
        return 1.0, of_keys, of_values, of_values
    else:
        return of_keys, 1.0, 1.0, of_values


@gluon.jit
def load_row_scales(descales, batch, unit, rows, cfg: gl.constexpr):
    """The same for each packed row, where KV heads are read as one: (scores, output)."""
    q_descale, k_descale, v_descale = descales
    of_scores = row_descales(q_descale, batch, unit, rows, cfg)
    of_scores *= row_descales(k_descale, batch, unit, rows, cfg)
    return of_scores, row_descales(v_descale, batch, unit, rows, cfg)


#: Two pairs of float8 numbers, neighbours in a thread, as float16: the first pair, the second pair.
_WIDEN: gl.constexpr = gl.constexpr(
    "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)
#: The same, transposed: the first of each pair, the second of each.
_WIDEN_ACROSS: gl.constexpr = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


@gluon.jit
def _widen(pairs, ASM: gl.constexpr):
    """Pairs of float8 numbers, (m, n) int16, as (m, n, 2) float16."""
    first, second = gl.inline_asm_elementwise(
        ASM, "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )
    return gl.join(first, second)


@gluon.jit
def _keys(stage, piece, buffers, cfg: gl.constexpr):
    """A stage's keys as wgmma's first operand: in shared memory, or widened in registers, columns of each
    16 in another order: column 4t + 2h + b at 8h + 2t + b."""
    tile = k_tile(buffers, stage, piece, cfg)
    if cfg.narrow:
        pairs = tile._reinterpret(gl.int16, [cfg.block_n, cfg.k_width // 2], cfg.k_pairs)
        keys = _widen(pairs.load(cfg.k_pair_layout), _WIDEN)
        keys = keys.reshape([cfg.block_n, cfg.k_width // 16, 8, 2]).permute((0, 1, 3, 2))
        keys = keys.reshape([cfg.block_n, cfg.k_width])
        return gl.convert_layout(keys, cfg.operand, assert_trivial=True)
    else:
        return tile


@gluon.jit
def _values(stage, start, buffers, span, cfg: gl.constexpr):
    """A stage's values, transposed, as wgmma's first operand; rows that may hold anything are zeros.

    Widened ones have rows of each 16 in another order; see :func:`_packed_rows`.
    """
    tile = v_tile(buffers, stage, cfg)
    # A gathering producer has cleared them.
    cut = (start < span.lo) | (start + cfg.block_n > span.hi) if not cfg.gathered else False
    if cfg.narrow:
        return _widened_values(stage, 0, start, cut, buffers, span, cfg)
    else:
        if cut:
            clear_outside(tile, start, span.lo, span.hi, cfg)
        return tile.permute((1, 0))


@gluon.jit
def _latent_pairs(stage, piece: gl.constexpr, buffers, layout: gl.constexpr, cfg: gl.constexpr):
    """A piece of a stage's float8 values, two neighbours in one number."""
    PAIRS: gl.constexpr = cfg.widen_width // 2
    pairs = v_tile(buffers, stage, cfg)
    pairs = pairs._reinterpret(gl.int16, [cfg.block_n, cfg.v_width // 2], cfg.v_pairs)
    return pairs.slice(piece * PAIRS, PAIRS, dim=1).load(layout)


@gluon.jit
def _widened_values(stage, piece: gl.constexpr, start, cut, buffers, span, cfg: gl.constexpr):
    """A piece of a stage's float8 values, transposed and widened, as wgmma's first operand; where
    the block is ``cut``, rows that may hold anything are zeros."""
    layout: gl.constexpr = cfg.v_pair_layout
    pairs = _latent_pairs(stage, piece, buffers, layout, cfg)
    if cut:
        rows = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, layout)) + start
        inside = gl.expand_dims((rows >= span.lo) & (rows < span.hi), 1)
        pairs = gl.where(inside, pairs, gl.zeros_like(pairs))
    values = _widen(pairs, _WIDEN_ACROSS)
    values = values.reshape([cfg.block_n, cfg.widen_width // 16, 8, 2]).permute((1, 3, 2, 0))
    values = values.reshape([cfg.widen_width, cfg.block_n])
    return gl.convert_layout(values, cfg.operand, assert_trivial=True)


@gluon.jit
def _widened_latents(stage, piece: gl.constexpr, step, buffers, cfg: gl.constexpr):
    """A piece of a stage's float8 latents as keys, widened, once it is there."""
    WAITS: gl.constexpr = cfg.widen_pieces // cfg.v_pieces
    if piece % WAITS == 0:
        wait_full(stage, piece // WAITS, step, buffers, cfg)
    pairs = _latent_pairs(stage, piece, buffers, gl.constexpr(cfg.latent_pair_layout), cfg)
    keys = _widen(pairs, _WIDEN)
    keys = keys.reshape([cfg.block_n, cfg.widen_width // 16, 8, 2]).permute((0, 1, 3, 2))
    keys = keys.reshape([cfg.block_n, cfg.widen_width])
    return gl.convert_layout(keys, cfg.operand, assert_trivial=True)


@gluon.jit
def _score_narrow_latents(scores, stage, step, half, buffers, cfg: gl.constexpr):
    """Scores of a stage's float8 latents. A piece is widened while products with the one before run."""
    WIDTH: gl.constexpr = cfg.widen_width
    latent = buffers.latent.index(opaque(half, step))
    before = _widened_latents(stage, 0, step, buffers, cfg)
    q = latent.slice(0, WIDTH, dim=1).permute((1, 0))
    scores = warpgroup_mma(before, q, scores, use_acc=False, is_async=True)
    for piece in gl.static_range(1, gl.constexpr(cfg.widen_pieces)):
        keys = _widened_latents(stage, piece, step, buffers, cfg)
        q = latent.slice(piece * WIDTH, WIDTH, dim=1).permute((1, 0))
        scores = warpgroup_mma(keys, q, scores, is_async=True)
        warpgroup_mma_wait(1, deps=(before,))
        before = keys
    scores, _ = warpgroup_mma_wait(0, deps=(scores, before))
    return scores


@gluon.jit
def _add_narrow_latents(acc, p, stage, start, buffers, span, cfg: gl.constexpr):
    """Add a stage's float8 latents times probabilities, and free the stage. A piece is widened while
    products with the one before run: there are not enough registers for all."""
    # A gathering producer has cleared rows that may hold anything.
    cut = (start < span.lo) | (start + cfg.block_n > span.hi) if not cfg.gathered else False
    lower, upper = acc.reshape([2, 2, cfg.widen_width, cfg.columns]).permute((2, 3, 1, 0)).split()
    first, second = lower.split()
    third, fourth = upper.split()
    first_values = _widened_values(stage, 0, start, cut, buffers, span, cfg)
    first = _add_piece(first, first_values, p, cfg)
    values = _widened_values(stage, 1, start, cut, buffers, span, cfg)
    second = _add_piece(second, values, p, cfg)
    first, _ = warpgroup_mma_wait(1, deps=(first, first_values))
    third_values = _widened_values(stage, 2, start, cut, buffers, span, cfg)
    third = _add_piece(third, third_values, p, cfg)
    second, _ = warpgroup_mma_wait(1, deps=(second, values))
    values = _widened_values(stage, 3, start, cut, buffers, span, cfg)
    mbarrier.arrive(buffers.empty.index(stage), count=1)
    fourth = _add_piece(fourth, values, p, cfg)
    third, fourth, _, _ = warpgroup_mma_wait(0, deps=(third, fourth, third_values, values))
    acc = gl.join(gl.join(first, second), gl.join(third, fourth)).permute((3, 2, 0, 1))
    acc = acc.reshape([cfg.v_width, cfg.columns])
    return gl.convert_layout(acc, cfg.product, assert_trivial=True)


@gluon.jit
def _add_piece(acc, values, p, cfg: gl.constexpr):
    """Begin to add a piece of values times probabilities to its rows of the output."""
    acc = gl.convert_layout(acc, cfg.product, assert_trivial=True)
    return warpgroup_mma(values, p, acc, is_async=True)


@gluon.jit
def _packed_rows(acc, cfg: gl.constexpr):
    """An accumulator, (v_width, columns), as (columns, v_width), columns of values in their own order."""
    if cfg.narrow:
        acc = acc.reshape([cfg.v_width // 16, 2, 8, cfg.columns])
        return acc.permute((3, 0, 2, 1)).reshape([cfg.columns, cfg.v_width])
    else:
        return acc.permute((1, 0))


@gluon.jit
def _mask(scores, lo, hi, start, cfg: gl.constexpr):
    """``scores``, with -inf where the key is outside the row's [lo, hi)."""
    keys = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, cfg.product)) + start
    keys = gl.expand_dims(keys, 1)
    visible = keys < gl.expand_dims(hi, 0)
    if cfg.left_limit:
        visible &= keys >= gl.expand_dims(lo, 0)
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _partial_sums(probabilities, cfg: gl.constexpr):
    """Sums over keys as far as one thread holds them, (4, 8, columns): the threads' are added once per
    unit."""
    parts = probabilities.reshape([cfg.block_n // 64, 4, 2, 8, cfg.columns])
    return gl.sum(gl.sum(parts, 0), 1)


@gluon.jit
def _column_max(scores, cfg: gl.constexpr):
    """Largest score of every packed row. Warps hand theirs to one another once, through one barrier: a
    reduction over the keys at once would take two."""
    by_warp = scores.reshape([cfg.block_n // 64, 4, 2, 8, cfg.columns])
    by_warp = gl.max(gl.max(gl.max(by_warp, 0), 1), 1)
    largest = gl.max(gl.convert_layout(by_warp, cfg.warps), 0)
    return gl.convert_layout(largest, cfg.row, assert_trivial=True)


@gluon.jit
def _softmax_block(scores, row_max, row_sum, scale_log2, cfg: gl.constexpr):
    """One block of scores: (probabilities, row_max, row_sum, factor for what was accumulated before).

    ``row_max`` is in units of log2 and may lag the true one by LAG; -inf: the row has seen nothing.
    """
    block_max = gl.maximum(row_max, _column_max(scores, cfg) * scale_log2)
    row_max_new = gl.where(block_max - row_max > LAG, block_max, row_max)
    shift = gl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    factor = gl.exp2(row_max - shift)
    probabilities = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 0))
    by_thread: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, row_sum.type.layout))
    thread_factor = gl.convert_layout(factor, by_thread, assert_trivial=True)
    row_sum *= gl.expand_dims(gl.expand_dims(thread_factor, 0), 0)
    return probabilities, row_max_new, row_sum + _partial_sums(probabilities, cfg), factor


@gluon.jit
def wait_full(stage, piece, step, buffers, cfg: gl.constexpr):
    """Wait for a piece of a stage; the first comes with the keys."""
    mbarrier.wait(buffers.full.index(stage * cfg.v_pieces + piece), (step // cfg.stages) & 1)
    if cfg.gathered and not cfg.widened:
        fence_async_shared()


@gluon.jit
def opaque(index, step):
    """``index``, in a way that changes with the step as far as the compiler knows: the addresses of all
    pieces of queries, which never change, it would keep in registers that it lacks."""
    return index + (step >> 30)


@gluon.jit
def latent_piece(stage, piece, step, buffers, cfg: gl.constexpr):
    """A stage's (block_n, v_box_width) piece of latents, once it is there."""
    wait_full(stage, piece, step, buffers, cfg)
    return v_tile(buffers, stage, cfg).slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1)


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
    """Scaled scores of a block, keys as rows, through the call's functions."""
    keys = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, cfg.product)) + (start - span.pad)
    keys = gl.expand_dims(keys, 1)
    q_idx = gl.expand_dims(positions, 0)
    heads = gl.expand_dims(heads, 0)
    if score_mod is not None:
        scores = score_mod(scores, batch, heads, q_idx, keys, aux)
    if mask_mod is not None:
        visible = mask_mod(batch, heads, q_idx, keys, aux)
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def _attend_block(
    acc,
    row_max,
    row_sum,
    lo,
    hi,
    scale,
    part_scales,
    start,
    step,
    half,
    buffers,
    span,
    batch,
    heads,
    positions,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    cfg: gl.constexpr,
):
    """Take one block of keys and values in, and free its stage: returns (acc, row_max, row_sum)."""
    stage = step % cfg.stages
    if not cfg.latent:
        wait_full(stage, 0, step, buffers, cfg)
    scores = gl.full([cfg.block_n, cfg.columns], 0.0, gl.float32, cfg.product)
    if cfg.latent and cfg.narrow:
        scores = _score_narrow_latents(scores, stage, step, half, buffers, cfg)
    elif cfg.latent:
        for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
            keys = latent_piece(stage, piece, step, buffers, cfg)
            q = buffers.latent.index(opaque(half, step))
            q = q.slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1).permute((1, 0))
            scores = warpgroup_mma(keys, q, scores, use_acc=piece > 0, is_async=True)
    if cfg.parted:
        latent_scores = warpgroup_mma_wait(0, deps=(scores,)) * part_scales[1]
        scores = gl.full([cfg.block_n, cfg.columns], 0.0, gl.float32, cfg.product)
    for piece in gl.static_range(gl.constexpr(cfg.pieces)):
        q = buffers.q.index(half * cfg.pieces + piece).permute((1, 0))
        keys = _keys(stage, piece, buffers, cfg)
        more = (cfg.latent and not cfg.parted) or piece > 0
        scores = warpgroup_mma(keys, q, scores, use_acc=more, is_async=True)
        if cfg.narrow and piece + 1 < cfg.pieces:
            # Products run on the registers that hold widened keys: those stay as they are meanwhile.
            scores, _ = warpgroup_mma_wait(0, deps=(scores, keys))
    if not cfg.latent:
        values = _values(stage, start, buffers, span, cfg)
    if cfg.narrow:
        scores, _ = warpgroup_mma_wait(0, deps=(scores, keys))
        if not cfg.latent:
            mbarrier.arrive(buffers.empty.index(stage), count=1)
    else:
        scores = warpgroup_mma_wait(0, deps=(scores,))
    if cfg.parted:
        scores = scores * part_scales[0] + latent_scores
    if cfg.latent and not cfg.narrow:
        values = _values(stage, start, buffers, span, cfg)
    if cfg.abreast > 1:  # rows have scales of their own
        scores *= gl.expand_dims(scale, 0)
        scale = 1.0
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
        scores = _mask(scores, lo, hi, start, cfg)
    p, row_max, row_sum, factor = _softmax_block(scores, row_max, row_sum, scale_log2, cfg)
    acc *= gl.expand_dims(factor, 0)
    p_smem = buffers.p.index(half)
    p_smem.store(p.to(cfg.dtype).permute((1, 0)))
    fence_async_shared()
    cta_barrier()
    if cfg.latent and cfg.narrow:
        acc = _add_narrow_latents(acc, p_smem.permute((1, 0)), stage, start, buffers, span, cfg)
    else:
        acc = warpgroup_mma(values, p_smem.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    if not cfg.narrow:
        mbarrier.arrive(buffers.empty.index(stage), count=1)
    return acc, row_max, row_sum


@gluon.jit
def _hand_twin(acc, row_max, row_sum, turn, buffers):
    """Hand the other consumer what was made of every other block of a unit."""
    mbarrier.wait(buffers.taken, (turn & 1) ^ 1)
    buffers.exchange.store(acc)
    buffers.row_numbers.index(0).store(row_max)
    buffers.row_numbers.index(1).store(row_sum)
    mbarrier.arrive(buffers.handed, count=1)


@gluon.jit
def _take_twin(acc, row_max, row_sum, turn, buffers, cfg: gl.constexpr):
    """(acc, row_max, row_sum) with what the other consumer made of the blocks between."""
    mbarrier.wait(buffers.handed, turn & 1)
    other = buffers.exchange.load(cfg.product)
    other_max = buffers.row_numbers.index(0).load(cfg.row)
    other_sum = buffers.row_numbers.index(1).load(cfg.row)
    mbarrier.arrive(buffers.taken, count=1)
    new_max = gl.maximum(row_max, other_max)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    factor, other_factor = gl.exp2(row_max - shift), gl.exp2(other_max - shift)
    acc = acc * gl.expand_dims(factor, 0) + other * gl.expand_dims(other_factor, 0)
    return acc, new_max, row_sum * factor + other_sum * other_factor


@gluon.jit
def consume(
    tensors,
    buffers,
    parts,
    call,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    aux,
    new,
    half: gl.constexpr,
    cfg: gl.constexpr,
):
    """One warpgroup: attention of its half, or all, of the rows of this worker's blocks, by unit."""
    descales, spans, works, share_ptr = tensors[5:]
    worker = gl.program_id(0) // cfg.m_tiles
    tile = gl.program_id(0) % cfg.m_tiles
    unit, batch, span, within, left = first_unit(works, cfg)
    share = gl.load(share_ptr)
    line = worker * share
    step = 0
    tile_row = tile * TILE_ROWS
    # Twins have the same rows, and blocks of their own parity.
    first_row = tile_row if cfg.twin else tile_row + half * cfg.columns
    STRIDE: gl.constexpr = 2 if cfg.twin else 1
    turn = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        unscale = begin_unit(
            tensors, buffers, new, span, batch, unit, first, count, first_row, half, call, cfg
        )
        rows = first_row + gl.arange(0, cfg.columns, layout=cfg.row)
        if cfg.abreast > 1:
            of_scores, v_scale = load_row_scales(descales, batch, unit, rows, cfg)
            of_keys, of_latents = 1.0, 1.0
        else:
            of_scores, of_keys, of_latents, v_scale = load_scales(descales, batch, unit, cfg)
        scale = call.scale * unscale * of_scores
        heads = unit * cfg.group + rows % cfg.group
        positions = span.position + rows // cfg.group
        lo, hi = row_limits(positions, span.keys, call, cfg)
        lo = gl.maximum(lo, 0) + span.pad
        hi += span.pad
        acc = gl.full([cfg.v_width, cfg.columns], 0.0, gl.float32, cfg.product)
        row_max = gl.full([cfg.columns], float("-inf"), gl.float32, cfg.row)
        none = gl.full([cfg.block_n, cfg.columns], 0.0, gl.float32, cfg.product)
        thread_sum = _partial_sums(none, cfg)
        mine = (step + half) & 1 if cfg.twin else 0
        start = (span.first_block + first + mine) * cfg.block_n
        for i in range(mine, count, STRIDE):
            acc, row_max, thread_sum = _attend_block(
                acc,
                row_max,
                thread_sum,
                lo,
                hi,
                scale,
                (of_keys, of_latents),
                start,
                step + i,
                half,
                buffers,
                span,
                batch,
                heads,
                positions,
                call,
                score_mod,
                mask_mod,
                aux,
                cfg,
            )
            start += STRIDE * cfg.block_n
        step += count

        row_sum = gl.convert_layout(gl.sum(gl.sum(thread_sum, 1), 0), cfg.row)
        if cfg.twin and half == 0:
            acc, row_max, row_sum = _take_twin(acc, row_max, row_sum, turn, buffers, cfg)
        elif cfg.twin:
            _hand_twin(acc, row_max, row_sum, turn, buffers)
        turn += 1
        if not cfg.twin or half == 0:
            out = _packed_rows(acc, cfg)
            columns = gl.arange(0, cfg.v_width, layout=gl.SliceLayout(0, out.type.layout))
            end_unit(
                tensors,
                parts,
                out,
                row_max,
                row_sum,
                rows,
                columns,
                v_scale,
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
