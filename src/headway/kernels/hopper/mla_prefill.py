"""Float8 prefill at 192/128 over a persistent work list, for Hopper.

The lists are those of :mod:`headway.persistent`, as :mod:`headway.kernels.portable.mla_prefill` runs
them. A CTA is a compute unit: its producer warp walks the list and fetches Q, K and V with TMA, two
consumer warpgroups attend 64 query rows each, from the last key to the first, softmax beside products.

Two things are peculiar to float8. Its wgmma takes only operands whose reduced dimension is contiguous, so
values come transposed, keys in the order of :func:`..portable.quantise.interleaved`: that is the order in
which the scores' registers already are the next product's operand. And tensor cores keep some 14 bits of a
float8 sum, so a block's PV starts from zero and is added to float32 registers.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.errors import UnsupportedError
from headway.kernels._triton import (
    aggregate,
    cta_barrier,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    launch,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headway.kernels.hopper import cast_rows
from headway.kernels.hopper.masks import mask_scores
from headway.kernels.hopper.quantise_blocks import RECORD
from headway.kernels.hopper.softmax import LN2, LOG2E, partial_sums
from headway.kernels.portable.mla_prefill import Scales, mla_reduce
from headway.persistent import DeviceWork

#: Widths of keys and values.
HEAD_DIM, HEAD_DIM_V = 192, 128
#: What queries may be, as tensors and in the kernel.
QUERY_TYPES: dict[torch.dtype, Any] = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}
#: Query rows of a tile, 64 for each warpgroup; keys of a block.
BLOCK_M, BLOCK_N = 128, 128

#: log2 of a row's largest weight: float8 holds up to 448.
WEIGHT_BITS: gl.constexpr = gl.constexpr(8.0)
#: int32 facts about a tile that the producer publishes beside its Q; see Tile.
FACTS: gl.constexpr = gl.constexpr(11)
#: Bytes from the record of one stage to the next one's: TMA writes to multiples of these.
RECORD_BYTES: gl.constexpr = gl.constexpr(128)
#: Events of the ring that a tile's 16-bit queries take, one for each warpgroup.
Q_EVENTS: gl.constexpr = gl.constexpr(2)


@dataclass(frozen=True)
class PrefillConfig:
    """Everything a compiled kernel depends on. Fields below the line follow from those above."""

    causal: bool
    group: int  # query heads of a KV head
    q_type: Any = (
        gl.float8e4nv
    )  # or bfloat16, float16: then queries are cast as their tiles come up
    scale_rows: bool = False  # of 16-bit queries by their own largest magnitudes: no scale is given
    scale_blocks: bool = False  # keys and values have scales per block, in records
    stages: int = 4
    q_slots: int = 2
    producer_registers: int = 24
    # ------------------------------------------------------------------------------------------------
    block_m: int = field(init=False, compare=False)
    block_n: int = field(init=False, compare=False)
    consumer_registers: int = field(init=False, compare=False)
    scores: Any = field(init=False, compare=False)
    scores_row: Any = field(init=False, compare=False)
    output: Any = field(init=False, compare=False)
    output_row: Any = field(init=False, compare=False)
    p_operand: Any = field(init=False, compare=False)
    operand_slots: int = field(init=False, compare=False)
    q_wide_box: Any = field(init=False, compare=False)
    q_narrow_box: Any = field(init=False, compare=False)
    q_words: Any = field(init=False, compare=False)
    q_words_narrow: Any = field(init=False, compare=False)
    q_wide_rows: Any = field(init=False, compare=False)
    q_narrow_rows: Any = field(init=False, compare=False)
    record: Any = field(init=False, compare=False)
    records: Any = field(init=False, compare=False)
    wide: Any = field(init=False, compare=False)
    narrow: Any = field(init=False, compare=False)
    wide_box: Any = field(init=False, compare=False)
    narrow_box: Any = field(init=False, compare=False)
    facts: Any = field(init=False, compare=False)
    one_warp: Any = field(init=False, compare=False)
    four_warps: Any = field(init=False, compare=False)
    store: Any = field(init=False, compare=False)

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("block_m", BLOCK_M)
        set_("block_n", BLOCK_N)
        set_("consumer_registers", (504 - self.producer_registers) // 2 // 8 * 8)
        set_("scores", _mma_layout(BLOCK_N))
        set_("output", _mma_layout(HEAD_DIM_V))
        set_("scores_row", gl.SliceLayout(1, self.scores))
        set_("output_row", gl.SliceLayout(1, self.output))
        set_("p_operand", gl.DotOperandLayout(0, self.output, 4))
        # Swizzled rows of 128 bytes, and of 64: a key is one of each.
        set_("wide", _shared(128, 2))
        set_("narrow", _shared(64, 2))
        set_("wide_box", _shared(128, 3))
        set_("narrow_box", _shared(64, 3))
        # Queries of 16 bits lie in a stage of the ring: 64 rows, cut into swizzled rows of 128 bytes. Two
        # lanes share a row, which makes its maximum cheap; the swizzle keeps eight rows apart.
        set_("operand_slots", 1 if self.casts_q else self.q_slots)
        bits = self.q_type.primitive_bitwidth
        set_("q_wide_box", self.wide_box if bits == 8 else _shared(128, 3, bits))
        set_("q_narrow_box", self.narrow_box if bits == 8 else _shared(128, 3, bits))
        set_("q_words", _shared(128, 2, 32))
        set_("q_words_narrow", _shared(64, 2, 32))
        set_("q_wide_rows", gl.BlockedLayout([1, 32], [16, 2], [4, 1], [0, 1]))
        set_("q_narrow_rows", gl.BlockedLayout([1, 16], [16, 2], [4, 1], [0, 1]))
        set_("record", _shared(0, 3, 32))
        set_("records", _shared(0, 2, 32))
        set_("facts", gl.SwizzledSharedLayout(1, 1, 1, [0]))
        set_("one_warp", gl.BlockedLayout([1], [32], [1], [0]))
        set_("four_warps", gl.BlockedLayout([1], [32], [4], [0]))
        set_("store", gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

    @property
    def casts_q(self) -> bool:
        return self.q_type.primitive_bitwidth == 16


def _mma_layout(columns: int) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32]
    )


def _shared(swizzle: int, rank: int, bits: int = 8) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


# ---- what the partitions share -----------------------------------------------------------------------


@aggregate
class Buffers:
    """Shared memory of a CTA: rings of stages for K and for V, and slots for Q and what is known of it."""

    q_wide: gl.shared_memory_descriptor  # (operand_slots * 2, 64, 128)
    q_narrow: gl.shared_memory_descriptor  # (operand_slots * 2, 64, 64)
    k_wide: gl.shared_memory_descriptor  # (stages, block_n, 128)
    k_narrow: gl.shared_memory_descriptor  # (stages, block_n, 64)
    v: gl.shared_memory_descriptor  # (stages, 128, block_n)
    records: gl.shared_memory_descriptor  # (stages * 8, 1, RECORD) float32
    facts: gl.shared_memory_descriptor  # (q_slots * FACTS, 1) int32
    q_full: gl.shared_memory_descriptor  # (q_slots, 1)
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # (stages, 1)
    v_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # (stages, 1), of K and V alike

    @gluon.constexpr_function
    def __init__(
        self,
        q_wide,
        q_narrow,
        k_wide,
        k_narrow,
        v,
        records,
        facts,
        q_full,
        q_empty,
        k_full,
        v_full,
        empty,
    ):
        self.q_wide = q_wide
        self.q_narrow = q_narrow
        self.k_wide = k_wide
        self.k_narrow = k_narrow
        self.v = v
        self.records = records
        self.facts = facts
        self.q_full = q_full
        self.q_empty = q_empty
        self.k_full = k_full
        self.v_full = v_full
        self.empty = empty


@aggregate
class Tile:
    """Up to 128 query rows of one head, and the keys of one part of its work."""

    blocks: gl.tensor  # of keys; below 0: the end of the work
    first_key: gl.tensor  # of the request
    end_key: gl.tensor
    position: gl.tensor  # of row 0, among the request's keys
    rows: gl.tensor  # in use
    first_row: gl.tensor  # of out, or of the partial buffers
    head: gl.tensor
    partial: gl.tensor  # whether the result goes to the partial buffers
    scale: gl.tensor  # float32, of the scores, in base 2
    v_scale: gl.tensor
    q_scale: gl.tensor  # of 16-bit queries

    @gluon.constexpr_function
    def __init__(
        self,
        blocks,
        first_key,
        end_key,
        position,
        rows,
        first_row,
        head,
        partial,
        scale,
        v_scale,
        q_scale,
    ):
        self.blocks = blocks
        self.first_key = first_key
        self.end_key = end_key
        self.position = position
        self.rows = rows
        self.first_row = first_row
        self.head = head
        self.partial = partial
        self.scale = scale
        self.v_scale = v_scale
        self.q_scale = q_scale


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def _allocate(cfg: gl.constexpr):
    slots: gl.constexpr = cfg.q_slots
    stages: gl.constexpr = cfg.stages
    n: gl.constexpr = cfg.block_n
    buffers = Buffers(
        gl.allocate_shared_memory(gl.float8e4nv, [cfg.operand_slots * 2, 64, 128], cfg.wide),
        gl.allocate_shared_memory(gl.float8e4nv, [cfg.operand_slots * 2, 64, 64], cfg.narrow),
        gl.allocate_shared_memory(gl.float8e4nv, [stages, n, 128], cfg.wide),
        gl.allocate_shared_memory(gl.float8e4nv, [stages, n, 64], cfg.narrow),
        gl.allocate_shared_memory(gl.float8e4nv, [stages, 128, n], cfg.wide),
        gl.allocate_shared_memory(
            gl.float32, [stages * (RECORD_BYTES // (RECORD * 4)), 1, RECORD], cfg.records
        ),
        gl.allocate_shared_memory(gl.int32, [slots * FACTS, 1], cfg.facts),
        _barriers(slots, 1),
        _barriers(slots, 2),
        _barriers(stages, 1),
        _barriers(stages, 1),
        _barriers(stages, 2),
    )
    fence_async_shared()
    return buffers


@gluon.jit
def _await_full(full, event, STAGES: gl.constexpr):
    stage = event % STAGES
    mbarrier.wait(full.index(stage), (event // STAGES) & 1)
    return stage


@gluon.jit
def _await_empty(empty, event, STAGES: gl.constexpr):
    stage = event % STAGES
    mbarrier.wait(empty.index(stage), (event // STAGES) & 1 ^ 1)
    return stage


@gluon.jit
def _release(empty, event, STAGES: gl.constexpr):
    mbarrier.arrive(empty.index(event % STAGES), count=1)


# ---- producer ----------------------------------------------------------------------------------------


@gluon.jit
def _load(desc, at, full, smem):
    tma_load(desc, at, full, smem._reinterpret(desc.dtype, desc.block_shape, desc.layout))


@gluon.jit
def _publish(buffers, order, tile, cfg: gl.constexpr):
    """Describe a tile in slot ``order`` % q_slots, once both warpgroups have left it."""
    slot = _await_empty(buffers.q_empty, order, cfg.q_slots)
    facts = (
        tile.blocks,
        tile.first_key,
        tile.end_key,
        tile.position,
        tile.rows,
        tile.first_row,
        tile.head,
        tile.partial,
        tile.scale.to(gl.int32, bitcast=True),
        tile.v_scale.to(gl.int32, bitcast=True),
        tile.q_scale.to(gl.int32, bitcast=True),
    )
    for i in gl.static_range(FACTS):
        fact = gl.full([1], 0, gl.int32, cfg.one_warp) + facts[i]
        buffers.facts.index(slot * FACTS + i).store(fact)
    cta_barrier()
    return slot


@gluon.jit
def _push_q(q_wide, q_narrow, buffers, order, tile, row, cfg: gl.constexpr):
    slot = _publish(buffers, order, tile, cfg)
    full = buffers.q_full.index(slot)
    if tile.blocks > 0:
        mbarrier.expect(full, cfg.block_m * 192)
        wide = buffers.q_wide._reinterpret(gl.float8e4nv, [cfg.q_slots, cfg.block_m, 128], cfg.wide)
        narrow = buffers.q_narrow._reinterpret(
            gl.float8e4nv, [cfg.q_slots, cfg.block_m, 64], cfg.narrow
        )
        _load(q_wide, [tile.head, row, 0], full, wide.index(slot))
        _load(q_narrow, [tile.head, row, 128], full, narrow.index(slot))
    else:
        mbarrier.arrive(full, count=1)


@gluon.jit
def _push_q_to_cast(q_wide, q_narrow, buffers, order, event, tile, row, cfg: gl.constexpr):
    """Queries of 16 bits go through the ring, where K lies otherwise, a stage for each warpgroup."""
    slot = _publish(buffers, order, tile, cfg)
    mbarrier.arrive(buffers.q_full.index(slot), count=1)
    if tile.blocks > 0:
        for i in gl.static_range(Q_EVENTS):
            stage = _await_empty(buffers.empty, event + i, cfg.stages)
            mbarrier.arrive(buffers.v_full.index(stage), count=1)
            full = buffers.k_full.index(stage)
            mbarrier.expect(full, 64 * 192 * 2)
            _load(q_wide, [tile.head, row + i * 64, 0], full, buffers.k_wide.index(stage))
            _load(q_narrow, [tile.head, row + i * 64, 128], full, buffers.k_narrow.index(stage))


@gluon.jit
def _push_k(k_wide, k_narrow, records, buffers, event, head, row, block, cfg: gl.constexpr):
    stage = _await_empty(buffers.empty, event, cfg.stages)
    full = buffers.k_full.index(stage)
    if cfg.scale_blocks:
        mbarrier.expect(full, cfg.block_n * 192 + RECORD * 4)
        of_stage = buffers.records.index(stage * (RECORD_BYTES // (RECORD * 4)))
        _load(records, [head, block, 0], full, of_stage)
    else:
        mbarrier.expect(full, cfg.block_n * 192)
    _load(k_wide, [head, row, 0], full, buffers.k_wide.index(stage))
    _load(k_narrow, [head, row, 128], full, buffers.k_narrow.index(stage))


@gluon.jit
def _push_v(v, buffers, event, head, column, cfg: gl.constexpr):
    # The stage is free: K of this event, which goes ahead, waited for both.
    stage = event % cfg.stages
    full = buffers.v_full.index(stage)
    mbarrier.expect(full, cfg.block_n * 128)
    _load(v, [head, 0, column], full, buffers.v.index(stage))


@gluon.jit
def _scale(ptr, head, stride):
    """One float32 scale, or 1 where there is none."""
    if ptr is None:
        return gl.to_tensor(1.0)
    else:
        return gl.load(ptr + head * stride)


@gluon.jit
def produce(
    q_wide,
    q_narrow,
    k_wide,
    k_narrow,
    v,
    records,
    lists,
    scales,
    buffers,
    cfg: gl.constexpr,
):
    """Fetch what the items of this CTA's list need: Q, and K one block ahead of V."""
    work_indptr, work_info, qo_indptr, kv_indptr, context_lens, value_indptr = lists
    q_scale, k_scale, v_scale, stride_q_scale, stride_k_scale, stride_v_scale, softmax_scale = (
        scales
    )
    event = gl.to_tensor(0)
    order = gl.to_tensor(0)
    zero = gl.to_tensor(0)
    cu = gl.program_id(0)
    for item in range(gl.load(work_indptr + cu), gl.load(work_indptr + cu + 1)):
        fields = work_info + item * 8
        request = gl.load(fields)
        partial_row = gl.load(fields + 1)
        q_start = gl.load(fields + 2)
        q_end = gl.load(fields + 3)
        heads = gl.load(fields + 7)
        first_head = heads & 0xFFFF
        tiles = gl.cdiv(q_end - q_start, cfg.block_m)
        first = gl.load(kv_indptr + request)
        length = gl.load(context_lens + request)
        lo = gl.load(fields + 4) - first
        hi = gl.minimum(gl.load(fields + 5) - first, length)
        shift = length - gl.load(qo_indptr + request + 1)
        v_first = gl.load(value_indptr + request)
        for piece in range(((heads >> 16) - first_head) * tiles):
            head = first_head + piece // tiles
            kv_head = head // cfg.group
            row = q_start + piece % tiles * cfg.block_m
            rows = gl.minimum(q_end - row, cfg.block_m)
            end = hi
            if cfg.causal:
                end = gl.minimum(hi, row + rows + shift)
            blocks = gl.cdiv(gl.maximum(end - lo, 0), cfg.block_n)
            scale = softmax_scale * _scale(q_scale, kv_head, stride_q_scale)
            scale *= _scale(k_scale, kv_head, stride_k_scale)
            partial = gl.where(partial_row < 0, 0, 1)
            tile = Tile(
                blocks,
                lo,
                hi,
                row + shift,
                rows,
                gl.where(partial_row < 0, row, partial_row + row - q_start),
                head,
                partial,
                scale,
                _scale(v_scale, kv_head, stride_v_scale),
                _scale(q_scale, kv_head, stride_q_scale),
            )
            if cfg.casts_q:
                _push_q_to_cast(q_wide, q_narrow, buffers, order, event, tile, row, cfg)
                event += gl.where(blocks > 0, Q_EVENTS, 0)
            else:
                _push_q(q_wide, q_narrow, buffers, order, tile, row, cfg)
            order += 1
            last = lo + (blocks - 1) * cfg.block_n
            for i in range(blocks):
                key = last - i * cfg.block_n
                _push_k(
                    k_wide, k_narrow, records, buffers, event + i, kv_head, first + key,
                    (v_first + key) // cfg.block_n, cfg,
                )  # fmt: skip
                if i > 0:
                    at = v_first + key + cfg.block_n
                    _push_v(v, buffers, event + i - 1, kv_head, at, cfg)
            event += blocks
            if blocks > 0:
                _push_v(v, buffers, event - 1, kv_head, v_first + lo, cfg)
    none = gl.to_tensor(0.0)
    _publish(
        buffers,
        order,
        Tile(zero - 1, zero, zero, zero, zero, zero, zero, zero, none, none, none),
        cfg,
    )
    mbarrier.arrive(buffers.q_full.index(order % cfg.q_slots), count=1)


