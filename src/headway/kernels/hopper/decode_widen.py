"""How float8 latents come into 16-bit stages.

The consumers of wide tiles multiply what lies in shared memory, as keys and as values, and there is no
room for float8 stages beside 16-bit ones. So float8 numbers are copied into the second half of the stage
that they are for, and a warpgroup widens them in place.
"""

from __future__ import annotations

from headway.kernels._triton import (
    async_copy,
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
)
from headway.kernels.hopper.decode_load import (
    first_unit,
    gather,
    k_tile,
    load_boxes,
    next_unit,
    pages_of_block,
    v_tile,
    visible,
)
from headway.kernels.hopper.decode_plan import (
    take_of,
)

#: Blocks ahead of the one that is copied, of which the L2 cache is told.
_AHEAD: gl.constexpr = gl.constexpr(3)
_PREFETCH: gl.constexpr = gl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
_WIDEN: gl.constexpr = gl.constexpr(
    "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


@gluon.jit
def _rope_arrival(stage, buffers, cfg: gl.constexpr):
    """Where the float8 rope parts of a stage arrive: (1, 1, block_n, k_width)."""
    halves = buffers.k._reinterpret(
        cfg.kv_dtype, [2 * cfg.stages, 1, 1, cfg.block_n, cfg.k_width], cfg.k_boxes
    )
    return halves.index(2 * stage + 1)


@gluon.jit
def _latent_arrival(stage, buffers, cfg: gl.constexpr):
    """Where the float8 latents of a stage arrive: (1, 1, block_n, v_width)."""
    halves = buffers.v._reinterpret(
        cfg.kv_dtype, [2 * cfg.stages, 1, 1, cfg.block_n, cfg.v_width], cfg.v_boxes
    )
    return halves.index(2 * stage + 1)


@gluon.jit
def _load_fours(tile, piece: gl.constexpr, start, span, layout: gl.constexpr, cfg: gl.constexpr):
    """A piece of a tile of float8 numbers, four in one, int32; zeros in rows of no visible key."""
    FOURS: gl.constexpr = tile.shape[3] // 4
    smem: gl.constexpr = gl.NVMMASharedLayout.get_default_for([cfg.block_n, FOURS], gl.int32)
    tile = tile._reinterpret(gl.int32, [cfg.block_n, FOURS], smem)
    SOME: gl.constexpr = layout.shape[1]
    fours = tile.slice(piece * SOME, SOME, dim=1).load(layout)
    if (start < span.lo) | (start + cfg.block_n > span.hi):
        at = start + gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, layout))
        inside = gl.expand_dims((at >= span.lo) & (at < span.hi), 1)
        fours = gl.where(inside, fours, gl.zeros_like(fours))
    return fours


