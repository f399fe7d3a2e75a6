"""Forward attention for prefill: all keys of a query tile in one pass. Dense, ragged or paged keys."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from headway.kernels._triton import cdiv
from headway.kernels.portable.attention import UNSPLIT, attention_kernel
from headway.kernels.portable.operands import (
    block_width,
    device_of,
    operands,
    segments_of,
)
from headway.kernels.portable.tiles import Tile, tile_for
from headway.problem import Problem

if TYPE_CHECKING:
    from headway.kernels.mods import ModArguments


def choose_tile(problem: Problem) -> Tile:
    """The tile of a prefill call, from the table."""
    s = segments_of(problem)
    width = block_width(s.d1) + (block_width(s.d2) if s.d2 else 0)
    dim = max(width, block_width(problem.head_dim_v))
    rows = problem.max_seqlen_q * (problem.num_q_heads // problem.num_kv_heads)
    arch = device_of(problem.device).arch
    tile = tile_for("forward", arch, dim, rows, problem.k.element_size())
    if problem.scores.score_mod is not None or problem.mask.mask_mod is not None:
        # What a mod holds per score needs registers that the largest tiles do not leave.
        return dataclasses.replace(tile, block_n=max(tile.block_n // 2, 16))
    return tile


def forward(
    problem: Problem,
    out: Tensor,
    lse: Tensor | None,
    tile: Tile | None = None,
    mods: ModArguments | None = None,
) -> None:
    """Fill ``out`` and ``lse``; appended keys and rotation are expected to be done already.

    Args:
        out: shaped as the problem says; lse: float32 (B, Hq, Sq) or (Hq, total_q), or None.
        tile: another tile than the table's.
    """
    tile = choose_tile(problem) if tile is None else tile
    group = problem.num_q_heads // problem.num_kv_heads
    # Packing pays where one head's queries leave most of a tile empty.
    pack = group if problem.max_seqlen_q * 2 <= tile.block_m else 1
    arguments = operands(problem, segments_of(problem), out, lse, tile, pack, mods)
    row_tiles = cdiv(arguments["rows_q"] * pack, tile.block_m)
    grid = (problem.num_q_heads // pack, row_tiles, problem.batch_size)
    if 0 in grid:
        return
    attention_kernel[grid](**arguments, **UNSPLIT)
