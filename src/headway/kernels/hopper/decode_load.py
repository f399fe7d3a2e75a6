"""How the decode kernel's producer brings blocks of keys and values into shared memory.

Boxes: the copy engine takes ``box_rows`` rows at a time, a whole block where pages are at least that long
or there are none. Gathered: four warps copy rows one by one through their page numbers, for pages too
short (or too odd) for boxes.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import (
    aggregate,
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    rows_load,
    tma_load,
)
from headway.kernels.hopper.decode_append import due_from, is_due
from headway.kernels.hopper.decode_plan import BATCH, LEFT, UNIT, WIDTH, WITHIN, load_span, take_of


@aggregate
class Buffers:
    """Shared memory of a worker: ``full`` and ``empty`` count the stages of keys and values."""

    q: gl.shared_memory_descriptor  # (consumers * pieces, columns, k_width)
    latent: gl.shared_memory_descriptor  # (consumers, columns, v_width), queries of values
    p: gl.shared_memory_descriptor  # (consumers, columns, block_n), probabilities of a block
    k: gl.shared_memory_descriptor  # (stages * pieces, 1, 1, block_n, k_width)
    v: gl.shared_memory_descriptor  # (stages, 1, 1, block_n, v_width)
    full: gl.shared_memory_descriptor  # (stages * v_pieces, 1)
    empty: gl.shared_memory_descriptor  # (stages, 1)
    row_numbers: gl.shared_memory_descriptor  # (2, 64) float32, of a block
    handed: gl.shared_memory_descriptor  # (1,): probabilities and row numbers are there
    taken: gl.shared_memory_descriptor  # (1,): they may be overwritten
    written: gl.shared_memory_descriptor  # (1,): new rows of a unit are in the cache
    loaded: gl.shared_memory_descriptor  # (2, 1): halves of what is to be widened are there
    exchange: gl.shared_memory_descriptor  # (v_width, columns) float32, a twin's output

    @gluon.constexpr_function
    def __init__(
        self, q, latent, p, k, v, full, empty, row_numbers, handed, taken, loaded, exchange, written
    ):
        self.q = q
        self.latent = latent
        self.p = p
        self.k = k
        self.v = v
        self.full = full
        self.empty = empty
        self.row_numbers = row_numbers
        self.handed = handed
        self.taken = taken
        self.written = written
        self.loaded = loaded
        self.exchange = exchange


@gluon.jit
def allocate(cfg: gl.constexpr):
    """Buffers, with their barriers set up."""
    row_sets: gl.constexpr = 1 if cfg.wide else cfg.consumers
    q_shape: gl.constexpr = [row_sets * cfg.pieces, cfg.columns, cfg.k_width]
    q = gl.allocate_shared_memory(cfg.dtype, q_shape, cfg.q_smem)
    latent = q
    if cfg.latent:
        latent_shape: gl.constexpr = [row_sets, cfg.columns, cfg.v_width]
        latent = gl.allocate_shared_memory(cfg.dtype, latent_shape, cfg.latent_smem)
    p_shape: gl.constexpr = [row_sets, cfg.columns, cfg.block_n]
    p = gl.allocate_shared_memory(cfg.dtype, p_shape, cfg.p_smem)
    k_shape: gl.constexpr = [cfg.stages * cfg.pieces, 1, 1, cfg.block_n, cfg.k_width]
    k = gl.allocate_shared_memory(cfg.stage_dtype, k_shape, cfg.k_smem)
    v_shape: gl.constexpr = [cfg.stages, 1, 1, cfg.block_n, cfg.v_width]
    v = gl.allocate_shared_memory(cfg.stage_dtype, v_shape, cfg.v_smem)
    fulls: gl.constexpr = cfg.stages * cfg.v_pieces
    full = gl.allocate_shared_memory(gl.int64, [fulls, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(gl.constexpr(cfg.stages)):
        for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
            mbarrier.init(full.index(stage * cfg.v_pieces + piece), count=cfg.full_count)
        mbarrier.init(empty.index(stage), count=1 if cfg.twin else cfg.consumers)
    row_numbers = full
    handed = full
    taken = full
    loaded = full
    exchange = full
    if cfg.twin:
        shape: gl.constexpr = [cfg.v_width, cfg.columns]
        exchange = gl.allocate_shared_memory(gl.float32, shape, cfg.exchange)
    if cfg.wide or cfg.twin:
        row_numbers = gl.allocate_shared_memory(gl.float32, [2, cfg.columns], cfg.row_numbers)
        barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        handed = barriers.index(0)
        taken = barriers.index(1)
        mbarrier.init(handed, count=1)
        mbarrier.init(taken, count=1 if cfg.twin else 2)
    if cfg.widened:
        loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(loaded.index(0), count=1)
        mbarrier.init(loaded.index(1), count=1)
    written = full
    if cfg.new_tokens > 0:
        barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        written = barrier.index(0)
        mbarrier.init(written, count=1)
    fence_async_shared()
    return Buffers(
        q, latent, p, k, v, full, empty, row_numbers, handed, taken, loaded, exchange, written
    )


@gluon.jit
def k_tile(buffers, stage, piece, cfg: gl.constexpr):
    """One stage's (block_n, k_width) piece of keys."""
    tile = buffers.k.index(stage * cfg.pieces + piece)
    return tile._reinterpret(cfg.stage_dtype, [cfg.block_n, cfg.k_width], cfg.k_stage)


