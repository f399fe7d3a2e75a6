"""Decode attention: packed query heads against long caches, split over the device by a work list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.kernels._triton import cdiv
from headway.kernels.portable.attention import UNSPLIT, attention_kernel
from headway.kernels.portable.combine import combine_splits
from headway.kernels.portable.operands import (
    LENGTHS,
    Segments,
    block_width,
    dependent_launch,
    device_of,
    lengths,
    operands,
    segments_of,
)
from headway.kernels.portable.schedule import empty_schedule, schedule
from headway.kernels.portable.tiles import Op, Tile, tile_for
from headway.plan import MAX_SPLITS, PlanKey, Schedule
from headway.problem import Mask, Problem

if TYPE_CHECKING:
    from headway.kernels.mods import ModArguments

#: Keys below which a sequence is never cut: a piece must outweigh its part of the merge.
MIN_KEYS_PER_SPLIT = 256


@dataclass(frozen=True)
class Shape:
    """What the spread of a decode step depends on, lengths aside."""

    batch_size: int
    kv_heads: int
    rows: int  # packed query rows of one KV head
    longest: int  # bound of the keys of a sequence
    max_splits: int  # 0: automatic
    sm_margin: int = 0

    @staticmethod
    def of(problem: Problem) -> Shape:
        group = problem.num_q_heads // problem.num_kv_heads
        rows_q = problem.max_seqlen_q if problem.ragged_q else problem.q.shape[1]
        return Shape(
            problem.batch_size,
            problem.num_kv_heads,
            rows_q * group,
            problem.max_seqlen_k,
            problem.hints.num_splits,
            problem.hints.sm_margin,
        )

    @property
    def most_keys(self) -> int:
        """A bound of the keys of all sequences and KV heads together."""
        return self.batch_size * self.kv_heads * self.longest

    def spread(self, tile: Tile, device: torch.device) -> Spread:
        tiles = self.kv_heads * max(1, cdiv(self.rows, tile.block_m))
        processors = max(1, device_of(device).multiprocessors - self.sm_margin)
        bound = min(self.max_splits or MAX_SPLITS, MAX_SPLITS)
        bound = max(1, min(bound, cdiv(self.longest, MIN_KEYS_PER_SPLIT)))
        return Spread(tiles, processors * tile.programs, bound)


@dataclass(frozen=True)
class Spread:
    """Numbers the planner works with; see :func:`.schedule.schedule`."""

    tiles: int
    slots: int
    max_splits: int


def choose_tile(problem: Problem, op: Op = "decode", dim: int | None = None) -> Tile:
    """The tile of a decode call, from the table."""
    if dim is None:
        dim = block_width(max(problem.head_dim, problem.head_dim_v))
    arch, shape, itemsize = (
        device_of(problem.device).arch,
        Shape.of(problem),
        problem.k.element_size(),
    )
    widths = problem.head_dim + problem.head_dim_v
    return tile_for(op, arch, dim, shape.rows, itemsize, shape.most_keys * widths * itemsize)


def widest_view(mask: Mask | PlanKey) -> int | None:
    """How many keys a query can see besides those between a sequence's queries; None: all."""
    if mask.attention_chunk > 0:
        return mask.attention_chunk
    if mask.window_left is None or mask.window_right is None:
        return None
    return mask.window_left + mask.window_right


def is_decode(problem: Problem) -> bool:
    """Whether a call is run as decode: its packed rows fit few tiles, or would leave processors idle."""
    shape = Shape.of(problem)
    if shape.rows <= 64:
        return True
    if problem.hints.num_splits == 1 or problem.max_seqlen_k < 4 * MIN_KEYS_PER_SPLIT:
        return False
    programs = shape.batch_size * shape.kv_heads * cdiv(shape.rows, 128)
    return 2 * programs <= device_of(problem.device).multiprocessors


