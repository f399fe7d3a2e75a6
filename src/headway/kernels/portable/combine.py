"""Merge of partial attentions over disjoint keys; parts that saw no key (lse -inf, +inf, NaN) vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels._triton import jit, next_power_of_2, tl
from headway.kernels.portable.numeric import LN2, LOG2E, cast
from headway.kernels.portable.spans import query_span
from headway.plan import Schedule


@jit
def merge_parts(
    part_out,
    part_lse,
    count,
    stride_out_part,
    stride_lse_part,
    sink,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(out (BLOCK_DV,), lse) of one row from ``count`` parts, BLOCK_S at a time. ``sink`` may be None."""
    cols = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    top = tl.full([], float("-inf"), dtype=tl.float32)
    if sink is not None:
        top = sink * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in tl.range(0, count, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        lse = tl.load(part_lse + s * stride_lse_part, mask=s < count, other=float("-inf"))
        saw = (lse == lse) & (tl.abs(lse) < float("inf"))
        lse = tl.where(saw, lse * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(lse - shift)
        parts = tl.load(
            part_out + s[:, None] * stride_out_part + cols[None, :],
            mask=saw[:, None] & (cols < DV)[None, :],
            other=0.0,
        ).to(tl.float32)
        alpha = tl.exp2(top - shift)
        acc = acc * alpha + tl.sum(parts * weights[:, None], 0)
        total = total * alpha + tl.sum(weights, 0)
        top = new_top
    empty = total == 0.0
    out = acc * tl.where(empty, 0.0, 1.0 / total)
    return out, tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)


@jit
def combine_kernel(
    part_out,
    part_lse,
    out_ptr,
    lse_ptr,
    sinks,
    split_start,
    cu_seqlens_q,
    seqused_q,
    rows_q,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    PACK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of a split sequence; sequences in one piece were finished by the attention kernel."""
    b = tl.program_id(1)
    part_first = tl.load(split_start + b)
    count = tl.load(split_start + b + 1) - part_first
    if count == 1:
        return
    num_rows = rows_q * PACK
    kv_head = tl.program_id(0) // num_rows
    packed = tl.program_id(0) % num_rows
    head = kv_head * PACK + packed % PACK
    q_first, seqlen_q = query_span(b, cu_seqlens_q, seqused_q, rows_q)
    q_idx = packed // PACK
    if q_idx >= seqlen_q:
        return
    stride_part = tl.num_programs(0).to(tl.int64)
    at = part_first * stride_part + tl.program_id(0)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
    out, lse = merge_parts(
        part_out + at * DV,
        part_lse + at,
        count,
        stride_part * DV,
        stride_part,
        sink,
        DV,
        BLOCK_DV,
        BLOCK_S,
    )
    row = (q_first + q_idx).to(tl.int64)
    batch = b.to(tl.int64)
    cols = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + batch * stride_out_batch + row * stride_out_row + head * stride_out_head + cols,
        cast(out, out_ptr.dtype.element_ty),
        mask=cols < DV,
    )
    if lse_ptr is not None:
        lse_at = batch * stride_lse_batch + head.to(tl.int64) * stride_lse_head + row
        tl.store(lse_ptr + lse_at, lse)


@jit
def merge_kernel(
    part_out,
    part_lse,
    out_ptr,
    lse_ptr,
    count,
    stride_out_part,
    stride_lse_part,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of (count, rows, DV) parts that the caller made."""
    row = tl.program_id(0).to(tl.int64)
    out, lse = merge_parts(
        part_out + row * DV,
        part_lse + row,
        count,
        stride_out_part,
        stride_lse_part,
        None,
        DV,
        BLOCK_DV,
        BLOCK_S,
    )
    cols = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row * DV + cols, cast(out, out_ptr.dtype.element_ty), mask=cols < DV)
    tl.store(lse_ptr + row, lse)


def block_splits(dv: int) -> int:
    """Parts merged at once: as many as keep a program's registers few."""
    return max(2, 2048 // max(16, next_power_of_2(dv)))


def combine(
    arguments: dict[str, Any], schedule: Schedule, part_out: Tensor, part_lse: Tensor, rows: int
) -> None:
    """Finish the sequences of a decode step that were cut into several pieces.

    Args:
        arguments: of the attention kernel that left the parts.
        part_out: float32 (work items, KV heads, packed rows, Dv); part_lse: without the last.
        rows: KV heads times packed rows.
    """
    names = (
        "out_ptr",
        "lse_ptr",
        "sinks",
        "cu_seqlens_q",
        "seqused_q",
        "rows_q",
        "stride_out_batch",
        "stride_out_row",
        "stride_out_head",
        "stride_lse_batch",
        "stride_lse_head",
        "PACK",
        "DV",
        "BLOCK_DV",
    )
    combine_kernel[(rows, schedule.batch_size)](
        part_out=part_out,
        part_lse=part_lse,
        split_start=schedule.split_start,
        BLOCK_S=block_splits(arguments["DV"]),
        num_warps=4,
        **{name: arguments[name] for name in names},
    )


def merge(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`headway.reference.combine` on a device: (n, ..., Dv) and (n, ...), contiguous.

    Returns:
        out (..., Dv) of ``out_dtype`` and lse (...), float32.
    """
    count, dv = out_partial.shape[0], out_partial.shape[-1]
    parts, lses = out_partial.contiguous(), lse_partial.contiguous()
    out = torch.empty(parts.shape[1:], dtype=out_dtype, device=parts.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=parts.device)
    rows = lse.numel()
    if rows:
        merge_kernel[(rows,)](
            parts,
            lses,
            out,
            lse,
            count,
            rows * dv,
            rows,
            DV=dv,
            BLOCK_DV=max(16, next_power_of_2(dv)),
            BLOCK_S=block_splits(dv),
            num_warps=4,
        )
    return out, lse
