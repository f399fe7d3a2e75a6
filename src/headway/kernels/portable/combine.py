"""Merge of partial attentions over disjoint keys; parts that saw no key (lse -inf, +inf, NaN) vanish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.kernels._triton import cdiv, gdc_wait, jit, next_power_of_2, tl, triton
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
    cols,
    sink,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(out at ``cols``, lse) of one row from ``count`` parts, BLOCK_S at a time. ``sink`` may be None."""
    acc = tl.zeros([cols.shape[0]], dtype=tl.float32)
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
    num_splits,
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
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_C columns of one row of a split sequence; those in one piece the attention kernel finished."""
    b = tl.program_id(1)
    part_first = tl.load(split_start + b)
    count = tl.load(num_splits + b)
    if DEPENDENT:  # the plan was there before the attention kernel began
        gdc_wait()
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
    cols = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    out, lse = merge_parts(
        part_out + at * DV,
        part_lse + at,
        count,
        stride_part * DV,
        stride_part,
        cols,
        sink,
        DV,
        BLOCK_S,
    )
    row = (q_first + q_idx).to(tl.int64)
    batch = b.to(tl.int64)
    tl.store(
        out_ptr + batch * stride_out_batch + row * stride_out_row + head * stride_out_head + cols,
        cast(out, out_ptr.dtype.element_ty),
        mask=cols < DV,
    )
    if lse_ptr is not None:
        lse_at = batch * stride_lse_batch + head.to(tl.int64) * stride_lse_head + row
        tl.store(lse_ptr + lse_at, lse, mask=tl.program_id(2) == 0)


@triton.jit(do_not_specialize=["count"])
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
    cols = tl.arange(0, BLOCK_DV)
    out, lse = merge_parts(
        part_out + row * DV,
        part_lse + row,
        count,
        stride_out_part,
        stride_lse_part,
        cols,
        None,
        DV,
        BLOCK_S,
    )
    tl.store(out_ptr + row * DV + cols, cast(out, out_ptr.dtype.element_ty), mask=cols < DV)
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def states_kernel(
    outs,
    lses,
    out_ptr,
    lse_ptr,
    rows,
    seqlen,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows (token, head) of COUNT results (rows, DV) whose LSEs put heads before tokens."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    token = row // HEADS
    lse_at = (token // seqlen * HEADS + row % HEADS) * seqlen + token % seqlen
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for i in tl.static_range(COUNT):
        top = tl.maximum(top, part_lse_of(lses[i] + lse_at, inside))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    cols = tl.arange(0, BLOCK_DV)
    at = row[:, None] * DV + cols[None, :]
    for i in tl.static_range(COUNT):
        weight = tl.exp2(part_lse_of(lses[i] + lse_at, inside) - shift)
        mask = (weight > 0.0)[:, None] & (cols < DV)[None, :]
        part = tl.load(outs[i] + at, mask=mask, other=0.0).to(tl.float32)
        acc += part * weight[:, None]
        total += weight
    empty = total == 0.0
    out = acc * tl.where(empty, 0.0, 1.0 / total)[:, None]
    mask = inside[:, None] & (cols < DV)[None, :]
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + lse_at, lse, mask=inside)


@jit
def part_lse_of(ptr, inside):
    """LSEs in base 2; -inf where a part saw no key."""
    lse = tl.load(ptr, mask=inside, other=float("-inf"))
    saw = (lse == lse) & (tl.abs(lse) < float("inf"))
    return tl.where(saw, lse * LOG2E, float("-inf"))


def block_splits(dv: int) -> int:
    """Parts merged at once: as many as keep a program's registers few."""
    return max(2, 2048 // max(16, next_power_of_2(dv)))


@dataclass(frozen=True)
class Share:
    """What a program of the merge takes: columns of a row, and how many parts at once."""

    columns: int
    parts: int
    num_warps: int


#: Rows of all sequences up to which they are few: of one sequence or some, in many parts each.
FEW_ROWS = 256


def share_of(rows: int, dv: int) -> Share:
    """Few rows are cut in narrow programs that read all their parts at once; of many, each has a warp to
    itself, and few parts."""
    width = max(16, next_power_of_2(dv))
    if rows <= FEW_ROWS:
        return Share(min(width, 32), 64, 4)
    columns = min(width, 256)
    return Share(columns, 1024 // columns, 1)


def combine_splits(
    arguments: dict[str, Any],
    schedule: Schedule,
    part_out: Tensor,
    part_lse: Tensor,
    rows: int,
    dependent: dict[str, bool],
) -> None:
    """Finish the sequences of a decode step that were cut into several pieces.

    Args:
        arguments: of the attention kernel that left the parts.
        part_out: float32 (work items, KV heads, packed rows, Dv); part_lse: without the last.
        rows: KV heads times packed rows.
        dependent: :func:`.operands.dependent_launch`; the attention kernel was told the same.
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
    )
    dv = arguments["DV"]
    share = share_of(rows * schedule.batch_size, dv)
    combine_kernel[(rows, schedule.batch_size, cdiv(dv, share.columns))](
        part_out=part_out,
        part_lse=part_lse,
        num_splits=schedule.num_splits,
        split_start=schedule.split_start,
        BLOCK_C=share.columns,
        BLOCK_S=share.parts,
        num_warps=share.num_warps,
        **{name: arguments[name] for name in names},
        **dependent,
    )


def combine(
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


#: Results that one kernel merges from where they lie; more are stacked first.
MOST_STATES = 8


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`headway.reference.merge_states` on a device.

    Args:
        outs: each (B, Sq, Hq, Dv) or (total_q, Hq, Dv). lses: each (B, Hq, Sq) or (Hq, total_q), float32.
    """
    shapes, lse_shapes = {x.shape for x in outs}, {x.shape for x in lses}
    *batch, seqlen, heads, dv = outs[0].shape
    if len(shapes) > 1 or lse_shapes != {torch.Size((*batch, heads, seqlen))}:
        given = f"of shapes {sorted(map(tuple, lse_shapes))} with outs {sorted(map(tuple, shapes))}"
        raise InvalidInputError("lses", given, f"{(*batch, heads, seqlen)} each, and outs alike")
    if len(outs) > MOST_STATES:
        parts = torch.stack([x.transpose(-1, -2) for x in lses])
        out, lse = combine(torch.stack(list(outs)), parts, outs[0].dtype)
        return out, lse.transpose(-1, -2).contiguous()
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(lses[0].shape, dtype=torch.float32, device=outs[0].device)
    rows, block_dv = lse.numel(), max(16, next_power_of_2(dv))
    block_r = max(1, 2048 // block_dv)
    if rows:
        states_kernel[(cdiv(rows, block_r),)](
            tuple(x.contiguous() for x in outs),
            tuple(x.contiguous() for x in lses),
            out,
            lse,
            rows,
            seqlen,
            HEADS=heads,
            COUNT=len(outs),
            DV=dv,
            BLOCK_DV=block_dv,
            BLOCK_R=block_r,
            num_warps=4,
        )
    return out, lse
