"""What a compiled decode kernel depends on, the layouts that follow from it, and the table of its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from headway.kernels._triton import gl


@dataclass(frozen=True)
class DecodeTile:
    """How a worker is built. ``stages`` of ``block_n`` keys and values are in flight or being read."""

    block_n: int
    stages: int
    per_multiprocessor: int = 2  # workers that share one multiprocessor
    k_width: int = 0  # columns of one shared-memory piece of K; 0: all of head_dim
    merge_parts: int = 16  # parts of a cut unit that are read at once
    unit_cost: int = 1  # what a unit costs besides its blocks, in blocks

    @property
    def maxnreg(self) -> int:
        """Registers per thread at launch; a worker is eight warps, of which the producer needs few."""
        return 128 if self.per_multiprocessor == 2 else 168


#: Shared memory of a multiprocessor that one worker can have, less what barriers and reductions take.
SHARED_BYTES = 227 * 1024 - 2048

#: By padded head_dim and head_dim_v, and bytes per element of keys and values.
DECODE_TILES: dict[tuple[int, int, int], DecodeTile] = {
    (64, 64, 2): DecodeTile(block_n=128, stages=3),
    (128, 128, 2): DecodeTile(block_n=64, stages=3),
    (192, 128, 2): DecodeTile(block_n=64, stages=5, per_multiprocessor=1, k_width=64),
    (256, 256, 2): DecodeTile(block_n=64, stages=3, per_multiprocessor=1, merge_parts=8),
    (64, 64, 1): DecodeTile(block_n=128, stages=5),
    (128, 128, 1): DecodeTile(block_n=128, stages=2),
}

#: The same for more than FEW_ROWS packed rows, where boxes are long: fewer workers leave fewer, larger
#: parts to merge.
MANY_ROWS_TILES: dict[tuple[int, int, int], DecodeTile] = {
    (128, 128, 2): DecodeTile(block_n=128, stages=3, per_multiprocessor=1),
}
FEW_ROWS = 8


@dataclass(frozen=True)
class DecodeConfig:
    """Everything a compiled decode kernel depends on.

    The fields below the line follow from those above. They are fields and not properties because Triton
    keys compiled kernels by the text of this object.
    """

    q_dtype: Any  # gl.bfloat16, gl.float16 or, beside float8 keys, gl.float8e4nv
    kv_dtype: Any  # of keys and values: q_dtype or gl.float8e4nv
    tile: DecodeTile
    head_dim: int
    head_dim_v: int
    group: int  # query heads that share a KV head
    m_tiles: int = 1  # tiles of 64 packed query rows per KV head
    rows: int = 64  # packed rows of a tile that parts have room for
    page_size: int = 0  # 0: keys are not paged
    gathered: bool = False  # rows come one by one instead of in boxes
    has_left: bool = False
    has_right: bool = False
    has_chunk: bool = False
    has_pad: bool = False
    has_soft_cap: bool = False
    # ------------------------------------------------------------------------------------------------
    narrow: bool = field(
        init=False
    )  # float8: scores from float8 products, output from float16 ones
    p_dtype: Any = field(init=False)  # of probabilities and of the values they multiply
    terms: int = field(init=False)  # float8 tiles that add up to the queries
    q_tiles: int = field(init=False)
    block_n: int = field(init=False)
    stages: int = field(init=False)
    k_width: int = field(init=False)
    pieces: int = field(init=False)
    v_width: int = field(init=False)
    box_rows: int = field(init=False)
    boxes: int = field(init=False)
    stage_bytes: int = field(init=False)
    full_count: int = field(init=False)
    producer_registers: int = field(init=False)
    left_limit: bool = field(init=False)
    unit_cost: int = field(init=False)
    merge_parts: int = field(init=False)
    merge_rows: int = field(init=False)
    q_smem: Any = field(init=False)
    v_wide: Any = field(init=False)
    k_stage: Any = field(init=False)
    v_stage: Any = field(init=False)
    k_boxes: Any = field(init=False)
    v_boxes: Any = field(init=False)
    scores: Any = field(init=False)
    output: Any = field(init=False)
    scores_row: Any = field(init=False)
    output_row: Any = field(init=False)
    p_operand: Any = field(init=False)
    q_rows: Any = field(init=False)
    k_rows: Any = field(init=False)
    v_rows: Any = field(init=False)
    merged: Any = field(init=False)

    def __post_init__(self) -> None:
        tile, set_ = self.tile, functools.partial(object.__setattr__, self)
        width, v_width = padded(self.head_dim), padded_v(self.head_dim_v)
        k_width = tile.k_width or width
        rows = box_rows(self.page_size, tile.block_n)
        itemsize = self.kv_dtype.primitive_bitwidth // 8
        narrow = itemsize == 1
        set_("narrow", narrow)
        set_("p_dtype", gl.float16 if narrow else self.kv_dtype)
        set_("terms", 2 if narrow and self.q_dtype != self.kv_dtype else 1)
        set_("q_tiles", self.terms * (width // k_width))
        set_("block_n", tile.block_n)
        set_("stages", tile.stages)
        set_("k_width", k_width)
        set_("pieces", width // k_width)
        set_("v_width", v_width)
        set_("box_rows", rows)
        set_("boxes", tile.block_n // rows)
        set_("stage_bytes", tile.block_n * (width + v_width) * itemsize)
        set_("full_count", 128 if self.gathered else 1)
        # A page number per box, of this block and of the next; a gathering producer holds many addresses.
        set_("producer_registers", 80 if self.gathered else 32 if tile.block_n // rows <= 2 else 64)
        set_("left_limit", self.has_left or self.has_chunk or self.has_pad)
        stage = functools.partial(gl.NVMMASharedLayout.get_default_for, dtype=self.kv_dtype)
        set_("q_smem", stage([64, k_width]))
        set_(
            "v_wide",
            gl.NVMMASharedLayout.get_default_for([tile.block_n, v_width], self.p_dtype),
        )
        set_("k_stage", stage([tile.block_n, k_width]))
        set_("v_stage", stage([tile.block_n, v_width]))
        set_("k_boxes", stage([1, 1, tile.block_n, k_width]))
        set_("v_boxes", stage([1, 1, tile.block_n, v_width]))
        scores = _mma_layout(tile.block_n, 32 // itemsize)
        output = _mma_layout(v_width, 16)
        set_("scores", scores)
        set_("output", output)
        set_("scores_row", gl.SliceLayout(1, scores))
        set_("output_row", gl.SliceLayout(1, output))
        set_("p_operand", gl.DotOperandLayout(0, output, 2))
        set_("q_rows", _rows_layout(k_width, 2))
        set_("k_rows", _rows_layout(k_width, itemsize))
        set_("v_rows", _rows_layout(v_width, itemsize))
        lanes = min(v_width // 4, 32)
        set_("unit_cost", tile.unit_cost)
        set_("merge_parts", tile.merge_parts)
        set_("merge_rows", 4 * (32 // lanes))
        set_("merged", gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, 4, 1], [2, 1, 0]))


def _mma_layout(columns: int, depth: int) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth]
    )


def _rows_layout(width: int, itemsize: int) -> Any:
    """16 bytes per thread along rows of ``width`` elements, four warps."""
    vector = 16 // itemsize
    lanes = min(width // vector, 32)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])


def padded(head_dim: int) -> int:
    """Columns of a tile of keys that holds ``head_dim``: 64, 128, 192 or 256."""
    return next(width for width in (64, 128, 192, 256) if head_dim <= width)


def padded_v(head_dim_v: int) -> int:
    """Columns of a tile of values, a power of two because an accumulator has them: 64, 128 or 256."""
    return next(width for width in (64, 128, 256) if head_dim_v <= width)


def tile_for(
    head_dim: int, head_dim_v: int, itemsize: int = 2, rows: int = 1, page_size: int = 0
) -> DecodeTile:
    """The tile of these head dims: the measured one, or as many stages of 64 keys as there is room for.

    Args:
        itemsize: bytes per element of keys and values.
        rows: packed query rows of a KV head.
        page_size: 0: keys are not paged.
    """
    width, v_width = padded(head_dim), padded_v(head_dim_v)
    many = rows > FEW_ROWS and page_size % 64 == 0
    if many and (width, v_width, itemsize) in MANY_ROWS_TILES:
        return MANY_ROWS_TILES[width, v_width, itemsize]
    if (width, v_width, itemsize) in DECODE_TILES:
        return DECODE_TILES[width, v_width, itemsize]
    block_bytes = 64 * (width + v_width)
    room = SHARED_BYTES - 64 * width * 2 - (64 * v_width * 2 if itemsize == 1 else 0)
    return DecodeTile(
        block_n=64,
        stages=min(room // (block_bytes * itemsize), 8),
        per_multiprocessor=1,
        k_width=64 if width == 192 else 0,
        merge_parts=8 if v_width == 256 else 16,
    )


def box_rows(page_size: int, block_n: int) -> int:
    """Keys per TMA box: a power of two that divides both the page and the block."""
    return block_n if page_size == 0 else min(page_size & -page_size, block_n)
