"""What the partitions of float8 prefill share: configuration, buffers, barriers and tiles."""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
import functools
from dataclasses import dataclass, field
from typing import Any

from headway.kernels._triton import aggregate, fence_async_shared, gl, gluon, mbarrier
from headway.kernels.hopper.quantise_blocks import RECORD

#: Widths of keys and values.
HEAD_DIM, HEAD_DIM_V = 192, 128
#: Query rows of a tile, 64 for each warpgroup; keys of a block.
BLOCK_M, BLOCK_N = 128, 128

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
    q_type: Any = gl.float8e4nv  # or bfloat16, float16: cast as their tiles come up
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
def allocate(cfg: gl.constexpr):
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
def await_full(full, event, STAGES: gl.constexpr):
    stage = event % STAGES
    mbarrier.wait(full.index(stage), (event // STAGES) & 1)
    return stage


@gluon.jit
def await_empty(empty, event, STAGES: gl.constexpr):
    stage = event % STAGES
    mbarrier.wait(empty.index(stage), (event // STAGES) & 1 ^ 1)
    return stage


@gluon.jit
def release(empty, event, STAGES: gl.constexpr):
    mbarrier.arrive(empty.index(event % STAGES), count=1)
