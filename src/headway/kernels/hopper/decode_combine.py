"""Merging the parts of units that were cut, by a kernel of its own behind the decode kernel.

Programs share rows and their columns, so that many parts of few rows are read by many.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from headway.kernels._triton import gdc_launch_dependents, gdc_wait, gl, gluon
from headway.kernels.hopper.decode_consumer import (
    TILE_ROWS,
    Call,
)
from headway.kernels.hopper.decode_merge import merge_parts
from headway.kernels.hopper.decode_plan import WIDTH, cost_of, load_span
from headway.kernels.hopper.decode_rows import load_sinks, row_descales, store_lse, store_out

#: Columns of a program, at most.
COLUMNS = 128


@dataclass(frozen=True)
class CombineConfig:
    """Everything a compiled combining kernel depends on; fields below the line follow."""

    head_dim_v: int
    group: int
    m_tiles: int
    rows: int  # packed rows of a tile that parts have room for
    unit_cost: int
    merge_parts: int  # that a program reads at once
    merge_rows: int = 1  # of each
    abreast: int = 1  # KV heads that are read as one
    # ------------------------------------------------------------------------------------------------
    out_width: int = field(init=False)
    pieces: int = field(init=False)
    merged: Any = field(init=False)

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        width = 64 if self.head_dim_v <= 64 else COLUMNS
        lanes = width // 4
        set_("out_width", width)
        set_("pieces", -(-self.head_dim_v // width))
        # Warps share many rows, or else parts.
        warps = [1, 4, 1] if self.merge_rows >= 4 else [4, 1, 1]
        set_("merged", gl.BlockedLayout([1, 1, 4], [32 // lanes, 1, lanes], warps, [2, 1, 0]))


_UNSPECIALISED = [
    "units",
    "num_rows",
    "stride_out_batch",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_batch",
    "stride_lse_head",
    "stride_v_descale_batch",
    "stride_v_descale_head",
]


@gluon.jit(do_not_specialize=_UNSPECIALISED)
def combine_kernel(
    out_ptr,
    lse_ptr,
    sinks,
    v_descale,
    spans,
    share_ptr,
    starts,
    parts,
    part_sums,
    units,
    num_rows,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Program (x, y): rows from x // pieces · merge_rows on, of unit and tile y, columns of piece
    x % pieces."""
    gdc_launch_dependents()
    gdc_wait()
    first_column = gl.program_id(0) % cfg.pieces * cfg.out_width
    tile = gl.program_id(1) % cfg.m_tiles
    batch = gl.program_id(1) // cfg.m_tiles // units
    unit = gl.program_id(1) // cfg.m_tiles % units
    span = load_span(spans + batch * WIDTH)
    share = gl.load(share_ptr)
    cost = cost_of(span.blocks, cfg)
    blocks_line = gl.load(starts + batch) + unit * (span.blocks + cost) + cost
    first_worker = blocks_line // share
    parts_of_unit = (blocks_line + span.blocks - 1) // share - first_worker + 1
    tile_row = tile * TILE_ROWS
    zero = num_rows * 0
    call = Call(
        units,
        num_rows,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        zero.to(gl.float32),
        zero.to(gl.float32),
        zero,
        zero,
        zero,
    )
    by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, cfg.merged))
    out_layout: gl.constexpr = gl.SliceLayout(0, cfg.merged)
    end = gl.where(parts_of_unit > 1, gl.minimum(num_rows - tile_row, TILE_ROWS), 0)
    begin = gl.program_id(0) // cfg.pieces * cfg.merge_rows
    for row in range(begin, end, gl.num_programs(0) // cfg.pieces * cfg.merge_rows):
        rows = tile_row + row + gl.arange(0, cfg.merge_rows, layout=by_row)
        first_slot = (2 * first_worker + 1) * cfg.m_tiles + tile
        out, lse = merge_parts(
            parts,
            part_sums,
            first_slot,
            first_slot + cfg.m_tiles,
            2 * cfg.m_tiles,
            parts_of_unit,
            row,
            first_column,
            load_sinks(sinks, unit, rows, call, cfg),
            cfg,
        )
        columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, out_layout))
        out_rows = gl.arange(0, cfg.merge_rows, layout=gl.SliceLayout(1, out_layout))
        out_rows += tile_row + row
        columns += first_column
        descale = v_descale, stride_v_descale_batch, stride_v_descale_head
        v_scale = row_descales(descale, batch, unit, out_rows, cfg)
        if cfg.abreast > 1:
            v_scale = gl.expand_dims(v_scale, 1)
        store_out(out_ptr, out * v_scale, out_rows, columns, span, batch, unit, call, cfg)
        if first_column == 0:
            store_lse(lse_ptr, lse, rows, span, batch, unit, call, cfg)