# ---- consumers ---------------------------------------------------------------------------------------


@gluon.jit
def _fact(buffers, slot, FIELD: gl.constexpr, cfg: gl.constexpr):
    return gl.max(buffers.facts.index(slot * FACTS + FIELD).load(cfg.four_warps), 0)


@gluon.jit
def _await_tile(buffers, order, cfg: gl.constexpr):
    slot = _await_full(buffers.q_full, order, cfg.q_slots)
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
        _await_full(buffers.k_full, event, cfg.stages)
        _release(buffers.empty, event, cfg.stages)
    stage = _await_full(buffers.k_full, event + WARPGROUP, cfg.stages)
    wide = buffers.k_wide.index(stage)._reinterpret(gl.int32, [64, 64], cfg.q_words)
    narrow = buffers.k_narrow.index(stage)._reinterpret(gl.int32, [64, 32], cfg.q_words)
    wide, narrow = wide.load(cfg.q_wide_rows), narrow.load(cfg.q_narrow_rows)
    cta_barrier()  # all have read, and the products of the tile before are done
    _release(buffers.empty, event + WARPGROUP, cfg.stages)
    if WARPGROUP == 0:
        _await_full(buffers.k_full, event + 1, cfg.stages)
        _release(buffers.empty, event + 1, cfg.stages)
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
    stage = _await_full(buffers.k_full, event + 1, cfg.stages)
    step = unit
    if cfg.scale_blocks:
        scale *= _record(buffers, stage, 0, cfg)
        step *= _record(buffers, stage, 2, cfg)
        unit = _record(buffers, stage, 1, cfg)
    scores = _issue_qk(buffers, operand, stage, cfg)
    accumulator = _added(accumulator, before, product, cfg)
    stage = _await_full(buffers.v_full, event, cfg.stages)
    product = _issue_pv(p, buffers, stage, cfg)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = mask_scores(scores, limit, limit, first_key, False)
    weights, row_max, row_sum, coming = _weigh(scores, row_max, row_sum, scale, MASKED)
    if cfg.scale_blocks:
        coming *= step
    # The wait takes no time but ends a basic block: else ptxas sinks the softmax below the wait for PV.
    _await_full(buffers.v_full, event, cfg.stages)
    product = warpgroup_mma_wait(0, deps=[product])
    _release(buffers.empty, event, cfg.stages)
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
        _await_full(buffers.k_full, event, cfg.stages)
        _await_full(buffers.v_full, event, cfg.stages)
        _release(buffers.empty, event, cfg.stages)
        event += 1
    if blocks > 0:
        operand = slot % cfg.operand_slots * 2 + WARPGROUP
        first_key = tile.first_key + (blocks - 1) * n
        stage = _await_full(buffers.k_full, event, cfg.stages)
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
        _release(buffers.q_empty, slot, cfg.q_slots)
        before, now = factors
        accumulator = _added(accumulator, before, product, cfg)
        stage = _await_full(buffers.v_full, event, cfg.stages)
        product = _issue_pv(_as_operand(words, cfg), buffers, stage, cfg)
        product = warpgroup_mma_wait(0, deps=[product])
        _release(buffers.empty, event, cfg.stages)
        accumulator = _added(accumulator, now, product, cfg)
        event += 1
    else:
        _release(buffers.q_empty, slot, cfg.q_slots)
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