@gluon.jit
def v_tile(buffers, stage, cfg: gl.constexpr):
    """One stage's (block_n, v_width) values."""
    return buffers.v.index(stage)._reinterpret(
        cfg.stage_dtype, [cfg.block_n, cfg.v_width], cfg.v_stage
    )


@gluon.jit
def first_unit(works, cfg: gl.constexpr):
    """Where this worker begins: the unit, its sequence and its Span, places of the unit that others have
    before it, and places that it takes in all."""
    record = works + gl.program_id(0) // cfg.m_tiles * WIDTH
    span = load_span(record)
    batch = gl.load(record + BATCH)
    unit = gl.load(record + UNIT)
    return unit, batch, span, gl.load(record + WITHIN), gl.load(record + LEFT)


@gluon.jit
def next_unit(unit, batch, span, spans, units, left):
    """The unit after this one, its sequence and its Span; sequences follow one another."""
    unit += 1
    if unit == units:
        unit = 0
        batch += 1
        if left > 0:
            span = load_span(spans + batch * WIDTH)
    return unit, batch, span


@gluon.jit
def wait_written(end, due, turn, buffers, cfg: gl.constexpr):
    """Before a block that ends at ``end`` is read: wait until its new rows are in the cache."""
    if cfg.new_tokens > 0:
        mbarrier.wait(buffers.written, turn & 1, pred=end >= due)


