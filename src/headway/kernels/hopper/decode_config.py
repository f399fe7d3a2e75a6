"""What a compiled decode kernel depends on, the layouts that follow from it, and the table of its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from headway.kernels._triton import gl, next_power_of_2

#: Registers per thread at launch, by workers that share a multiprocessor and consumers of a worker: four
#: warps each, and four for the producer, which needs few.
_LAUNCH_REGISTERS = {(1, 1): 168, (1, 2): 168, (2, 1): 128, (3, 1): 80}

#: Packed rows of a tile, and how many one warpgroup takes.
TILE_ROWS = 64
CONSUMER_ROWS = 32
#: Packed rows up to which latents are multiplied as keys by queries: beyond, packed rows are wgmma's.
WIDE_ROWS = 16
#: Column pieces in which latents arrive: scores begin with the first.
LATENT_PIECES = 2
#: The same where two warpgroups take turns at halves of blocks.
PAIRED_PIECES = 4
#: Packed rows beyond which they do: up to one tile of them, memory is the limit.
PAIRED_ROWS = 64
#: Column pieces in which float8 latents are widened in registers, two of them at work at a time.
WIDEN_PIECES = 4


@dataclass(frozen=True)
class DecodeTile:
    """How a worker is built. ``stages`` of ``block_n`` keys and values are in flight or being read."""

    block_n: int
    stages: int
    per_multiprocessor: int = 2  # workers that share one multiprocessor
    k_width: int = 0  # columns of one shared-memory piece of K; 0: all of head_dim
    merge_parts: int = 16  # parts of a cut unit that are read at once
    whole_keys: int = 0  # of a unit, at most, that workers of one multiprocessor do not share
    unit_cost: int = 1  # what a unit costs besides its blocks, in blocks
    gather: bool = False  # rows one by one, also where boxes would do
    combine: bool = False  # units that were cut are merged by a kernel of its own
    paired: bool = False  # halves of a block by two warpgroups in turns, for many rows of latents
    abreast: int = 1  # KV heads whose rows lie side by side and are read as one


@dataclass(frozen=True)
class AppendForm:
    """What a compiled kernel that appends new tokens depends on besides."""

    tokens: int  # of a sequence, at most: a power of two, at least APPENDED_AT_LEAST
    rotary_half: int = 0  # pairs of columns that are rotated
    interleaved: bool = False  # pairs are neighbours
    q_turns: bool = False  # queries are rotated by positions of their own
    dtypes: tuple[Any, ...] = ()  # of new keys and values, cos and sin, as torch names them
    given: tuple[bool, ...] = ()  # which lengths there are: of new tokens, for rotary


#: New tokens of a tile: one for each warp of a consumer.
APPENDED_AT_LEAST = 4
#: New tokens of a sequence, at most, that the decode kernel writes.
MOST_APPENDED = 16

#: Shared memory of a multiprocessor, of which one kibibyte per worker is the system's.
SHARED_BYTES = 228 * 1024
#: What barriers, reductions and merging take of a worker's share.
OTHER_SHARED_BYTES = 2048

#: Keys of a block and workers per multiprocessor, by padded head_dim and head_dim_v and bytes per element
#: of keys and values.
DECODE_TILES: dict[tuple[int, int, int], tuple[int, int]] = {
    (64, 64, 2): (128, 1),
    (128, 128, 2): (128, 1),
    (64, 512, 2): (64, 1),
    (64, 64, 1): (256, 2),
    (64, 512, 1): (64, 1),
    (128, 128, 1): (128, 2),
    (192, 128, 1): (64, 2),
    (256, 256, 1): (64, 2),
}

#: The same where boxes are shorter than LONG_BOX keys: one producer cannot ask for as many.
SHORT_BOX_TILES: dict[tuple[int, int, int], tuple[int, int]] = {
    (64, 64, 2): (128, 2),
    (128, 128, 2): (64, 2),
}
LONG_BOX = 64
#: Keys of a unit, at most, that two workers of one multiprocessor do not share, of 16 bits:
#: float8 blocks keep two of them busy.
WHOLE_KEYS = 1152
#: Of those, the ones that come faster row by row.
ROWS_FASTER = {(128, 128, 1)}
#: Warps that share the boxes of a block where there are at least as many.
PRODUCERS = 4

#: The same for more than FEW_ROWS packed rows, whose scores take more registers.
MANY_ROWS_TILES: dict[tuple[int, int, int], tuple[int, int]] = {
    (64, 64, 1): (128, 2),
    (128, 128, 1): (64, 2),
    (256, 256, 1): (64, 1),
}
FEW_ROWS = 16

#: Rows for two consumers, which leave room for one worker only.
TWO_CONSUMERS_TILES: dict[tuple[int, int, int], tuple[int, int]] = {
    (64, 64, 2): (128, 1),
    (128, 128, 2): (128, 1),
    (64, 64, 1): (128, 1),
    (128, 128, 1): (128, 1),
}


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
    group: int  # query heads that share a KV head, or KV heads that are read as one
    m_tiles: int = 1  # tiles of 64 packed query rows per KV head, each a program's
    rows: int = 64  # packed rows of a tile that parts have room for
    page_size: int = 0  # 0: keys are not paged
    latent: bool = False  # values are keys as well, for queries of their own
    parted: bool = False  # scores of keys and of latents have descales of their own
    has_left: bool = False
    has_right: bool = False
    has_chunk: bool = False
    has_pad: bool = False
    has_soft_cap: bool = False
    append: AppendForm | None = None  # keys and values of new tokens are written, and all rotated
    # ------------------------------------------------------------------------------------------------
    gathered: bool = field(init=False)  # rows come one by one instead of in boxes
    by_pointer: bool = field(init=False)  # addresses of rows are needed
    narrow: bool = field(init=False)  # float8 keys and values, widened between stages and products
    widened: bool = field(init=False)  # float8 latents, widened on their way to stages
    dtype: Any = field(init=False)  # of everything that is multiplied
    stage_dtype: Any = field(init=False)  # of keys and values in stages
    scaled: bool = field(init=False)  # queries are brought into float16's range
    consumers: int = field(init=False)  # warpgroups that share the rows of a tile
    twin: bool = field(init=False)  # consumers take turns at blocks, of the same rows
    wide: bool = field(init=False)  # consumers share the columns of values instead of the rows
    columns: int = field(init=False)  # a consumer's packed rows, as columns of scores and output
    out_width: int = field(init=False)  # a consumer's columns of values
    v_pieces: int = field(init=False)  # column pieces in which a stage's values arrive, one by one
    v_box_width: int = field(init=False)
    widen_pieces: int = field(init=False)  # column pieces in which values are widened in registers
    widen_width: int = field(init=False)
    maxnreg: int = field(init=False)
    abreast: int = field(init=False)
    block_n: int = field(init=False)
    stage_keys: int = field(init=False)  # keys of a stage: a block's, or half of them
    stages: int = field(init=False)
    k_width: int = field(init=False)
    producers: int = field(init=False)  # warps that ask for boxes
    pieces: int = field(init=False)
    v_width: int = field(init=False)
    box_rows: int = field(init=False)
    boxes: int = field(init=False)
    k_bytes: int = field(init=False)
    v_piece_bytes: int = field(init=False)
    full_count: int = field(init=False)
    worker_warps: tuple[int, ...] = field(init=False)
    worker_registers: tuple[int, ...] = field(init=False)
    left_limit: bool = field(init=False)
    new_tokens: int = field(init=False)  # 0: nothing is appended
    rotates: bool = field(init=False)
    rotary_half: int = field(init=False)
    interleaved: bool = field(init=False)
    q_turns: bool = field(init=False)
    new_k_width: int = field(init=False)
    new_v_width: int = field(init=False)
    unit_cost: int = field(init=False)
    merge_parts: int = field(init=False)
    merge_rows: int = field(init=False)
    q_smem: Any = field(init=False)
    p_smem: Any = field(init=False)
    k_stage: Any = field(init=False)
    v_stage: Any = field(init=False)
    k_smem: Any = field(init=False)
    v_smem: Any = field(init=False)
    k_narrow: Any = field(init=False)
    v_narrow: Any = field(init=False)
    k_boxes: Any = field(init=False)
    v_boxes: Any = field(init=False)
    k_pairs: Any = field(init=False)
    v_pairs: Any = field(init=False)
    k_pair_layout: Any = field(init=False)
    v_pair_layout: Any = field(init=False)
    product: Any = field(init=False)
    row: Any = field(init=False)
    warps: Any = field(init=False)
    operand: Any = field(init=False)
    q_rows: Any = field(init=False)
    wide_scores: Any = field(init=False)
    wide_output: Any = field(init=False)
    wide_row: Any = field(init=False)
    wide_out_row: Any = field(init=False)
    wide_operand: Any = field(init=False)
    rope_operand: Any = field(init=False)
    half_rows: Any = field(init=False)
    exchange: Any = field(init=False)
    row_numbers: Any = field(init=False)
    latent_smem: Any = field(init=False)
    latent_rows: Any = field(init=False)
    latent_pair_layout: Any = field(init=False)
    latent_fours: Any = field(init=False)
    rope_fours: Any = field(init=False)
    k_rows: Any = field(init=False)
    v_rows: Any = field(init=False)
    new_k_rows: Any = field(init=False)
    new_v_rows: Any = field(init=False)
    merged: Any = field(init=False)

    def __post_init__(self) -> None:
        tile, set_ = self.tile, functools.partial(object.__setattr__, self)
        width, v_width = padded(self.head_dim), padded_v(self.head_dim_v)
        k_width = tile.k_width or width
        stage_keys = tile.block_n // 2 if tile.paired else tile.block_n
        rows = box_rows(self.page_size, stage_keys)
        itemsize = self.kv_dtype.primitive_bitwidth // 8
        wide = self.latent and self.rows > WIDE_ROWS
        widened = wide and itemsize == 1
        narrow = itemsize == 1 and not wide
        dtype = gl.float16 if itemsize == 1 else self.kv_dtype
        stage_dtype = dtype if widened else self.kv_dtype
        consumers, columns = (2, TILE_ROWS) if wide else consumers_of(self.rows)
        out_width = v_width // 2 if wide else v_width
        v_pieces = LATENT_PIECES if self.latent else 1
        if tile.paired:
            v_pieces = PAIRED_PIECES
        by_rows = self.page_size % 8 != 0 or (tile.gather and self.page_size > 0)
        set_("gathered", by_rows)
        set_("by_pointer", by_rows or widened or self.append is not None)
        set_("narrow", narrow)
        set_("widened", widened)
        set_("dtype", dtype)
        set_("stage_dtype", stage_dtype)
        set_("scaled", (narrow or widened) and self.q_dtype == gl.bfloat16)
        twin = self.latent and narrow
        if twin:
            consumers = 2
        set_("twin", twin)
        set_("consumers", consumers)
        set_("wide", wide)
        set_("columns", columns)
        set_("out_width", out_width)
        set_("v_pieces", v_pieces)
        set_("v_box_width", v_width // v_pieces)
        widen_pieces = WIDEN_PIECES if self.latent else 1
        set_("widen_pieces", widen_pieces)
        set_("widen_width", v_width // widen_pieces)
        set_("maxnreg", _LAUNCH_REGISTERS[tile.per_multiprocessor, consumers])
        set_("abreast", tile.abreast)
        set_("block_n", tile.block_n)
        set_("stage_keys", stage_keys)
        set_("stages", tile.stages)
        set_("k_width", k_width)
        set_("pieces", width // k_width)
        set_("v_width", v_width)
        set_("box_rows", rows)
        set_("boxes", stage_keys // rows)
        set_("k_bytes", stage_keys * width * itemsize)
        set_("v_piece_bytes", stage_keys * v_width // v_pieces * itemsize)
        many_boxes = not self.gathered and not self.latent and tile.block_n // rows >= PRODUCERS
        producers = PRODUCERS if many_boxes else 1
        set_("producers", producers)
        set_("full_count", 128 if self.gathered and not widened else producers)
        # A page number per box, of this block and of the next; a gathering producer holds many addresses.
        registers = 80 if self.gathered else 32 if tile.block_n // rows <= 2 else 64
        producer_warps = 4 if self.gathered else 1
        if tile.paired:
            set_("worker_warps", (4, 1))
            set_("worker_registers", (232, 40))
        elif wide:
            set_("maxnreg", 128)
            set_("worker_warps", (4, 4, 4 if widened else producer_warps))
            many = self.gathered or widened
            set_("worker_registers", (160, 160, 80) if many else (168, 168, 40))
        elif consumers == 2:
            producer_registers = 80 if self.gathered else 40
            set_("worker_warps", (4, *[producer_warps] * producers))
            consumer_registers = 208 if self.gathered else 232
            set_("worker_registers", (consumer_registers, *[producer_registers] * producers))
        else:
            set_("worker_warps", (producer_warps,) * producers)
            set_("worker_registers", (registers,) * producers)
        set_("left_limit", self.has_left or self.has_chunk or self.has_pad)
        smem = gl.NVMMASharedLayout.get_default_for
        set_("q_smem", smem([columns, k_width], dtype))
        set_("p_smem", smem([columns, stage_keys], dtype))
        set_("k_stage", smem([stage_keys, k_width], stage_dtype))
        set_("v_stage", smem([stage_keys, v_width], stage_dtype))
        set_("k_smem", smem([1, 1, stage_keys, k_width], stage_dtype))
        set_("v_smem", smem([1, 1, stage_keys, v_width], stage_dtype))
        set_("k_boxes", smem([1, 1, stage_keys, k_width], self.kv_dtype))
        set_("v_boxes", smem([1, 1, stage_keys, v_width], self.kv_dtype))
        set_("k_narrow", smem([stage_keys, k_width], self.kv_dtype))
        set_("v_narrow", smem([stage_keys, v_width], self.kv_dtype))
        set_("k_pairs", smem([tile.block_n, k_width // 2], gl.int16))
        set_("v_pairs", smem([tile.block_n, v_width // 2], gl.int16))
        set_("k_pair_layout", _k_pair_layout(tile.block_n, k_width // 2))
        set_("v_pair_layout", _v_pair_layout(tile.block_n, v_width // widen_pieces // 2))
        product = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
        )
        set_("product", product)
        warps = _by_warp_layout(columns)
        set_("warps", warps)
        set_("row", gl.SliceLayout(0, product))
        set_("operand", gl.DotOperandLayout(0, product, 2))
        set_("q_rows", _rows_layout(k_width, 2))
        wide_scores = _wide_layout(stage_keys)
        wide_output = _wide_layout(out_width, 256 if tile.paired else 128)
        set_("wide_scores", wide_scores)
        set_("wide_output", wide_output)
        set_("wide_row", gl.SliceLayout(1, wide_scores))
        set_("wide_out_row", gl.SliceLayout(1, wide_output))
        set_("wide_operand", gl.DotOperandLayout(0, wide_output, 2))
        set_("rope_operand", gl.DotOperandLayout(0, wide_scores, 2))
        set_("half_rows", _rows_layout(out_width, 2))
        set_("exchange", gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        set_("row_numbers", gl.SwizzledSharedLayout(1, 1, 1, [0]))
        set_("latent_smem", smem([columns, v_width], dtype))
        set_("latent_rows", _rows_layout(v_width // v_pieces, 2))
        set_("latent_pair_layout", _k_pair_layout(tile.block_n, v_width // widen_pieces // 2))
        set_("latent_fours", _fours_layout(tile.block_n, v_width // 4 // 4))
        set_("rope_fours", _fours_layout(tile.block_n, k_width // 4))
        set_("k_rows", _rows_layout(k_width, itemsize))
        set_("v_rows", _rows_layout(v_width // v_pieces, itemsize))
        append = self.append or AppendForm(0)
        set_("new_tokens", append.tokens)
        set_("rotates", append.rotary_half > 0)
        set_("rotary_half", append.rotary_half)
        set_("interleaved", append.interleaved)
        set_("q_turns", append.q_turns)
        # A warp for a row.
        new_k_width, new_v_width = next_power_of_2(width), next_power_of_2(v_width)
        set_("new_k_width", new_k_width)
        set_("new_v_width", new_v_width)
        set_("new_k_rows", gl.BlockedLayout([1, new_k_width // 32], [1, 32], [4, 1], [1, 0]))
        set_("new_v_rows", gl.BlockedLayout([1, new_v_width // 32], [1, 32], [4, 1], [1, 0]))
        lanes = min(out_width // 4, 32)
        set_("unit_cost", tile.unit_cost)
        set_("merge_parts", tile.merge_parts)
        set_("merge_rows", 4 * (32 // lanes))
        set_("merged", gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, 4, 1], [2, 1, 0]))


def _wide_layout(columns: int, most: int = 256) -> Any:
    """wgmma's output with packed rows as its 64 rows."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(columns, most), 16]
    )


