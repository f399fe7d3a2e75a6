"""What the producers and the consumer warpgroups of a CTA share, and how data moves through it.

Blocks of K and blocks of V are two streams through all tiles of a CTA, each in a ring of stages of its own.
They are asked for in the order in which consumers take them: the K of a block together with the V of the
block before it, across tiles too, so that a tile's first K comes while the tile before it is still at work.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import (
    aggregate,
    async_copy,
    cta_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    rows_load,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@aggregate
class Buffers:
    """Shared memory of a CTA."""

    q: gl.shared_memory_descriptor  # (q_slots * warpgroups * pieces, 64, piece)
    k: gl.shared_memory_descriptor  # (stages * pieces, block_n, piece)
    v: gl.shared_memory_descriptor  # (stages_v, block_n, head_dim_v)
    #: (warpgroups, 64, out_columns), if output has a buffer of its own
    out: gl.shared_memory_descriptor
    info: gl.shared_memory_descriptor  # (q_slots * info_fields, 1) int32
    q_full: gl.shared_memory_descriptor  # (q_slots * warpgroups, 1)
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # (stages, 1)
    v_full: gl.shared_memory_descriptor  # (stages_v, 1)
    k_empty: gl.shared_memory_descriptor  # (stages, 1)
    v_empty: gl.shared_memory_descriptor  # (stages_v, 1)

    @gluon.constexpr_function
    def __init__(self, q, k, v, out, info, q_full, q_empty, k_full, v_full, k_empty, v_empty):
        self.q = q
        self.k = k
        self.v = v
        self.out = out
        self.info = info
        self.q_full = q_full
        self.q_empty = q_empty
        self.k_full = k_full
        self.v_full = v_full
        self.k_empty = k_empty
        self.v_empty = v_empty


@aggregate
class Ring:
    """A place in a ring of stages: which stage, and the parity of the round it is in."""

    stage: gl.tensor
    phase: gl.tensor

    @gluon.constexpr_function
    def __init__(self, stage, phase):
        self.stage = stage
        self.phase = phase


@gluon.jit
def ring_start():
    return Ring(gl.to_tensor(0), gl.to_tensor(0))


@gluon.jit
def ring_step(at, STAGES: gl.constexpr):
    """The place after ``at``. Kept from block to block: made from a count, it would stand between each
    block's wait and its first product."""
    if STAGES == 1:
        return Ring(at.stage, at.phase ^ 1)
    elif STAGES == 2:
        return Ring(at.stage ^ 1, at.phase ^ at.stage)
    else:
        last = at.stage == STAGES - 1
        return Ring(gl.where(last, 0, at.stage + 1), at.phase ^ gl.where(last, 1, 0))


@aggregate
class TileInfo:
    """A tile as its consumers see it; ``batch`` < 0 ends the work."""

    batch: gl.tensor
    head: gl.tensor  # query head, or KV head where its query heads are packed into rows
    row: gl.tensor  # first row of the tile within its sequence
    rows: gl.tensor  # rows of the sequence
    first_row: gl.tensor  # row of q and out at which a ragged sequence starts
    seqlen_k: gl.tensor
    block_begin: gl.tensor
    block_end: gl.tensor
    split: gl.tensor  # which piece of the sequence's keys these blocks are

    @gluon.constexpr_function
    def __init__(self, batch, head, row, rows, first_row, seqlen_k, block_begin, block_end, split):
        self.batch = batch
        self.head = head
        self.row = row
        self.rows = rows
        self.first_row = first_row
        self.seqlen_k = seqlen_k
        self.block_begin = block_begin
        self.block_end = block_end
        self.split = split