def plan(
    key: PlanKey,
    seqlens_k: Tensor,
    *,
    kv_dtype: torch.dtype = torch.bfloat16,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> Schedule:
    """A schedule for every layer of a step.

    Args:
        kv_dtype: of the caches; kernels for narrower ones run in more, smaller programs.
        seqlens_k: (B,) int32 keys of each sequence that its queries can see.
        num_splits: bound of the pieces of a sequence; 0: automatic.
    """
    group = key.num_q_heads // key.num_kv_heads
    shape = Shape(
        key.batch_size,
        key.num_kv_heads,
        key.max_seqlen_q * group,
        key.max_seqlen_k,
        num_splits,
        sm_margin,
    )
    dim = block_width(max(key.head_dim, key.head_dim_v))
    op: Op = "mla" if key.head_dim_v > 256 else "decode"
    itemsize = kv_dtype.itemsize
    cache_bytes = shape.most_keys * (key.head_dim + key.head_dim_v) * itemsize
    tile = tile_for(op, device_of(key.device).arch, dim, shape.rows, itemsize, cache_bytes)
    spread = shape.spread(tile, key.device)
    into = empty_schedule(key.batch_size, spread.tiles, spread.slots, spread.max_splits, key.device)
    places = dict.fromkeys(LENGTHS) | {
        "seqlens_k": seqlens_k,
        "rows_q": key.max_seqlen_q,
        "num_new": 0,
        "capacity": 0,
    }
    schedule(
        into,
        places,
        tiles=spread.tiles,
        slots=spread.slots,
        max_splits=spread.max_splits,
        block_k=tile.block_n,
        widest=widest_view(key),
    )
    return into


def planned(problem: Problem, spread: Spread, tile: Tile) -> Schedule:
    """A schedule for this call alone."""
    into = empty_schedule(
        problem.batch_size, spread.tiles, spread.slots, spread.max_splits, problem.device
    )
    schedule(
        into,
        lengths(problem),
        tiles=spread.tiles,
        slots=spread.slots,
        max_splits=spread.max_splits,
        block_k=tile.block_n,
        widest=widest_view(problem.mask),
    )
    return into


def decode(
    problem: Problem,
    out: Tensor,
    lse: Tensor | None,
    plan: Schedule | None = None,
    segments: Segments | None = None,
    tile: Tile | None = None,
    mods: ModArguments | None = None,
) -> None:
    """Fill ``out`` and ``lse``; appended keys and rotation are expected to be done already.

    Args:
        plan: a schedule for this step's batch; without one the call makes its own where it may split.
        segments: operands of the two products, when they are not simply q, k and v.
    """
    tile = choose_tile(problem) if tile is None else tile
    group = problem.num_q_heads // problem.num_kv_heads
    segments = segments_of(problem) if segments is None else segments
    arguments = operands(problem, segments, out, lse, tile, group, mods)
    shape = Shape.of(problem)
    row_tiles = cdiv(shape.rows, tile.block_m)
    if 0 in (row_tiles, problem.num_kv_heads, problem.batch_size):
        return
    if plan is None:
        spread = shape.spread(tile, problem.device)
        if spread.max_splits > 1:
            plan = planned(problem, spread, tile)
    if plan is None:
        attention_kernel[(problem.num_kv_heads, row_tiles, problem.batch_size)](
            **arguments, **UNSPLIT
        )
        return
    num_work = plan.work.shape[0]
    shape_lse = (num_work, problem.num_kv_heads, shape.rows)
    part_lse = torch.empty(shape_lse, dtype=torch.float32, device=problem.device)
    part_out = part_lse.new_empty((*shape_lse, problem.head_dim_v))
    dependent = dependent_launch(problem.device)
    attention_kernel[(problem.num_kv_heads, row_tiles, num_work)](
        **arguments,
        work=plan.work,
        num_splits=plan.num_splits,
        split_start=plan.split_start,
        part_out=part_out,
        part_lse=part_lse,
        DEPENDENT=dependent["DEPENDENT"],
    )
    rows = problem.num_kv_heads * shape.rows
    combine_splits(arguments, plan, part_out, part_lse, rows, dependent)