def _bits(start: int, stop: int) -> list[int]:
    return [1 << n for n in range(start.bit_length() - 1, stop.bit_length() - 1)]


def _by_warp_layout(columns: int) -> Any:
    """One number per warp and column: every thread holds all four of its columns of wgmma's output."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]] + [[0, n] for n in _bits(8, columns)] + [[1, 0], [2, 0]],
        lane_bases=[[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[4, columns],
    )


def _k_pair_layout(keys: int, pairs: int) -> Any:
    """Pairs of float8 columns as wgmma's first operand takes keys, after widening: a thread's two
    neighbouring pairs of a key are four columns of 16, which queries have in the same order."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]]
        + [[0, n] for n in _bits(8, pairs)]
        + [[n, 0] for n in _bits(64, keys)],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[keys, pairs],
    )


def _v_pair_layout(keys: int, pairs: int) -> Any:
    """Pairs of float8 columns as wgmma's first operand takes transposed values, after widening: the two
    columns of a pair are eight rows of the operand apart."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0]]
        + [[n, 0] for n in _bits(16, keys)]
        + [[0, n] for n in _bits(32, pairs)],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16]],
        block_bases=[],
        shape=[keys, pairs],
    )


def _fours_layout(keys: int, fours: int) -> Any:
    """Four float8 columns in a number, four numbers at once, of 128-byte rows and, widened, for such rows.
    Rows 5 apart share a quarter of a warp: swizzled, they have no bank in common in either."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]]
        + [[0, n] for n in _bits(16, fours)]
        + [[n, 0] for n in _bits(32, keys)],
        lane_bases=[[0, 4], [0, 8], [5, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[keys, fours],
    )


def _rows_layout(width: int, itemsize: int) -> Any:
    """16 bytes per thread along rows of ``width`` elements, four warps."""
    vector = 16 // itemsize
    lanes = min(width // vector, 32)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])


def consumers_of(rows: int) -> tuple[int, int]:
    """Consumers that share this many packed rows, and the rows of each: a power of two, at least 8."""
    if rows > CONSUMER_ROWS:
        return 2, CONSUMER_ROWS
    return 1, max(8, next_power_of_2(rows))


def padded(head_dim: int) -> int:
    """Columns of a tile of keys that holds ``head_dim``: 64, 128, 192 or 256."""
    return next(width for width in (64, 128, 192, 256) if head_dim <= width)


def padded_v(head_dim_v: int) -> int:
    """Columns of a tile of values, a power of two because an accumulator has them: 64, 128, 256 or 512."""
    return next(width for width in (64, 128, 256, 512) if head_dim_v <= width)


@functools.lru_cache(maxsize=1024)
def tile_for(
    head_dim: int, head_dim_v: int, itemsize: int = 2, rows: int = 1, page_size: int = 0
) -> DecodeTile:
    """The tile of these head dims: the measured blocks, or 64 keys; and as many stages as there is room.

    Args:
        itemsize: bytes per element of keys and values.
        rows: packed query rows of a KV head.
        page_size: 0: keys are not paged.
    """
    width, v_width = padded(head_dim), padded_v(head_dim_v)
    kind = width, v_width, itemsize
    shape = DECODE_TILES.get(kind, (64, 1))
    short = page_size % LONG_BOX != 0
    if short:
        shape = SHORT_BOX_TILES.get(kind, shape)
    if rows > FEW_ROWS:
        shape = MANY_ROWS_TILES.get(kind, shape)
    if rows > CONSUMER_ROWS:
        shape = TWO_CONSUMERS_TILES.get(kind, (64, 1))
    block_n, workers = shape
    if v_width == 512 and itemsize == 2 and rows > PAIRED_ROWS and page_size % 8 == 0:
        return DecodeTile(block_n=128, stages=2, per_multiprocessor=1, merge_parts=4, paired=True)
    return DecodeTile(
        block_n=block_n,
        stages=_stages(block_n, width, v_width, itemsize, rows, workers),
        per_multiprocessor=workers,
        k_width=64 if width == 192 else 0,
        merge_parts=min(2048 // v_width, 16),
        gather=short and kind in ROWS_FASTER,
        whole_keys=WHOLE_KEYS if itemsize == 2 and workers == 2 else 0,
    )


def parts_to_combine(head_dim_v: int) -> int:
    """Parts per unit, on average, that a kernel of its own merges sooner than the last worker does."""
    return 2 if padded_v(head_dim_v) == 512 else 64


def _stages(block_n: int, width: int, v_width: int, itemsize: int, rows: int, workers: int) -> int:
    """Stages of keys and values that a worker has room for beside queries and probabilities."""
    consumers, columns = consumers_of(rows)
    if v_width == 512 and rows > WIDE_ROWS:
        consumers, columns = 1, TILE_ROWS
        itemsize = 2  # narrower ones are widened on their way
    q_width = width + (v_width if v_width == 512 else 0)
    room = SHARED_BYTES // workers - 1024 - OTHER_SHARED_BYTES
    if v_width == 512 and itemsize == 1:  # two sets of queries, and where one hands its output over
        consumers = 2
        room -= columns * v_width * 4
    room -= consumers * columns * (q_width + block_n) * 2
    return min(room // (block_n * (width + v_width) * itemsize), 8)


def box_rows(page_size: int, block_n: int) -> int:
    """Keys per TMA box: a power of two that divides both the page and the block."""
    return block_n if page_size == 0 else min(page_size & -page_size, block_n)
