"""How float8 latents come into 16-bit stages: through the registers of a warpgroup, which widens them.

The consumers of wide tiles multiply what lies in shared memory, as keys and as values, and there is no
room for float8 stages beside 16-bit ones. So rows are loaded one by one, whatever the pages; those of the
next block are on their way while stages are full.
"""

from __future__ import annotations

from headway.kernels._triton import fence_async_shared, gl, gluon, mbarrier
from headway.kernels.hopper.decode_load import k_tile, next_unit, v_tile
from headway.kernels.hopper.decode_plan import (
    BATCH,
    LEFT,
    UNIT,
    WIDTH,
    WITHIN,
    load_span,
    take_of,
)


@gluon.jit
def _rows_at(span, at, end, table, cfg: gl.constexpr):
    """Which cache rows ``at`` hold a visible key below ``end``, and the pages of those that do."""
    inside = (at >= span.lo) & (at < end)
    if cfg.page_size > 0:
        return inside, gl.load(table + at // cfg.page_size, mask=inside, other=0)
    else:
        return inside, at * 0 + span.cache_row


@gluon.jit
def _offsets(at, pages, strides, cfg: gl.constexpr):
    """Where rows begin, in elements."""
    stride_page, stride_row = strides
    if cfg.page_size > 0:
        at = at % cfg.page_size
    return pages.to(gl.int64) * stride_page + at.to(gl.int64) * stride_row


@gluon.jit
def _load(
    ptr, offsets, inside, column, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, cfg: gl.constexpr
):
    """Rows' float8 numbers from ``column``, four in one: (block_n, WIDTH // 4) int32; zeros outside and
    from COLUMNS on."""
    columns = gl.arange(0, WIDTH // 4, layout=gl.SliceLayout(0, cfg.fours)) + column // 4
    fours = ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    pointers = fours + gl.expand_dims(offsets // 4, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < COLUMNS // 4, 0)
    # Partitions do not see what the launcher knows: rows start at multiples of 16 bytes.
    return gl.load(gl.multiple_of(pointers, [16, 16]), mask=mask, other=0)


_WIDEN: gl.constexpr = gl.constexpr(
    "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


@gluon.jit
def _store_widened(tile, fours):
    """Float8 numbers, four in one, as float16 into a tile, two in one."""
    two, more = gl.inline_asm_elementwise(
        _WIDEN, "=r,=r,r", [fours], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    ROWS: gl.constexpr = fours.shape[0]
    TWOS: gl.constexpr = 2 * fours.shape[1]
    twos = gl.join(two, more).reshape([ROWS, TWOS])
    tile.store(twos)


@gluon.jit
def _load_piece(units, at, rows, steps, piece: gl.constexpr, cfg: gl.constexpr):
    """A piece of a block: a quarter of the columns of latents, or behind those the rope part."""
    k_unit, v_unit = units
    k_steps, v_steps = steps
    inside, pages = rows
    QUARTER: gl.constexpr = cfg.v_width // 4
    if piece < 4:
        offsets = _offsets(at, pages, v_steps, cfg)
        return _load(
            v_unit, offsets, inside, piece * QUARTER, QUARTER, gl.constexpr(cfg.head_dim_v), cfg
        )
    else:
        offsets = _offsets(at, pages, k_steps, cfg)
        return _load(
            k_unit, offsets, inside, 0, gl.constexpr(cfg.k_width), gl.constexpr(cfg.head_dim), cfg
        )


@gluon.jit
def _leave_piece(fours, stage, piece: gl.constexpr, buffers, cfg: gl.constexpr):
    """Widen a piece into a stage, and say so when half of the latents, or all of the block, are there."""
    TWOS: gl.constexpr = cfg.v_width // 8
    if piece < 4:
        tile = v_tile(buffers, stage, cfg)
        tile = tile._reinterpret(gl.int32, [cfg.block_n, cfg.v_width // 2], cfg.v_twos)
        _store_widened(tile.slice(piece * TWOS, TWOS, dim=1), fours)
    else:
        tile = k_tile(buffers, stage, 0, cfg)
        _store_widened(
            tile._reinterpret(gl.int32, [cfg.block_n, cfg.k_width // 2], cfg.k_twos), fours
        )
    if piece == 1 or piece == 4:
        fence_async_shared()
        mbarrier.arrive(buffers.full.index(stage * cfg.v_pieces + piece // 4), count=1)


@gluon.jit
def produce_widened(k_ptr, v_ptr, k_strides, v_strides, work, cfg: gl.constexpr):
    """Four warps: this worker's blocks in order, one stage each. Rows of no visible key become zeros."""
    gl.static_assert(cfg.v_pieces == 2)
    gl.static_assert(cfg.pieces == 1)
    k_page, k_row, k_head = k_strides
    v_page, v_row, v_head = v_strides
    steps = (k_page, k_row), (v_page, v_row)
    buffers, page_table, spans, works, units, stride_table = work
    record = works + gl.program_id(0) // cfg.m_tiles * WIDTH
    span = load_span(record)
    batch = gl.load(record + BATCH)
    unit = gl.load(record + UNIT)
    within = gl.load(record + WITHIN)
    left = gl.load(record + LEFT)
    in_block = gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, cfg.fours))
    step = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        start = (span.first_block + first) * cfg.block_n
        end = gl.minimum(span.hi, start + count * cfg.block_n)
        table = page_table
        if cfg.page_size > 0:
            table = page_table + span.cache_row.to(gl.int64) * stride_table
        units_at = k_ptr + unit.to(gl.int64) * k_head, v_ptr + unit.to(gl.int64) * v_head
        at = start + in_block
        rows = _rows_at(span, at, end, table, cfg)
        a = _load_piece(units_at, at, rows, steps, 0, cfg)
        b = _load_piece(units_at, at, rows, steps, 1, cfg)
        c = _load_piece(units_at, at, rows, steps, 2, cfg)
        for _ in range(count):
            stage = step % cfg.stages
            ahead = _rows_at(span, at + cfg.block_n, end, table, cfg)
            mbarrier.wait(buffers.empty.index(stage), ((step // cfg.stages) & 1) ^ 1)
            # As soon as a piece has left its registers, one that is due later comes into them.
            _leave_piece(a, stage, 0, buffers, cfg)
            d = _load_piece(units_at, at, rows, steps, 3, cfg)
            _leave_piece(b, stage, 1, buffers, cfg)
            e = _load_piece(units_at, at, rows, steps, 4, cfg)
            at += cfg.block_n
            rows = ahead
            _leave_piece(c, stage, 2, buffers, cfg)
            a = _load_piece(units_at, at, rows, steps, 0, cfg)
            _leave_piece(d, stage, 3, buffers, cfg)
            b = _load_piece(units_at, at, rows, steps, 1, cfg)
            _leave_piece(e, stage, 4, buffers, cfg)
            c = _load_piece(units_at, at, rows, steps, 2, cfg)
            step += 1
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, units, left)
