"""The producer warp of the forward kernel: takes tiles off the schedule and feeds the rings. Where keys
come in small boxes, other warps help it."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import aggregate, gl, gluon, mbarrier
from headway.kernels.hopper import pipeline
from headway.kernels.hopper.masks import row_limits
from headway.kernels.hopper.pipeline import TileInfo
from headway.kernels.hopper.schedule import HEADER as _HEADER
from headway.kernels.hopper.tiles import MIN_PIECE as _MIN_PIECE

HEADER: gl.constexpr = gl.constexpr(_HEADER)
MIN_PIECE: gl.constexpr = gl.constexpr(_MIN_PIECE)

# ---- the schedule ------------------------------------------------------------------------------------


@aggregate
class Source:
    """Where the keys of a tile are."""

    keys: gl.tensor  # its row of the page table, as an offset, or the batch entry
    head: gl.tensor  # KV head
    first_key: gl.tensor  # the row of its first key there
    seqlen_k: gl.tensor

    @gluon.constexpr_function
    def __init__(self, keys, head, first_key, seqlen_k):
        self.keys = keys
        self.head = head
        self.first_key = first_key
        self.seqlen_k = seqlen_k


@gluon.jit
def _locate(index, tiles_per_head, schedule, call, cfg: gl.constexpr):
    """Tile ``index`` of the schedule as (sequence, head, first row, split). Tiles come longest first within
    a section, a group of heads whose K and V fit in L2 together. Beyond the schedule: sequence 0, row 0."""
    valid = index < tiles_per_head * call.scheduled_heads
    index = gl.where(valid, index, 0)
    tiles_per_head = gl.maximum(tiles_per_head, 1)
    in_section = call.section * tiles_per_head
    section = index // in_section
    first_head = section * call.section
    heads = gl.minimum(call.section, call.scheduled_heads - first_head)
    within = index - section * in_section
    place = within // heads
    head = first_head + within - place * heads
    split = gl.to_tensor(0)
    if cfg.split:
        split = head % call.splits
        head = head // call.splits
    if cfg.work_list:
        batch = gl.load(schedule + HEADER + 2 * place, mask=valid, other=0)
        row = gl.load(schedule + HEADER + 1 + 2 * place, mask=valid, other=0) * cfg.block_m
    else:
        batch = head // call.num_heads
        head = head - batch * call.num_heads
        row = (tiles_per_head - 1 - place) * cfg.block_m
    return batch, head, row, split


@gluon.jit
def _piece(begin, end, split, call):
    """Blocks of one piece of [begin, end): equal pieces, none but the last shorter than MIN_PIECE."""
    each = gl.maximum(gl.cdiv(end - begin, call.splits), MIN_PIECE)
    begin = gl.minimum(begin + split * each, end)
    return begin, gl.minimum(begin + each, end)


@gluon.jit
def _describe(
    batch,
    head,
    row,
    split,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    leftpad_k,
    call,
    cfg: gl.constexpr,
):
    """(the tile, first key's row): lengths, and the span of key blocks that any of its rows sees."""
    first_row = gl.to_tensor(0)
    rows = call.rows_q
    if cu_seqlens_q is not None:
        first_row = gl.load(cu_seqlens_q + batch)
        rows = gl.load(cu_seqlens_q + batch + 1) - first_row
    if seqused_q is not None:
        rows = gl.load(seqused_q + batch)
    first_key = gl.to_tensor(0)
    seqlen_k = call.rows_k
    if cu_seqlens_k is not None:
        first_key = gl.load(cu_seqlens_k + batch)
        seqlen_k = gl.load(cu_seqlens_k + batch + 1) - first_key
    if seqused_k is not None:
        seqlen_k = gl.load(seqused_k + batch)
    if leftpad_k is not None:
        pad = gl.load(leftpad_k + batch)
        first_key += pad
        seqlen_k -= pad
    offset = seqlen_k - rows
    last = gl.minimum(row + cfg.block_m, rows * cfg.pack) - 1
    lo, _ = row_limits(
        row // cfg.pack + offset,
        seqlen_k,
        call,
        cfg,
    )
    _, hi = row_limits(
        last // cfg.pack + offset,
        seqlen_k,
        call,
        cfg,
    )
    begin = lo // cfg.block_n
    end = gl.maximum(gl.cdiv(hi, cfg.block_n), begin)
    if row > last:
        end = begin
    if cfg.split:
        begin, end = _piece(begin, end, split, call)
    tile = TileInfo(
        batch, head, row, rows * cfg.pack, first_row * cfg.pack, seqlen_k, begin, end, split
    )
    return tile, first_key


# ---- producer ----------------------------------------------------------------------------------------


@gluon.jit
def _fetch(
    index,
    tiles_per_head,
    schedule,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    call,
    cfg: gl.constexpr,
):
    """Tile ``index`` and where its keys are."""
    batch, head, row, split = _locate(index, tiles_per_head, schedule, call, cfg)
    tile, first_key = _describe(
        batch,
        head,
        row,
        split,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        leftpad_k,
        call,
        cfg,
    )
    keys = batch
    if cache_batch_idx is not None:
        keys = gl.load(cache_batch_idx + batch)
    if cfg.page_size > 0:
        keys = keys * call.page_table_stride
    elif cu_seqlens_k is not None:
        keys = gl.to_tensor(0)
    return tile, Source(keys, head // call.group, first_key, tile.seqlen_k)


@gluon.jit
def _pages_of(page_table, source, block, PART: gl.constexpr, cfg: gl.constexpr):
    """First coordinate of each box of a key block: its pages, or the batch entry it lies in. Boxes beyond
    the sequence take its last page: later entries of the table may hold anything."""
    pages = ()
    for i in gl.static_range(gl.constexpr(cfg.block_n // cfg.box_rows // (cfg.helpers + 1))):
        if cfg.page_size > 0:
            j = PART + i * (cfg.helpers + 1)
            key = gl.minimum(block * cfg.block_n + j * cfg.box_rows, source.seqlen_k - 1)
            page = gl.load(page_table + source.keys + gl.maximum(key, 0) // cfg.page_size)
        else:
            page = source.keys
        pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005
    return pages


@gluon.jit
def _rows_at(page_table, stride_page, stride_row, source, block, cfg: gl.constexpr):
    """Where the keys of a block are, as offsets (block_n,) from their head, and which of them exist."""
    key = block * cfg.block_n + gl.arange(
        0, cfg.block_n, layout=gl.SliceLayout(1, cfg.gather_layout)
    )
    inside = key < source.seqlen_k
    at = source.first_key + key
    page = gl.load(page_table + source.keys + at // cfg.page_size, mask=inside, other=0)
    offsets = page.to(gl.int64) * stride_page + (at % cfg.page_size).to(gl.int64) * stride_row
    return offsets, inside


@gluon.jit
def _gather_k(k, key_strides, page_table, buffers, at, source, block, cfg: gl.constexpr):
    """Row by row: four warps. Rows beyond the sequence become zeros."""
    page, row, head, _, _, _ = key_strides
    offsets, inside = _rows_at(page_table, page, row, source, block, cfg)
    full = pipeline.await_free_k(buffers, at)
    pipeline.gather_rows(
        k + source.head.to(gl.int64) * head, offsets, inside, buffers.k, at.stage,
        cfg.stages, cfg.columns, cfg.gathered_dims[0], cfg,
    )  # fmt: skip
    pipeline.arrive_gathered(full)


@gluon.jit
def _gather_v(v, key_strides, page_table, buffers, at, source, block, cfg: gl.constexpr):
    _, _, _, page, row, head = key_strides
    offsets, inside = _rows_at(page_table, page, row, source, block, cfg)
    full = pipeline.await_free_v(buffers, at)
    pipeline.gather_rows(
        v + source.head.to(gl.int64) * head, offsets, inside, buffers.v, at.stage,
        cfg.stages_v, cfg.columns_v, cfg.gathered_dims[1], cfg,
    )  # fmt: skip
    pipeline.arrive_gathered(full)


@gluon.jit
def _load_k(k_desc, page_table, buffers, at, source, block, PART: gl.constexpr, cfg: gl.constexpr):
    """A block of K in boxes: the copy engine does the rest. PART: which of the warps that ask for them."""
    # Page numbers are asked for before the wait for a stage, which hides their latency.
    pages = _pages_of(page_table, source, block, PART, cfg)
    full = pipeline.await_free_k(buffers, at)
    if PART == 0:
        BYTES: gl.constexpr = cfg.block_n * cfg.head_dim * 2
        mbarrier.expect(full, BYTES)
    row = source.first_key + block * cfg.block_n
    pipeline.load_block(
        k_desc,
        buffers.k,
        full,
        at.stage,
        pages,
        source.head,
        row,
        PART,
        cfg.stages,
        cfg.columns,
        cfg,
    )


@gluon.jit
def _load_v(v_desc, page_table, buffers, at, source, block, PART: gl.constexpr, cfg: gl.constexpr):
    # Read for K one block ago: they come from L1, and holding them meanwhile would spill.
    pages = _pages_of(page_table, source, block, PART, cfg)
    full = pipeline.await_free_v(buffers, at)
    if PART == 0:
        BYTES: gl.constexpr = cfg.block_n * cfg.head_dim_v * 2
        mbarrier.expect(full, BYTES)
    row = source.first_key + block * cfg.block_n
    pipeline.load_block(
        v_desc,
        buffers.v,
        full,
        at.stage,
        pages,
        source.head,
        row,
        PART,
        cfg.stages_v,
        cfg.columns_v,
        cfg,
    )


@gluon.jit
def _push_k(
    k, key_strides, page_table, buffers, at, source, block, PART: gl.constexpr, cfg: gl.constexpr
):
    """A block of K into the stage at ``at``; the place after it."""
    if cfg.gathered:
        _gather_k(k, key_strides, page_table, buffers, at, source, block, cfg)
    else:
        _load_k(k, page_table, buffers, at, source, block, PART, cfg)
    return pipeline.ring_step(at, cfg.stages)


@gluon.jit
def _push_v(
    v, key_strides, page_table, buffers, at, source, block, PART: gl.constexpr, cfg: gl.constexpr
):
    """A block of V, if there is one: ``block`` < 0 stands for none."""
    if block >= 0:
        if cfg.gathered:
            _gather_v(v, key_strides, page_table, buffers, at, source, block, cfg)
        else:
            _load_v(v, page_table, buffers, at, source, block, PART, cfg)
        at = pipeline.ring_step(at, cfg.stages_v)
    return at


@gluon.jit
def help_produce(k, v, page_table, buffers, call, PART: gl.constexpr, cfg: gl.constexpr):
    """A warp beside the producer's: every (helpers + 1)th box of the keys of each tile it publishes."""
    if cfg.helpers >= PART:
        k_at = pipeline.ring_start()
        v_at = pipeline.ring_start()
        order = gl.to_tensor(0)
        tile, keys = pipeline.await_keys(buffers, order, cfg)
        while tile.batch >= 0:
            source = Source(keys, tile.head // call.group, order * 0, tile.seqlen_k)
            v_block = order * 0 - 1
            block = tile.block_end - 1
            for _ in range(tile.block_end - tile.block_begin):
                k_at = _push_k(k, None, page_table, buffers, k_at, source, block, PART, cfg)
                v_at = _push_v(v, None, page_table, buffers, v_at, source, v_block, PART, cfg)
                v_block = block
                block -= 1
            v_at = _push_v(v, None, page_table, buffers, v_at, source, v_block, PART, cfg)
            order += 1
            tile, keys = pipeline.await_keys(buffers, order, cfg)


@gluon.jit
def produce(
    q_desc,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    page_table,
    key_strides,
    schedule,
    buffers,
    call,
    cfg: gl.constexpr,
):
    """Tiles in the order of the schedule, block by block from the last key to the first.

    ``k`` and ``v`` are descriptors, or pointers where rows are gathered.
    """
    programs = gl.num_programs(0)
    tiles_per_head = call.tiles_per_head
    if cfg.work_list:
        tiles_per_head = gl.load(schedule + HEADER - 1)
    num_tiles = tiles_per_head * call.scheduled_heads
    k_at = pipeline.ring_start()
    v_at = pipeline.ring_start()
    order = gl.to_tensor(0)
    index = gl.program_id(0)
    tile, source = _fetch(
        index,
        tiles_per_head,
        schedule,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        leftpad_k,
        cache_batch_idx,
        call,
        cfg,
    )
    zero = gl.to_tensor(0)
    v_source = Source(source.keys, zero, zero, zero)
    v_block = zero - 1  # a block whose V is still to come; below 0: none
    while index < num_tiles:
        first = tile.block_begin
        block = tile.block_end - 1
        if block >= first:
            k_at = _push_k(k, key_strides, page_table, buffers, k_at, source, block, 0, cfg)
            v_at = _push_v(v, key_strides, page_table, buffers, v_at, v_source, v_block, 0, cfg)
            v_source = source
            v_block = block
        elif v_block >= 0:
            # Nothing behind this tile begins before the consumers have that V.
            v_at = _push_v(v, key_strides, page_table, buffers, v_at, v_source, v_block, 0, cfg)
            v_block = zero - 1
        pipeline.load_q(q_desc, buffers, tile, source.keys, order, cfg)
        order += 1
        for _ in range(first + 1, block):
            block -= 1
            k_at = _push_k(k, key_strides, page_table, buffers, k_at, source, block, 0, cfg)
            v_at = _push_v(v, key_strides, page_table, buffers, v_at, source, v_block, 0, cfg)
            v_block = block
        # The next tile's first K travels with this one's last V. It is taken off the schedule no sooner
        # than needed for that: a CTA that reserves tiles early unbalances the rest.
        if cfg.dynamic:
            index = gl.atomic_add(schedule, 1) + programs
        else:
            index += programs
        tile, coming = _fetch(
            index,
            tiles_per_head,
            schedule,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            leftpad_k,
            cache_batch_idx,
            call,
            cfg,
        )
        if block > first:
            k_at = _push_k(k, key_strides, page_table, buffers, k_at, source, first, 0, cfg)
            v_at = _push_v(v, key_strides, page_table, buffers, v_at, source, v_block, 0, cfg)
            v_block = first
        source = coming
    _push_v(v, key_strides, page_table, buffers, v_at, v_source, v_block, 0, cfg)
    end = TileInfo(zero - 1, zero, zero, zero, zero, zero, zero, zero, zero)
    pipeline.end_of_work(buffers, end, order, cfg)
    if cfg.dynamic:
        # The last CTA to finish leaves both counters at 0, as it found them.
        finished = gl.atomic_add(schedule + 1, 1)
        if finished == programs - 1:
            gl.store(schedule, 0)
            gl.store(schedule + 1, 0)