_UNSPECIALISED = [
    "heads",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_row",
    "stride_lse_head",
    "stride_q_scale",
    "stride_k_scale",
    "stride_v_scale",
]


#: Pieces of a plan's one allocation: where they begin, and with it their alignment, changes by step.
_LISTS = ["work_indptr", "work_info", "qo_indptr", "kv_indptr", "context_lens", "value_indptr"]


@gluon.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_LISTS)
def mla_prefill_kernel(
    q_wide,
    q_narrow,
    k_wide,
    k_narrow,
    v,
    records,
    out,
    lse,
    partial_out,
    partial_lse,
    work_indptr,
    work_info,
    qo_indptr,
    kv_indptr,
    context_lens,
    value_indptr,
    q_scale,
    k_scale,
    v_scale,
    heads,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    stride_q_scale,
    stride_k_scale,
    stride_v_scale,
    softmax_scale,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Strides of ``out`` count in units of 8 elements: stores are then known to be aligned."""
    buffers = _allocate(cfg)
    outputs = (
        out,
        lse,
        partial_out,
        partial_lse,
        heads,
        stride_out_row * 8,
        stride_out_head * 8,
        stride_lse_row,
        stride_lse_head,
    )
    lists = (work_indptr, work_info, qo_indptr, kv_indptr, context_lens, value_indptr)
    scales = (
        q_scale,
        k_scale,
        v_scale,
        stride_q_scale,
        stride_k_scale,
        stride_v_scale,
        softmax_scale,
    )
    gl.warp_specialize(
        [
            (consume, (buffers, outputs, 0, cfg)),
            (consume, (buffers, outputs, 1, cfg)),
            (
                produce,
                (q_wide, q_narrow, k_wide, k_narrow, v, records, lists, scales, buffers, cfg),
            ),
        ],
        [4, 1],
        [cfg.consumer_registers, cfg.producer_registers],
    )


# ---- launcher ----------------------------------------------------------------------------------------


def refusal(work: DeviceWork, q: Tensor, k: Tensor, out: Tensor) -> str | None:
    """Why :func:`mla_prefill` does not take a call, q and k in float8 or about to be; None: it does."""
    dims = (q.shape[-1], out.shape[-1])
    if dims != (HEAD_DIM, HEAD_DIM_V):
        return f"heads {dims[0]}/{dims[1]} wide; takes {HEAD_DIM}/{HEAD_DIM_V}"
    if work.padded_keys == 0:
        return "no keys at all; takes at least one"
    for name, x in (("q", q), ("k", k)):
        if x.element_size() > 1:
            continue
        if x.dtype != torch.float8_e4m3fn:
            return f"{name} in {str(x.dtype).removeprefix('torch.')}; takes float8_e4m3fn"
        if not _takes_rows(x):
            return f"{name} with strides {x.stride()}; takes multiples of 16, and such an address"
    if out.stride(-1) != 1 or any(n % 8 for n in out.stride()[:-1]):
        return f"out with strides {out.stride()}; takes multiples of 8"
    return None


def takes_queries(q: Tensor) -> bool:
    """Whether the kernel takes queries as they are; where not, they must be made float8 and contiguous."""
    return q.dtype in QUERY_TYPES and _takes_rows(q)


def _takes_rows(x: Tensor) -> bool:
    """Whether TMA reads rows of (tokens, heads, width)."""
    steps = (*(n * x.element_size() for n in x.stride()[:-1]), x.data_ptr())
    return x.stride(-1) == 1 and not any(n % 16 for n in steps)


def mla_prefill(
    work: DeviceWork,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float,
    scales: Scales,
    records: Tensor | None = None,
    **options: Any,
) -> None:
    """Execute a work list and merge what was split; ``out`` and ``lse`` are filled.

    Args:
        q: (total_q, Hq, 192), float8_e4m3fn, or bfloat16 or float16: then it is divided by its scale, or
            each row by its own, and rounded to float8 here. k: (total_k, Hkv, 192) float8_e4m3fn.
        values: (Hkv, 128, padded keys) float8_e4m3fn, as :func:`..portable.quantise.transpose_values` makes
            them, at ``work.value_indptr``.
        records: (Hkv, padded keys / 128, 4) float32, scales of every block of keys, in place of k's and v's
            in ``scales``; from :func:`.quantise_blocks.quantise_blocks`.
        out: (total_q, Hq, 128), bfloat16, float16 or float32. lse: (total_q, Hq) with any strides, or None.
        options: fields of :class:`PrefillConfig`.

    Raises:
        UnsupportedError: head dims, dtypes or strides this kernel does not take.
    """
    reason = refusal(work, q, k, out)
    if reason is not None:
        raise UnsupportedError(f"hopper MLA prefill: {reason}")
    if out.numel() == 0:
        return
    chosen = {
        "q_type": QUERY_TYPES[q.dtype],
        "scale_rows": q.element_size() > 1 and scales.q is None,
        "scale_blocks": records is not None,
        **options,
    }
    cfg = _config(work.is_causal, q.shape[1] // work.num_heads_k, tuple(chosen.items()))
    partial_out, partial_lse = work.partial_buffers(q.shape[1], HEAD_DIM_V)
    factors = scales.arguments()
    pointers = (
        out,
        lse,
        partial_out,
        partial_lse,
        work.work_indptr,
        work.work_info,
        work.qo_indptr,
        work.kv_indptr,
        work.context_lens,
        work.value_indptr,
        *(factors[f"{name}_scale"] for name in "qkv"),
    )
    args = (
        *_descriptors(q, k, values, records, cfg),
        *pointers,
        q.shape[1],
        out.stride(0) // 8,
        out.stride(1) // 8,
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        *(factors[f"stride_{name}_scale"] for name in "qkv"),
        softmax_scale * LOG2E.value,
        cfg,
        4,
    )
    aligned = (out, lse, partial_out, partial_lse, scales.q, scales.k, scales.v)
    kind = [None if p is None else p.data_ptr() % 16 == 0 for p in aligned]
    launch(mla_prefill_kernel, (work.num_cu, 1, 1), (cfg, out.dtype, q.device, *kind), args)
    if work.num_groups > 0:
        mla_reduce(work, partial_out, partial_lse, out, lse)


@functools.lru_cache(maxsize=64)
def _config(causal: bool, group: int, options: tuple[tuple[str, Any], ...]) -> PrefillConfig:
    return PrefillConfig(causal, group, **dict(options))


def _descriptors(
    q: Tensor, k: Tensor, values: Tensor, records: Tensor | None, cfg: PrefillConfig
) -> tuple[Any, ...]:
    """What the kernel loads by TMA: q and k in two pieces each, values, records."""
    rows = 64 if cfg.casts_q else BLOCK_M
    return (
        descriptor(*_rows(q), [1, rows, 128], cfg.q_wide_box),
        descriptor(*_rows(q), [1, rows, 64], cfg.q_narrow_box),
        descriptor(*_rows(k), [1, BLOCK_N, 128], cfg.wide_box),
        descriptor(*_rows(k), [1, BLOCK_N, 64], cfg.narrow_box),
        descriptor(values, values.shape, values.stride(), [1, 128, BLOCK_N], cfg.wide_box),
        None
        if records is None
        else descriptor(records, records.shape, records.stride(), [1, 1, RECORD.value], cfg.record),
    )


def _rows(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """(tokens, heads, width) for a descriptor: (heads, tokens, width)."""
    tokens, heads, width = x.shape
    return x, [heads, tokens, width], [x.stride(1), x.stride(0), 1]
