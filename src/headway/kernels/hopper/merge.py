"""Merge of the pieces that the forward kernel leaves where it cuts keys, many rows at a time."""

from __future__ import annotations

from torch import Tensor

from headway.kernels._triton import cdiv, gdc_wait, jit, next_power_of_2, tl
from headway.kernels.hopper.direct import launch
from headway.kernels.portable.numeric import LN2, LOG2E, cast
from headway.kernels.portable.spans import query_span

#: Values that a program merges at once: of how many pieces, times rows, times columns.
_BLOCK_PIECES, _BLOCK_VALUES = 16, 512
_NUMBERS = [
    "splits",
    "rows_q",
    "blocks",
    "stride_out_batch",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_batch",
    "stride_lse_head",
    "part_stride_split",
    "part_stride_batch",
    "part_stride_row",
    "lses_stride_split",
    "lses_stride_batch",
    "lses_stride_head",
]


@jit(do_not_specialize=_NUMBERS)
def merge_kernel(
    parts,
    lses,
    out,
    lse,
    sinks,
    cu_seqlens_q,
    seqused_q,
    splits,
    rows_q,
    blocks,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    part_stride_split,
    part_stride_batch,
    part_stride_row,
    lses_stride_split,
    lses_stride_batch,
    lses_stride_head,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    num_warps: tl.constexpr,
):
    """BLOCK_R rows of one head of one sequence, of which program_id(0) has ``blocks`` blocks."""
    gdc_wait()
    b = tl.program_id(0) // blocks
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_R
    q_first, seqlen_q = query_span(b, cu_seqlens_q, seqused_q, rows_q)
    if first >= seqlen_q:
        return
    index = first + tl.arange(0, BLOCK_R)
    inside = index < seqlen_q
    row = (q_first + index).to(tl.int64)
    batch = b.to(tl.int64)
    if cu_seqlens_q is not None:
        batch *= 0
    lse_at = lses + batch * lses_stride_batch + head * lses_stride_head + row
    cols = tl.arange(0, BLOCK_DV)
    part_at = parts + batch * part_stride_batch + row * part_stride_row + head * DV
    part_at = part_at[None, :, None] + cols[None, None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    if sinks is not None:
        top = tl.zeros([BLOCK_R], dtype=tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first_split in range(0, splits, BLOCK_S):
        s = (first_split + tl.arange(0, BLOCK_S)).to(tl.int64)
        there = (s < splits)[:, None] & inside[None, :]
        seen = tl.load(
            lse_at[None, :] + s[:, None] * lses_stride_split, mask=there, other=float("-inf")
        )
        # Rows that saw nothing in a piece were never written there.
        mask = (seen > float("-inf"))[:, :, None] & (cols < DV)[None, None, :]
        part = tl.load(part_at + s[:, None, None] * part_stride_split, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(seen, 0) * LOG2E)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(seen * LOG2E - shift[None, :])
        before = tl.exp2(top - shift)
        acc = acc * before[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * before + tl.sum(weight, 0)
        top = new_top
    shift = tl.where(top == float("-inf"), 0.0, top)
    scale = tl.where(total == 0.0, 0.0, 1.0 / total)
    out_at = out + batch * stride_out_batch + row * stride_out_row + head * stride_out_head
    mask = inside[:, None] & (cols < DV)[None, :]
    values = cast(acc * scale[:, None], out.dtype.element_ty)
    tl.store(out_at[:, None] + cols[None, :], values, mask=mask)
    if lse is not None:
        natural = tl.where(total == 0.0, float("-inf"), (shift + tl.log2(total)) * LN2)
        tl.store(
            lse + batch * stride_lse_batch + head * stride_lse_head + row, natural, mask=inside
        )


def merge(
    parts: Tensor,
    lses: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    seqused_q: Tensor | None,
    max_seqlen_q: int,
) -> None:
    """Merge pieces of attention over disjoint keys into ``out`` and ``lse``, as forward takes them.

    - parts: float32, contiguous, the shape of ``out`` behind (splits,); lses: float32 (splits, B, Hq, Sq)
      or (splits, Hq, total_q), -inf where a row saw nothing, and ``parts`` may hold anything.
    - sinks (Hq,) are counted here, once.

    Starts while the kernel before it ends, so that must be the one that makes the pieces.
    """
    splits, dv = parts.shape[0], parts.shape[-1]
    ragged = cu_seqlens_q is not None
    batch_size = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else out.shape[0]
    block_dv = max(16, next_power_of_2(dv))
    block_rows = max(_BLOCK_VALUES // block_dv, 1)
    blocks = cdiv(max_seqlen_q, block_rows)
    if batch_size * blocks == 0:
        return
    tensors = (parts, lses, out, lse, sinks, cu_seqlens_q, seqused_q)
    numbers = (
        splits,
        max_seqlen_q,
        blocks,
        0 if ragged else out.stride(0),
        out.stride(-3),
        out.stride(-2),
        0 if ragged or lse is None else lse.stride(0),
        0 if lse is None else lse.stride(-2),
        parts.stride(0),
        0 if ragged else parts.stride(1),
        parts.stride(-3),
        lses.stride(0),
        0 if ragged else lses.stride(1),
        lses.stride(-2),
    )
    block_pieces = min(max(2, next_power_of_2(splits)), _BLOCK_PIECES)
    blocked = (dv, block_dv, block_rows, block_pieces)
    kinds = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    key = (merge_kernel, *blocked, *kinds, *(n >= 2**31 for n in numbers), out.device)
    grid = (batch_size * blocks, out.shape[-2], 1)
    launch(merge_kernel, grid, key, (*tensors, *numbers, *blocked, 4), launch_pdl=True)
