"""The producer warp of the forward kernel: takes tiles off the schedule and feeds the ring."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import aggregate, gl, gluon
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
def _pages_of(page_table, keys, seqlen_k, block, cfg: gl.constexpr):
    """First coordinate of each box of a key block: its pages, or the batch entry it lies in. Boxes beyond
    the sequence take its last page: later entries of the table may hold anything."""
    pages = ()
    for j in gl.static_range(gl.constexpr(cfg.block_n // cfg.box_rows)):
        if cfg.page_size > 0:
            key = gl.minimum(block * cfg.block_n + j * cfg.box_rows, seqlen_k - 1)
            page = gl.load(page_table + keys + gl.maximum(key, 0) // cfg.page_size)
        else:
            page = keys
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
def _push_rows(
    k,
    v,
    key_strides,
    page_table,
    buffers,
    event,
    source,
    block,
    v_source,
    v_block,
    HAS_K: gl.constexpr,
    cfg: gl.constexpr,
):
    """Row by row: four warps. Rows beyond the sequence become zeros."""
    k_page, k_row, k_head, v_page, v_row, v_head = key_strides
    offsets, inside = _rows_at(page_table, k_page, k_row, source, block, cfg)
    stage = pipeline.await_free_k(buffers, event, cfg)
    if HAS_K:
        pipeline.gather_rows(
            k + source.head.to(gl.int64) * k_head, offsets, inside, buffers.k, stage,
            cfg.columns, cfg.gathered_dims[0], cfg,
        )  # fmt: skip
    if cfg.overlap:
        pipeline.await_free_v(buffers, event, cfg)
    if v_block >= 0:
        offsets, inside = _rows_at(page_table, v_page, v_row, v_source, v_block, cfg)
        pipeline.gather_rows(
            v + v_source.head.to(gl.int64) * v_head, offsets, inside, buffers.v, stage,
            cfg.columns_v, cfg.gathered_dims[1], cfg,
        )  # fmt: skip
    pipeline.arrive_gathered(buffers, stage)


@gluon.jit
def _push(
    k,
    v,
    key_strides,
    page_table,
    buffers,
    event,
    source,
    block,
    v_source,
    v_block,
    HAS_K: gl.constexpr,
    cfg: gl.constexpr,
):
    """Event ``event``: a block of K, and V of the block before it, if there is one."""
    if cfg.gathered:
        _push_rows(
            k, v, key_strides, page_table, buffers, event, source, block, v_source, v_block,
            HAS_K, cfg,
        )  # fmt: skip
    else:
        _push_boxes(k, v, page_table, buffers, event, source, block, v_source, v_block, HAS_K, cfg)
    return event + 1


@gluon.jit
def _push_boxes(
    k_desc,
    v_desc,
    page_table,
    buffers,
    event,
    source,
    block,
    v_source,
    v_block,
    HAS_K: gl.constexpr,
    cfg: gl.constexpr,
):
    """In boxes: one warp, and the copy engine does the rest."""
    # Page numbers are asked for before the wait for a stage, which hides their latency. Those of V were
    # read for its K one event ago and come from L1; holding them meanwhile would spill.
    pages = _pages_of(page_table, source.keys, source.seqlen_k, block, cfg)
    has_v = v_block >= 0
    stage = pipeline.begin_event(buffers, event, HAS_K, has_v, cfg)
    full = buffers.kv_full.index(stage)
    at = source.first_key + block * cfg.block_n
    if HAS_K:
        pipeline.load_block(
            k_desc, buffers.k, full, stage, pages, source.head, at, True, cfg.columns, cfg
        )
    if cfg.overlap:
        pipeline.await_free_v(buffers, event, cfg)
    v_pages = _pages_of(page_table, v_source.keys, v_source.seqlen_k, v_block, cfg)
    at = v_source.first_key + v_block * cfg.block_n
    pipeline.load_block(
        v_desc, buffers.v, full, stage, v_pages, v_source.head, at, has_v, cfg.columns_v, cfg
    )


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
    event = gl.to_tensor(0)
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
            event = _push(
                k, v, key_strides, page_table, buffers, event, source, block, v_source,
                v_block, True, cfg,
            )  # fmt: skip
            v_source = source
            v_block = block
        elif v_block >= 0:
            # No K to travel with, and nothing behind this tile begins before the consumers have that V.
            event = _push(
                k, v, key_strides, page_table, buffers, event, v_source, zero, v_source,
                v_block, False, cfg,
            )  # fmt: skip
            v_block = zero - 1
        pipeline.load_q(q_desc, buffers, tile, order, cfg)
        order += 1
        for _ in range(first + 1, block):
            block -= 1
            event = _push(
                k, v, key_strides, page_table, buffers, event, source, block, v_source,
                v_block, True, cfg,
            )  # fmt: skip
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
            event = _push(
                k, v, key_strides, page_table, buffers, event, source, first, v_source,
                v_block, True, cfg,
            )  # fmt: skip
            v_block = first
        source = coming
    if v_block >= 0:
        _push(
            k, v, key_strides, page_table, buffers, event, v_source, zero, v_source,
            v_block, False, cfg,
        )  # fmt: skip
    end = TileInfo(zero - 1, zero, zero, zero, zero, zero, zero, zero, zero)
    pipeline.end_of_work(buffers, end, order, cfg)
    if cfg.dynamic:
        # The last CTA to finish leaves both counters at 0, as it found them.
        finished = gl.atomic_add(schedule + 1, 1)
        if finished == programs - 1:
            gl.store(schedule, 0)
            gl.store(schedule + 1, 0)
