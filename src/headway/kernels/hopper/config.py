"""What a compiled forward kernel depends on, and the layouts that follow from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from headway.kernels._triton import gl
from headway.kernels.hopper.tiles import ForwardTile


@dataclass(frozen=True)
class ForwardConfig:
    """Everything a compiled forward kernel depends on.

    The fields below the line follow from those above. They are fields and not properties because Triton
    keys compiled kernels by the text of this object.
    """

    dtype: Any  # gl.bfloat16 or gl.float16
    tile: ForwardTile
    head_dim: int  # as padded
    head_dim_v: int
    page_size: int = 0  # 0: keys are not paged
    pack: int = 1  # query heads of one KV head packed into rows
    ragged_q: bool = False
    exact_q: bool = True  # every row of q and out up to the next sequence belongs to the call
    exact_k: bool = True  # TMA itself ends each sequence's keys: nothing foreign in a tail
    has_left: bool = False
    has_right: bool = False
    has_chunk: bool = False
    has_soft_cap: bool = False
    #: scores are scaled before the softmax, which any scale but a positive one needs
    prescaled: bool = False
    split: bool = False  # tiles cover pieces of a sequence's keys and leave partial results
    gathered_dims: tuple[int, int] | None = None  # as given; keys come row by row, not in boxes
    work_list: bool = False  # tiles come from a schedule made on the device
    dynamic: bool = False  # tiles from an atomic counter instead of round robin
    # ------------------------------------------------------------------------------------------------
    block_m: int = field(init=False, compare=False)
    block_n: int = field(init=False, compare=False)
    stages: int = field(init=False, compare=False)
    stages_v: int = field(init=False, compare=False)
    q_slots: int = field(init=False, compare=False)
    piece: int = field(init=False, compare=False)
    pieces: int = field(init=False, compare=False)
    columns: int = field(init=False, compare=False)
    columns_v: int = field(init=False, compare=False)
    box_rows: int = field(init=False, compare=False)
    warpgroups: int = field(init=False, compare=False)
    q_in_registers: int = field(init=False, compare=False)
    overlap: bool = field(init=False, compare=False)
    out_columns: int = field(init=False, compare=False)
    early_q: bool = field(init=False, compare=False)
    gathered: bool = field(init=False, compare=False)
    producer_warps: int = field(init=False, compare=False)
    helpers: int = field(init=False, compare=False)
    info_fields: int = field(init=False, compare=False)
    full_count: int = field(init=False, compare=False)
    worker_warps: list[int] = field(init=False, compare=False)
    worker_registers: list[int] = field(init=False, compare=False)
    left_limit: bool = field(init=False, compare=False)
    q_view_shape: list[int] = field(init=False, compare=False)
    scores: Any = field(init=False, compare=False)
    output: Any = field(init=False, compare=False)
    q_operand: Any = field(init=False, compare=False)
    p_operand: Any = field(init=False, compare=False)
    scores_row: Any = field(init=False, compare=False)
    output_row: Any = field(init=False, compare=False)
    q_box: list[int] = field(init=False, compare=False)
    k_box: list[int] = field(init=False, compare=False)
    q_box_smem: Any = field(init=False, compare=False)
    k_box_smem: Any = field(init=False, compare=False)
    q_smem: Any = field(init=False, compare=False)
    k_smem: Any = field(init=False, compare=False)
    v_smem: Any = field(init=False, compare=False)
    o_smem: Any = field(init=False, compare=False)
    box_smem: Any = field(init=False, compare=False)
    info_smem: Any = field(init=False, compare=False)
    producer_scalar: Any = field(init=False, compare=False)
    consumer_scalar: Any = field(init=False, compare=False)
    gather_layout: Any = field(init=False, compare=False)
    gather_smem: Any = field(init=False, compare=False)
    clear_layout: Any = field(init=False, compare=False)
    store_layout: Any = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tile, set_ = self.tile, functools.partial(object.__setattr__, self)
        for name in (
            "block_m",
            "block_n",
            "stages",
            "q_slots",
            "piece",
            "q_in_registers",
            "overlap",
            "out_columns",
        ):
            set_(name, getattr(tile, name))
        set_("stages_v", tile.stages_v or tile.stages)
        set_("warpgroups", tile.block_m // 64)
        set_("pieces", self.head_dim // tile.piece)
        set_("columns", self.head_dim // 64)
        set_("columns_v", self.head_dim_v // 64)
        set_("box_rows", box_rows(self.page_size, tile.block_n))
        # Output leaves Q's buffer alone, so that it can be handed back before the output is made.
        set_("early_q", self.split or tile.out_columns > 0)
        set_("gathered", self.gathered_dims is not None)
        set_("producer_warps", 4 if self.gathered else 1)
        boxes = tile.block_n // self.box_rows
        # One warp asks for small boxes more slowly than the copy engine fetches them.
        set_("helpers", 0 if self.gathered else {1: 0, 2: 1}.get(boxes, 3))
        # See pipeline.publish: helpers need to know where the keys are, too.
        set_("info_fields", 10 if self.helpers else 9)
        set_("full_count", 32 * self.producer_warps if self.gathered else 1)
        # What the producer has too few of it spills beside the loads; consumers would spill in their loop.
        producer = {2: 24, 3: 32} if boxes <= 2 * (self.helpers + 1) else {2: 40, 3: 56}
        if self.gathered:
            producer = {2: 32, 3: 80}
        registers = producer[self.warpgroups]
        consumer = (512 - registers) // self.warpgroups // 8 * 8
        # Of the partitions but the first, which keeps the registers that the others leave.
        loading = [self.producer_warps] if self.gathered else [1] * 4
        set_("worker_warps", [4] * (self.warpgroups - 1) + loading)
        set_("worker_registers", [consumer] * (self.warpgroups - 1) + [registers] * len(loading))
        set_("left_limit", self.has_left or self.has_chunk)
        set_("q_view_shape", [self.q_slots * self.warpgroups * self.columns, 64, 64])
        scores = _mma_layout(tile.block_n)
        output = _mma_layout(self.head_dim_v)
        set_("scores", scores)
        set_("output", output)
        set_("q_operand", gl.DotOperandLayout(0, scores, 2))
        set_("p_operand", gl.DotOperandLayout(0, output, 2))
        set_("scores_row", gl.SliceLayout(1, scores))
        set_("output_row", gl.SliceLayout(1, output))
        smem = functools.partial(gl.NVMMASharedLayout.get_default_for, dtype=self.dtype)
        set_("q_box", [1, 1, 64, 64] if self.pack == 1 else [1, 1, 64 // self.pack, self.pack, 64])
        set_("k_box", [1, 1, self.box_rows, 64])
        set_("q_box_smem", smem(self.q_box))
        set_("k_box_smem", smem(self.k_box))
        set_("q_smem", smem([64, tile.piece]))
        set_("k_smem", smem([tile.block_n, tile.piece]))
        set_("v_smem", smem([tile.block_n, self.head_dim_v]))
        set_("o_smem", smem([64, tile.out_columns or self.head_dim_v]))
        set_("gather_smem", smem([tile.block_n, 64]))
        set_("gather_layout", gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
        set_("box_smem", smem([64, 64]))
        set_("info_smem", gl.SwizzledSharedLayout(1, 1, 1, [0]))
        set_("producer_scalar", gl.BlockedLayout([1], [32], [self.producer_warps], [0]))
        set_("consumer_scalar", gl.BlockedLayout([1], [32], [4], [0]))
        set_("clear_layout", gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
        set_("store_layout", gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


def _mma_layout(columns: int) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


def box_rows(page_size: int, block_n: int) -> int:
    """Keys per TMA box: a power of two that divides both the page and the block."""
    return block_n if page_size == 0 else min(page_size & -page_size, block_n)