@gluon.jit
def _store_widened(tile, fours, piece: gl.constexpr, cfg: gl.constexpr):
    """Float8 numbers, four in one, as float16 into a piece of a tile."""
    two, more = gl.inline_asm_elementwise(
        _WIDEN, "=r,=r,r", [fours], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    ROWS: gl.constexpr = fours.shape[0]
    TWOS: gl.constexpr = 2 * fours.shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [ROWS, tile.shape[1] // 2], gl.int32
    )
    twos = tile._reinterpret(gl.int32, [ROWS, tile.shape[1] // 2], layout)
    twos.slice(piece * TWOS, TWOS, dim=1).store(gl.join(two, more).reshape([ROWS, TWOS]))


@gluon.jit
def _widen_stage(stage, start, step, span, buffers, cfg: gl.constexpr):
    """Widen a stage's float8 numbers in place; say so when half of the latents and when all is there."""
    quarter: gl.constexpr = cfg.latent_fours
    latents = v_tile(buffers, stage, cfg)
    narrow = _latent_arrival(stage, buffers, cfg)
    if not cfg.gathered:
        mbarrier.wait(buffers.loaded.index(0), step & 1)
    a = _load_fours(narrow, 0, start, span, quarter, cfg)
    b = _load_fours(narrow, 1, start, span, quarter, cfg)
    _store_widened(latents, a, 0, cfg)
    _store_widened(latents, b, 1, cfg)
    fence_async_shared()
    mbarrier.arrive(buffers.full.index(stage * cfg.v_pieces), count=1)
    if not cfg.gathered:
        mbarrier.wait(buffers.loaded.index(1), step & 1)
    a = _load_fours(narrow, 2, start, span, quarter, cfg)
    b = _load_fours(narrow, 3, start, span, quarter, cfg)
    narrow = _rope_arrival(stage, buffers, cfg)
    rope = _load_fours(narrow, 0, start, span, gl.constexpr(cfg.rope_fours), cfg)
    cta_barrier()  # what follows is written over what was read
    _store_widened(latents, a, 2, cfg)
    _store_widened(latents, b, 3, cfg)
    _store_widened(k_tile(buffers, stage, 0, cfg), rope, 0, cfg)
    fence_async_shared()
    mbarrier.arrive(buffers.full.index(stage * cfg.v_pieces + 1), count=1)


@gluon.jit
def _announce(
    ptr,
    table,
    start,
    end,
    span,
    strides,
    COLUMNS: gl.constexpr,
    cfg: gl.constexpr,
):
    """Have the L2 cache fetch COLUMNS of the rows of a block from ``start``, line by line."""
    stride_page, stride_row, _ = strides
    LINES: gl.constexpr = 1 if COLUMNS <= 128 else cfg.v_width // 128
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    at = start + gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, layout))
    inside = (at >= span.lo) & (at < end)
    if cfg.page_size > 0:
        pages = gl.load(table + at // cfg.page_size, mask=inside, other=0)
        at = at % cfg.page_size
    else:
        pages = at * 0 + span.cache_row
    offsets = pages.to(gl.int64) * stride_page + at.to(gl.int64) * stride_row
    offsets = gl.where(inside, offsets, 0)
    lines = gl.arange(0, LINES, layout=gl.SliceLayout(0, layout)) * 128
    lines = gl.where(lines < COLUMNS, lines, 0)
    pointers = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(lines, 0)
    gl.inline_asm_elementwise(
        _PREFETCH,
        "=r,l",
        [pointers.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _copy_boxes(boxes, pages, unit, start, stage, buffers, cfg: gl.constexpr):
    """Have the copy engine bring a block, half of the latents first."""
    k_desc, v_desc, _ = boxes
    narrow = _latent_arrival(stage, buffers, cfg)
    rope = _rope_arrival(stage, buffers, cfg)
    HALF: gl.constexpr = cfg.v_box_width
    first, second = buffers.loaded.index(0), buffers.loaded.index(1)
    mbarrier.expect(first, cfg.v_piece_bytes)
    load_boxes(v_desc, pages, unit, start, 0, first, narrow.slice(0, HALF, dim=3), 0, cfg)
    mbarrier.expect(second, cfg.v_piece_bytes + cfg.k_bytes)
    load_boxes(v_desc, pages, unit, start, HALF, second, narrow.slice(HALF, HALF, dim=3), 0, cfg)
    load_boxes(k_desc, pages, unit, start, 0, second, rope, 0, cfg)


@gluon.jit
def _places(span, start, table, strides, layout: gl.constexpr, cfg: gl.constexpr):
    """Where the rows of a block from ``start`` lie, in elements, and which of them hold a visible key."""
    stride_page, stride_row, _ = strides
    at = start + gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, layout))
    seen, pages = visible(span, at, table, cfg)
    return pages.to(gl.int64) * stride_page + (at % cfg.page_size) * stride_row, seen


@gluon.jit
def _copy_rows(k_ptr, v_ptr, k_places, v_places, stage, buffers, cfg: gl.constexpr):
    """Copy a block row by row, and wait for it."""
    k_offsets, k_seen = k_places
    v_offsets, v_seen = v_places
    rope = _rope_arrival(stage, buffers, cfg)
    rope = rope._reinterpret(cfg.kv_dtype, [cfg.block_n, cfg.k_width], cfg.k_narrow)
    gather(k_ptr, rope, k_offsets, k_seen, 0, gl.constexpr(cfg.head_dim), gl.constexpr(cfg.k_rows))
    narrow = _latent_arrival(stage, buffers, cfg)
    narrow = narrow._reinterpret(cfg.kv_dtype, [cfg.block_n, cfg.v_width], cfg.v_narrow)
    for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
        gather(
            v_ptr,
            narrow.slice(piece * cfg.v_box_width, cfg.v_box_width, dim=1),
            v_offsets,
            v_seen,
            piece * cfg.v_box_width,
            gl.constexpr(cfg.head_dim_v),
            gl.constexpr(cfg.v_rows),
        )
    async_copy.commit_group()
    async_copy.wait_group(0)
    cta_barrier()


@gluon.jit
def produce_widened(boxes, rows, work, cfg: gl.constexpr):
    """Four warps: this worker's blocks in order, one stage each, copied and widened. Rows that hold no
    visible key become zeros."""
    gl.static_assert(cfg.v_pieces == 2)
    gl.static_assert(cfg.pieces == 1)
    PAGES: gl.constexpr = 0 if cfg.gathered else cfg.boxes
    num_pages = boxes[2]
    k_ptr, v_ptr, k_strides, v_strides = rows
    buffers, page_table, spans, works, units, stride_table = work
    unit, batch, span, within, left = first_unit(works, cfg)
    step = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        start = (span.first_block + first) * cfg.block_n
        end = gl.minimum(span.hi, start + count * cfg.block_n)
        k_unit = k_ptr + unit.to(gl.int64) * k_strides[2]
        v_unit = v_ptr + unit.to(gl.int64) * v_strides[2]
        table = page_table
        if cfg.page_size > 0:
            table = page_table + span.cache_row.to(gl.int64) * stride_table
        pages = pages_of_block(span, table, start, num_pages, 0, PAGES, cfg)
        for _ in range(count):
            stage = step % cfg.stages
            empty = buffers.empty.index(stage)
            if cfg.gathered:
                k_places = _places(span, start, table, k_strides, gl.constexpr(cfg.k_rows), cfg)
                v_places = _places(span, start, table, v_strides, gl.constexpr(cfg.v_rows), cfg)
                mbarrier.wait(empty, ((step // cfg.stages) & 1) ^ 1)
                _copy_rows(k_unit, v_unit, k_places, v_places, stage, buffers, cfg)
            else:
                mbarrier.wait(empty, ((step // cfg.stages) & 1) ^ 1)
                _copy_boxes(boxes, pages, unit, start, stage, buffers, cfg)
                pages = pages_of_block(span, table, start + cfg.block_n, num_pages, 0, PAGES, cfg)
                ahead = start + _AHEAD * cfg.block_n
                _announce(v_unit, table, ahead, end, span, v_strides, cfg.head_dim_v, cfg)
                _announce(k_unit, table, ahead, end, span, k_strides, cfg.head_dim, cfg)
            _widen_stage(stage, start, step, span, buffers, cfg)
            start += cfg.block_n
            step += 1
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, units, left)