@aggregate
class Call:
    """The numbers of a call."""

    rows_q: gl.tensor  # query rows of a sequence, unless cu_seqlens_q or seqused_q say
    rows_k: gl.tensor  # keys of a sequence, likewise
    num_heads: gl.tensor  # heads the schedule counts: query heads, or KV heads where packed
    group: gl.tensor  # of those heads, how many share a KV head
    tiles_per_head: gl.tensor  # query tiles of a sequence; ragged calls have a work list
    scheduled_heads: gl.tensor  # of all sequences, or of one where there is a work list
    section: gl.tensor  # heads whose tiles are interleaved, see _locate
    splits: gl.tensor  # pieces that a tile's keys are cut into; each is scheduled like a head
    page_table_stride: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    chunk: gl.tensor
    head_dim_v: gl.tensor
    stride_out_batch: gl.tensor
    stride_out_row: gl.tensor
    stride_out_head: gl.tensor
    stride_lse_batch: gl.tensor
    stride_lse_head: gl.tensor
    stride_out_split: gl.tensor
    stride_lse_split: gl.tensor
    softmax_scale: gl.tensor
    softcap: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self,
        rows_q,
        rows_k,
        num_heads,
        group,
        tiles_per_head,
        scheduled_heads,
        section,
        splits,
        page_table_stride,
        window_left,
        window_right,
        chunk,
        head_dim_v,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        stride_out_split,
        stride_lse_split,
        softmax_scale,
        softcap,
    ):
        self.rows_q = rows_q
        self.rows_k = rows_k
        self.num_heads = num_heads
        self.group = group
        self.tiles_per_head = tiles_per_head
        self.scheduled_heads = scheduled_heads
        self.section = section
        self.splits = splits
        self.page_table_stride = page_table_stride
        self.window_left = window_left
        self.window_right = window_right
        self.chunk = chunk
        self.head_dim_v = head_dim_v
        self.stride_out_batch = stride_out_batch
        self.stride_out_row = stride_out_row
        self.stride_out_head = stride_out_head
        self.stride_lse_batch = stride_lse_batch
        self.stride_lse_head = stride_lse_head
        self.stride_out_split = stride_out_split
        self.stride_lse_split = stride_lse_split
        self.softmax_scale = softmax_scale
        self.softcap = softcap