@gluon.jit
def pages_of_block(
    span, table, start, num_pages, FIRST: gl.constexpr, COUNT: gl.constexpr, cfg: gl.constexpr
):
    """Page numbers of COUNT of a block's boxes, from FIRST; one past the last page, which reads as zeros,
    for boxes that hold no visible key, because their entries of the page table may be anything."""
    pages = ()
    for box in gl.static_range(FIRST, FIRST + COUNT):
        if cfg.page_size == 0:
            pages = pages + (span.cache_row,)  # type: ignore[assignment] # noqa: RUF005 (Gluon adds tuples)
        else:
            at = start + box * cfg.box_rows
            needed = (at < span.hi) & (at + cfg.box_rows > span.lo)
            page = gl.load(table + at // cfg.page_size, mask=needed, other=num_pages)
            pages = pages + (page,)  # type: ignore[assignment] # noqa: RUF005
    return pages


@gluon.jit
def load_boxes(
    desc, pages, head, start, column, barrier, smem, FIRST: gl.constexpr, cfg: gl.constexpr
):
    """Copy boxes of one block, as many as there are ``pages``, columns from ``column``, into a
    (1, 1, block_n, width) tile."""
    for box in gl.static_range(FIRST, FIRST + len(pages)):
        row = start + box * cfg.box_rows
        if cfg.page_size > 0:
            row = row % cfg.page_size
        tile = smem.slice(box * cfg.box_rows, cfg.box_rows, dim=2)
        tma_load(desc, [pages[box - FIRST], head, row, column], barrier, tile)


@gluon.jit
def produce_boxes(k_desc, v_desc, num_pages, work, PRODUCER: gl.constexpr, cfg: gl.constexpr):
    """One warp: this worker's blocks in order, one stage each, keys and values on one barrier. Several
    producers share the boxes of keys, and others those of values: asking for a box takes time."""
    SHARERS: gl.constexpr = max(cfg.producers // 2, 1)
    BOXES: gl.constexpr = cfg.boxes // SHARERS
    FIRST: gl.constexpr = PRODUCER % SHARERS * BOXES
    KEYS: gl.constexpr = cfg.producers == 1 or PRODUCER < SHARERS
    VALUES: gl.constexpr = cfg.producers == 1 or PRODUCER >= SHARERS
    k_bytes: gl.constexpr = cfg.k_bytes // SHARERS if KEYS else 0
    v_bytes: gl.constexpr = cfg.v_piece_bytes // SHARERS if VALUES else 0
    buffers, page_table, spans, works, units, stride_table = work
    unit, batch, span, within, left = first_unit(works, cfg)
    step = 0
    turn = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        due = due_from(span, first, count, cfg)
        start = (span.first_block + first) * cfg.block_n
        table = page_table
        if cfg.page_size > 0:
            table = page_table + span.cache_row.to(gl.int64) * stride_table
        pages = pages_of_block(span, table, start, num_pages, FIRST, BOXES, cfg)
        for _ in range(count):
            after = start + cfg.block_n
            ahead = pages_of_block(span, table, after, num_pages, FIRST, BOXES, cfg)
            stage = step % cfg.stages
            wait_written(after, due, turn, buffers, cfg)
            mbarrier.wait(buffers.empty.index(stage), ((step // cfg.stages) & 1) ^ 1)
            full = buffers.full.index(stage * cfg.v_pieces)
            mbarrier.expect(full, k_bytes + v_bytes)
            if KEYS:
                for piece in gl.static_range(gl.constexpr(cfg.pieces)):
                    k = buffers.k.index(stage * cfg.pieces + piece)
                    load_boxes(k_desc, pages, unit, start, piece * cfg.k_width, full, k, FIRST, cfg)
            if VALUES:
                for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
                    full = buffers.full.index(stage * cfg.v_pieces + piece)
                    if piece > 0:
                        mbarrier.expect(full, v_bytes)
                    v = buffers.v.index(stage)
                    v = v.slice(piece * cfg.v_box_width, cfg.v_box_width, dim=3)
                    load_boxes(
                        v_desc, pages, unit, start, piece * cfg.v_box_width, full, v, FIRST, cfg
                    )
            pages = ahead
            start = after
            step += 1
        if cfg.new_tokens > 0:
            turn += is_due(span, first, count, cfg).to(gl.int32)
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, units, left)


@gluon.jit
def gather(ptr, smem, offsets, inside, column, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Rows at ``offsets`` (int64), columns from ``column`` to COLUMNS, into a tile; zeros elsewhere."""
    columns = column + gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, layout))
    pointers = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < COLUMNS, 0)
    # Partitions do not see what the launcher knows: rows start at multiples of 16 bytes.
    pointers = gl.multiple_of(pointers, [16, 16])
    rows_load(smem, pointers, mask=mask)


@gluon.jit
def visible(span, at, table, cfg: gl.constexpr):
    """Which rows ``at`` hold a visible key, and the page numbers of those that do."""
    inside = (at >= span.lo) & (at < span.hi)
    return inside, gl.load(table + at // cfg.page_size, mask=inside, other=0)


@gluon.jit
def produce_gathered(k_ptr, v_ptr, k_strides, v_strides, work, cfg: gl.constexpr):
    """Four warps: as :func:`produce_boxes`, row by row. Rows that hold no visible key become zeros."""
    SAME_ROWS: gl.constexpr = (
        cfg.k_rows == cfg.v_rows
    )  # a thread's rows of keys are those of values
    k_page, k_row, k_head = k_strides
    v_page, v_row, v_head = v_strides
    buffers, page_table, spans, works, units, stride_table = work
    unit, batch, span, within, left = first_unit(works, cfg)
    step = 0
    turn = 0
    while left > 0:
        take, first, count = take_of(span, within, left, cfg)
        due = due_from(span, first, count, cfg)
        head = unit.to(gl.int64)
        start = (span.first_block + first) * cfg.block_n
        table = page_table + span.cache_row.to(gl.int64) * stride_table
        k_at = start + gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, cfg.k_rows))
        v_at = start + gl.arange(0, cfg.block_n, layout=gl.SliceLayout(1, cfg.v_rows))
        k_seen, k_pages = visible(span, k_at, table, cfg)
        v_seen, v_pages = visible(span, v_at, table, cfg)
        for _ in range(count):
            stage = step % cfg.stages
            k_offsets = k_pages.to(gl.int64) * k_page + (k_at % cfg.page_size) * k_row
            if SAME_ROWS:
                v_offsets = k_pages.to(gl.int64) * v_page + (k_at % cfg.page_size) * v_row
                v_inside = k_seen
            else:
                v_offsets = v_pages.to(gl.int64) * v_page + (v_at % cfg.page_size) * v_row
                v_inside = v_seen
                v_at += cfg.block_n
                v_seen, v_pages = visible(span, v_at, table, cfg)
            k_at += cfg.block_n
            k_next, k_pages = visible(span, k_at, table, cfg)
            start += cfg.block_n
            wait_written(start, due, turn, buffers, cfg)
            mbarrier.wait(buffers.empty.index(stage), ((step // cfg.stages) & 1) ^ 1)
            for piece in gl.static_range(gl.constexpr(cfg.pieces)):
                gather(
                    k_ptr + head * k_head,
                    k_tile(buffers, stage, piece, cfg),
                    k_offsets,
                    k_seen,
                    piece * cfg.k_width,
                    gl.constexpr(cfg.head_dim),
                    gl.constexpr(cfg.k_rows),
                )
            for piece in gl.static_range(gl.constexpr(cfg.v_pieces)):
                gather(
                    v_ptr + head * v_head,
                    v_tile(buffers, stage, cfg).slice(
                        piece * cfg.v_box_width, cfg.v_box_width, dim=1
                    ),
                    v_offsets,
                    v_inside,
                    piece * cfg.v_box_width,
                    gl.constexpr(cfg.head_dim_v),
                    gl.constexpr(cfg.v_rows),
                )
                full = buffers.full.index(stage * cfg.v_pieces + piece)
                async_copy.mbarrier_arrive(full, increment_count=False)
            k_seen = k_next
            step += 1
        if cfg.new_tokens > 0:
            turn += is_due(span, first, count, cfg).to(gl.int32)
        left -= take
        within = 0
        unit, batch, span = next_unit(unit, batch, span, spans, units, left)
