"""The producer warp of the forward kernel: takes tiles off the schedule and feeds the ring."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import aggregate, gl, gluon
from headway.kernels.hopper import pipeline
from headway.kernels.hopper.masks import row_limits
from headway.kernels.hopper.pipeline import TileInfo
from headway.kernels.hopper.schedule import HEADER as _HEADER

HEADER: gl.constexpr = gl.constexpr(_HEADER)

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
    """Tile ``index`` of the schedule as (sequence, head, first row). Tiles come longest first within a
    section, a group of heads whose K and V fit in L2 together. Beyond the schedule: sequence 0, row 0."""
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
    if cfg.work_list:
        batch = gl.load(schedule + HEADER + 2 * place, mask=valid, other=0)
        row = gl.load(schedule + HEADER + 1 + 2 * place, mask=valid, other=0) * cfg.block_m
    else:
        batch = head // call.num_heads
        head = head - batch * call.num_heads
        row = (tiles_per_head - 1 - place) * cfg.block_m
    return batch, head, row


@gluon.jit
def _describe(
    batch,
    head,
    row,
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
    tile = TileInfo(batch, head, row, rows * cfg.pack, first_row * cfg.pack, seqlen_k, begin, end)
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
    batch, head, row = _locate(index, tiles_per_head, schedule, call, cfg)
    tile, first_key = _describe(
        batch,
        head,
        row,
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
def _push(
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
    """Event ``event``: a block of K, and V of the block before it; the very first has no V."""
    # Page numbers are asked for before the wait for a stage, which hides their latency. Those of V were
    # read for its K one event ago and come from L1; holding them meanwhile would spill.
    pages = _pages_of(page_table, source.keys, source.seqlen_k, block, cfg)
    has_v = event > 0
    stage = pipeline.begin_event(buffers, event, HAS_K, has_v, cfg)
    full = buffers.kv_full.index(stage)
    at = source.first_key + block * cfg.block_n
    if HAS_K:
        pipeline.load_block(
            k_desc, buffers.k, full, stage, pages, source.head, at, True, cfg.columns, cfg
        )
    v_pages = _pages_of(page_table, v_source.keys, v_source.seqlen_k, v_block, cfg)
    at = v_source.first_key + v_block * cfg.block_n
    pipeline.load_block(
        v_desc, buffers.v, full, stage, v_pages, v_source.head, at, has_v, cfg.columns_v, cfg
    )
    return event + 1


@gluon.jit
def produce(
    q_desc,
    k_desc,
    v_desc,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    page_table,
    schedule,
    buffers,
    call,
    cfg: gl.constexpr,
):
    """Tiles in the order of the schedule, block by block from the last key to the first."""
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
    v_block = zero
    while index < num_tiles:
        first = tile.block_begin
        block = tile.block_end - 1
        if block >= first:
            event = _push(
                k_desc, v_desc, page_table, buffers, event, source, block, v_source, v_block,
                True, cfg,
            )  # fmt: skip
            v_source = source
            v_block = block
        pipeline.load_q(q_desc, buffers, tile, order, cfg)
        order += 1
        for _ in range(first + 1, block):
            block -= 1
            event = _push(
                k_desc, v_desc, page_table, buffers, event, source, block, v_source, v_block,
                True, cfg,
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
                k_desc, v_desc, page_table, buffers, event, source, first, v_source, v_block,
                True, cfg,
            )  # fmt: skip
            v_block = first
        source = coming
    if event > 0:
        _push(
            k_desc, v_desc, page_table, buffers, event, v_source, zero, v_source, v_block,
            False, cfg,
        )  # fmt: skip
    end = TileInfo(zero - 1, zero, zero, zero, zero, zero, zero, zero)
    pipeline.end_of_work(buffers, end, order, cfg)
    if cfg.dynamic:
        # The last CTA to finish leaves both counters at 0, as it found them.
        finished = gl.atomic_add(schedule + 1, 1)
        if finished == programs - 1:
            gl.store(schedule, 0)
            gl.store(schedule + 1, 0)