@gluon.jit
def allocate(cfg: gl.constexpr):
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    slots: gl.constexpr = cfg.q_slots * cfg.warpgroups
    q = gl.allocate_shared_memory(cfg.dtype, [slots * cfg.pieces, 64, cfg.piece], cfg.q_smem)
    out = q
    if cfg.out_columns > 0:
        out_shape: gl.constexpr = [cfg.warpgroups, 64, cfg.out_columns]
        out = gl.allocate_shared_memory(cfg.dtype, out_shape, cfg.o_smem)
    buffers = Buffers(
        q,
        gl.allocate_shared_memory(
            cfg.dtype, [cfg.stages * cfg.pieces, cfg.block_n, cfg.piece], cfg.k_smem
        ),
        gl.allocate_shared_memory(
            cfg.dtype, [cfg.stages_v, cfg.block_n, cfg.head_dim_v], cfg.v_smem
        ),
        out,
        gl.allocate_shared_memory(gl.int32, [cfg.q_slots * cfg.info_fields, 1], cfg.info_smem),
        gl.allocate_shared_memory(gl.int64, [slots, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [slots, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [cfg.stages_v, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [cfg.stages_v, 1], barrier),
    )
    for i in gl.static_range(slots):
        mbarrier.init(buffers.q_full.index(i), count=1)
        if i % cfg.warpgroups == 0:
            mbarrier.init(buffers.q_empty.index(i), count=1 + cfg.helpers)
        else:
            mbarrier.init(buffers.q_empty.index(i), count=1)
    for i in gl.static_range(gl.constexpr(cfg.stages)):
        mbarrier.init(buffers.k_full.index(i), count=cfg.full_count)
        mbarrier.init(buffers.k_empty.index(i), count=cfg.warpgroups)
    for i in gl.static_range(gl.constexpr(cfg.stages_v)):
        mbarrier.init(buffers.v_full.index(i), count=cfg.full_count)
        mbarrier.init(buffers.v_empty.index(i), count=cfg.warpgroups)
    fence_async_shared()
    return buffers


# ---- producer ----------------------------------------------------------------------------------------


@gluon.jit
def publish(buffers, tile, keys, order, cfg: gl.constexpr):
    """Wait until slot ``order`` % q_slots is free in every warpgroup and describe the tile there; ``keys``
    are its Source's."""
    slot = order % cfg.q_slots
    free = (order // cfg.q_slots) & 1 ^ 1
    for w in gl.static_range(gl.constexpr(cfg.warpgroups)):
        mbarrier.wait(buffers.q_empty.index(slot * cfg.warpgroups + w), free)
    facts = (
        tile.batch,
        tile.head,
        tile.row,
        tile.rows,
        tile.first_row,
        tile.seqlen_k,
        tile.block_begin,
        tile.block_end,
        tile.split,
        keys,
    )
    for field in gl.static_range(gl.constexpr(cfg.info_fields)):
        fact = gl.full([1], 0, gl.int32, cfg.producer_scalar) + facts[field]
        buffers.info.index(slot * cfg.info_fields + field).store(fact)
    cta_barrier()


@gluon.jit
def load_q(q_desc, buffers, tile, keys, order, cfg: gl.constexpr):
    """Each warpgroup's 64 rows of Q, behind its own barrier. Rows beyond the tensor arrive as zeros."""
    publish(buffers, tile, keys, order, cfg)
    view = buffers.q._reinterpret(cfg.dtype, cfg.q_view_shape, cfg.box_smem)
    batch = tile.batch
    if cfg.ragged_q:
        batch = 0
    for w in gl.static_range(gl.constexpr(cfg.warpgroups)):
        slot = order % cfg.q_slots * cfg.warpgroups + w
        full = buffers.q_full.index(slot)
        mbarrier.expect(full, 64 * cfg.head_dim * 2)
        row = tile.first_row + tile.row + w * 64
        for c in gl.static_range(gl.constexpr(cfg.columns)):
            box = view.index(slot * cfg.columns + c)._reinterpret(
                cfg.dtype, q_desc.block_shape, q_desc.layout
            )
            if cfg.pack > 1:
                at = [batch, tile.head, row // cfg.pack, 0, c * 64]
            else:
                at = [batch, tile.head, row, c * 64]
            tma_load(q_desc, at, full, box)


@gluon.jit
def end_of_work(buffers, tile, order, cfg: gl.constexpr):
    """Publish a tile with batch < 0 and let the consumers see it."""
    publish(buffers, tile, order, order, cfg)
    for w in gl.static_range(gl.constexpr(cfg.warpgroups)):
        mbarrier.arrive(buffers.q_full.index(order % cfg.q_slots * cfg.warpgroups + w), count=1)


@gluon.jit
def await_free_k(buffers, at):
    """Wait until the stage of K at ``at`` is free; its barrier for what arrives."""
    mbarrier.wait(buffers.k_empty.index(at.stage), at.phase ^ 1)
    return buffers.k_full.index(at.stage)


@gluon.jit
def await_free_v(buffers, at):
    mbarrier.wait(buffers.v_empty.index(at.stage), at.phase ^ 1)
    return buffers.v_full.index(at.stage)


@gluon.jit
def load_block(
    desc,
    smem,
    full,
    stage,
    pages,
    head,
    row,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    cfg: gl.constexpr,
):
    """One block of K or V in boxes of ``box_rows`` keys by 64 columns. ``pages`` holds the first
    coordinate of each box (page or batch entry); ``row`` is the first key's place in its page."""
    boxes: gl.constexpr = cfg.block_n // cfg.box_rows
    view = smem._reinterpret(cfg.dtype, [STAGES * COLUMNS * boxes, cfg.box_rows, 64], cfg.box_smem)
    for i in gl.static_range(boxes // (cfg.helpers + 1)):
        j = PART + i * (cfg.helpers + 1)
        at_row = row + j * cfg.box_rows
        if cfg.page_size > 0:
            at_row = at_row % cfg.page_size
        for c in gl.static_range(COLUMNS):
            box = view.index((stage * COLUMNS + c) * boxes + j)._reinterpret(
                cfg.dtype, desc.block_shape, desc.layout
            )
            tma_load(desc, [pages[i], head, at_row, c * 64], full, box)


@gluon.jit
def gather_rows(
    base,
    offsets,
    inside,
    smem,
    stage,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    REAL: gl.constexpr,
    cfg: gl.constexpr,
):
    """One block of K or V row by row: those at ``offsets`` (block_n,) from ``base``, of which REAL columns
    exist; zeros where not ``inside``. The copies of each thread arrive once at the stage's barrier, with
    :func:`arrive_gathered`."""
    view = smem._reinterpret(cfg.dtype, [STAGES * COLUMNS, cfg.block_n, 64], cfg.gather_smem)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, cfg.gather_layout))
    rows = base + gl.expand_dims(offsets, 1)
    for c in gl.static_range(COLUMNS):
        # Partitions do not see what the launcher knows: rows start at multiples of 16 bytes.
        pointers = gl.multiple_of(rows + gl.expand_dims(column + c * 64, 0), [16, 16])
        mask = gl.expand_dims(inside, 1)
        if c * 64 + 64 > REAL:
            mask = mask & gl.expand_dims(column < REAL - c * 64, 0)
        rows_load(view.index(stage * COLUMNS + c), pointers, mask=mask)


@gluon.jit
def arrive_gathered(full):
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _fact(buffers, slot, FIELD: gl.constexpr, LAYOUT: gl.constexpr, cfg: gl.constexpr):
    return gl.max(buffers.info.index(slot * cfg.info_fields + FIELD).load(LAYOUT), 0)


@gluon.jit
def await_keys(buffers, order, cfg: gl.constexpr):
    """Wait for what the producer published of tile ``order``: (the tile as far as its keys need it, the
    keys of its Source)."""
    LAYOUT: gl.constexpr = cfg.producer_scalar
    ring = order % cfg.q_slots
    slot = ring * cfg.warpgroups
    mbarrier.wait(buffers.q_full.index(slot), (order // cfg.q_slots) & 1)
    zero = order * 0
    tile = TileInfo(
        _fact(buffers, ring, 0, LAYOUT, cfg),
        _fact(buffers, ring, 1, LAYOUT, cfg),
        zero,
        zero,
        zero,
        _fact(buffers, ring, 5, LAYOUT, cfg),
        _fact(buffers, ring, 6, LAYOUT, cfg),
        _fact(buffers, ring, 7, LAYOUT, cfg),
        zero,
    )
    keys = _fact(buffers, ring, 9, LAYOUT, cfg)
    mbarrier.arrive(buffers.q_empty.index(slot), count=1)
    return tile, keys


# ---- consumers ---------------------------------------------------------------------------------------


@gluon.jit
def await_tile(buffers, order, WARPGROUP: gl.constexpr, cfg: gl.constexpr):
    """Wait for this warpgroup's Q of tile ``order`` of this CTA; (its slot, the tile)."""
    LAYOUT: gl.constexpr = cfg.consumer_scalar
    ring = order % cfg.q_slots
    slot = ring * cfg.warpgroups + WARPGROUP
    mbarrier.wait(buffers.q_full.index(slot), (order // cfg.q_slots) & 1)
    split = gl.to_tensor(0)
    if cfg.split:
        split = _fact(buffers, ring, 8, LAYOUT, cfg)
    tile = TileInfo(
        _fact(buffers, ring, 0, LAYOUT, cfg),
        _fact(buffers, ring, 1, LAYOUT, cfg),
        _fact(buffers, ring, 2, LAYOUT, cfg),
        _fact(buffers, ring, 3, LAYOUT, cfg),
        _fact(buffers, ring, 4, LAYOUT, cfg),
        _fact(buffers, ring, 5, LAYOUT, cfg),
        _fact(buffers, ring, 6, LAYOUT, cfg),
        _fact(buffers, ring, 7, LAYOUT, cfg),
        split,
    )
    return slot, tile


@gluon.jit
def _hand_back(barrier):
    """Arrive once for the partition, when all its warps are here. Triton takes ``mbarrier.arrive`` for an
    access to all of shared memory and synchronises the warps once more behind it; expecting no bytes is
    the same arrival, and an access to the barrier alone."""
    cta_barrier()
    mbarrier.expect(barrier, 0)


@gluon.jit
def release_q(buffers, slot):
    """Hand this warpgroup's Q buffer back for another tile."""
    _hand_back(buffers.q_empty.index(slot))


@gluon.jit
def await_k(buffers, at, cfg: gl.constexpr):
    """Wait for the K block at ``at``."""
    mbarrier.wait(buffers.k_full.index(at.stage), at.phase)
    if cfg.gathered:
        # Rows copied by threads; wgmma reads through another proxy.
        fence_async_shared()


@gluon.jit
def await_v(buffers, at, cfg: gl.constexpr):
    await_v_again(buffers, at)
    if cfg.gathered:
        fence_async_shared()


@gluon.jit
def await_v_again(buffers, at):
    """A block waited for before: no time passes, but the wait ends a basic block."""
    mbarrier.wait(buffers.v_full.index(at.stage), at.phase)


@gluon.jit
def release_kv(buffers, k_at, v_at):
    """Both at once, for which the warps meet once."""
    cta_barrier()
    mbarrier.expect(buffers.k_empty.index(k_at.stage), 0)
    mbarrier.expect(buffers.v_empty.index(v_at.stage), 0)


@gluon.jit
def release_k(buffers, at):
    _hand_back(buffers.k_empty.index(at.stage))


@gluon.jit
def release_v(buffers, at):
    _hand_back(buffers.v_empty.index(at.stage))


@gluon.jit
def skip_blocks(buffers, k_at, v_at, count, cfg: gl.constexpr):
    """Let ``count`` blocks pass that hold nothing this warpgroup's rows see."""
    for _ in range(count):
        await_k(buffers, k_at, cfg)
        release_k(buffers, k_at)
        k_at = ring_step(k_at, cfg.stages)
        await_v(buffers, v_at, cfg)
        release_v(buffers, v_at)
        v_at = ring_step(v_at, cfg.stages_v)
    return k_at, v_at


@gluon.jit
def registers_of_q(buffers, slot, cfg: gl.constexpr):
    """The pieces of Q that stay in registers, as wgmma operands."""
    held = ()
    for p in gl.static_range(gl.constexpr(cfg.q_in_registers)):
        held = held + (buffers.q.index(slot * cfg.pieces + p).load(cfg.q_operand),)  # type: ignore[assignment]  # noqa: RUF005
    return held


@gluon.jit
def issue_qk(buffers, held_q, slot, stage, cfg: gl.constexpr):
    """Start S = Q K^T of the K block in ``stage``; asynchronous."""
    scores = gl.full([64, cfg.block_n], 0.0, gl.float32, cfg.scores)
    for p in gl.static_range(gl.constexpr(cfg.pieces)):
        k = buffers.k.index(stage * cfg.pieces + p).permute((1, 0))
        if p < cfg.q_in_registers:
            scores = warpgroup_mma(held_q[p], k, scores, use_acc=p > 0, is_async=True)
        else:
            q = buffers.q.index(slot * cfg.pieces + p)
            scores = warpgroup_mma(q, k, scores, use_acc=p > 0, is_async=True)
    return scores


@gluon.jit
def first_scores(buffers, held_q, slot, at, cfg: gl.constexpr):
    await_k(buffers, at, cfg)
    scores = issue_qk(buffers, held_q, slot, at.stage, cfg)
    scores = warpgroup_mma_wait(0, deps=[scores])
    release_k(buffers, at)
    return scores


@gluon.jit
def clear_tail(buffers, stage, valid, cfg: gl.constexpr):
    """Zero the V rows from ``valid`` on: beyond a sequence lies whatever lies there, NaN included, and
    0 * NaN is NaN. Every warpgroup clears for itself, so no warpgroup waits for another."""
    if valid < cfg.block_n:
        v = buffers.v.index(stage)
        rows = gl.arange(0, 16, layout=gl.SliceLayout(1, cfg.clear_layout))
        for r in gl.static_range(gl.constexpr(cfg.block_n // 16)):
            if valid < (r + 1) * 16:
                part = v.slice(r * 16, 16, dim=0)
                kept = gl.expand_dims(rows + r * 16, 1) < valid
                part.store(gl.where(kept, part.load(cfg.clear_layout), 0.0))
        fence_async_shared()
        cta_barrier()
