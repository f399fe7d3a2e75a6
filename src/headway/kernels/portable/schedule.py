"""Device-side planner: splits per sequence and the work list of a decode step, from lengths alone.

The rule is FlashAttention 3's dynamic split (:func:`headway.plan.plan_splits`): a processor's share is
the number of key blocks over all tiles, with 10% slack, divided by the processors; a sequence is cut
into as many pieces as it has shares. The work list has one entry per (sequence, piece), so that a
launch needs ``batch_size + slots`` programs and not ``batch_size * max_splits``. Where these are more than
run at once, those that begin last had better be short: pieces are listed by length, in eighths of a share.
Nothing is copied to the host.
"""

from __future__ import annotations

from typing import Any

import torch

from headway.kernels._triton import cdiv, next_power_of_2, tl, triton
from headway.kernels.portable.spans import key_span, query_span
from headway.plan import Schedule

#: Classes of length by which pieces are listed.
LENGTH_CLASSES = 8

#: One kernel for all sizes of batches: planning is too short to gain from knowing them.
_UNSPECIALISED = [
    "rows_q",
    "num_new",
    "capacity",
    "batch_size",
    "num_work",
    "tiles",
    "slots",
    "max_splits",
    "widest",
]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def schedule_kernel(
    num_splits_ptr,
    split_start_ptr,
    work_ptr,
    cu_seqlens_q,
    seqused_q,
    rows_q,
    cu_seqlens_k,
    seqlens_k,
    num_new,
    cu_seqlens_new,
    leftpad_k,
    cache_batch_idx,
    capacity,
    batch_size,
    num_work,
    tiles,
    slots,
    max_splits,
    widest,
    block_k,
    HAS_WIDEST: tl.constexpr,
    LENGTH_CLASSES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Each program plans the whole batch and writes its own BLOCK_W entries of the work list."""
    b = tl.arange(0, BLOCK_B)
    valid = b < batch_size
    safe = tl.where(valid, b, 0)
    _, seqlen_q = query_span(safe, cu_seqlens_q, seqused_q, rows_q)
    _, _, seqlen_k = key_span(
        safe, seqlens_k, num_new, cu_seqlens_new, cu_seqlens_k, leftpad_k, None, capacity
    )
    seqlen_k = tl.where(valid & (seqlen_q > 0), seqlen_k, 0)
    if HAS_WIDEST:
        seqlen_k = tl.minimum(seqlen_k, widest + seqlen_q)
    blocks = (seqlen_k + block_k - 1) // block_k
    total = tl.sum(blocks.to(tl.int64), 0)
    share = tl.maximum((total * tiles * 11 + slots * 10 - 1) // (slots * 10), 1)
    splits = ((blocks + share - 1) // share).to(tl.int32)
    splits = tl.minimum(tl.maximum(splits, 1), max_splits)
    splits = tl.where(valid, splits, 0)
    piece = (blocks + splits - 1) // tl.maximum(splits, 1)
    shorter = tl.maximum(share - piece, 0) * LENGTH_CLASSES // share
    starts = tl.zeros_like(splits)
    listed = 0
    for length in range(LENGTH_CLASSES + 1):
        mine = tl.where(shorter == length, splits, 0)
        starts = tl.where(shorter == length, listed + tl.cumsum(mine, 0) - mine, starts)
        listed += tl.sum(mine, 0)
    if tl.program_id(0) == 0:
        tl.store(num_splits_ptr + b, splits, mask=valid)
        tl.store(split_start_ptr + b, starts, mask=valid)
        tl.store(split_start_ptr + batch_size, listed)
    w = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    its_own = (starts[None, :] <= w) & (w < (starts + splits)[None, :])
    sequence = tl.sum(tl.where(its_own, b[None, :] + 1, 0), 1) - 1
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(work_ptr + w, sequence, mask=w < num_work)


def work_bound(batch_size: int, tiles: int, slots: int, max_splits: int) -> int:
    """The most work items the rule can make."""
    return min(batch_size + slots * 10 // (11 * tiles), batch_size * max_splits)


def empty_schedule(
    batch_size: int, tiles: int, slots: int, max_splits: int, device: torch.device
) -> Schedule:
    """Buffers for :func:`schedule`; one allocation, in which each begins at a multiple of 16 bytes."""
    num_work = work_bound(batch_size, tiles, slots, max_splits)
    starts_at = cdiv(batch_size, 4) * 4
    work_at = starts_at + cdiv(batch_size + 1, 4) * 4
    flat = torch.empty(work_at + num_work, dtype=torch.int32, device=device)
    starts = flat[starts_at : starts_at + batch_size + 1]
    return Schedule(flat[:batch_size], starts, flat[work_at:])


def schedule(
    into: Schedule,
    lengths: dict[str, Any],
    *,
    tiles: int,
    slots: int,
    max_splits: int,
    block_k: int,
    widest: int | None = None,
) -> None:
    """Plan a step.

    Args:
        lengths: arguments of :mod:`.spans`, as :func:`headway.kernels.portable.operands.lengths` gives.
        tiles: programs that work on one split of one sequence (KV heads times row tiles).
        slots: programs that run at once; max_splits: most pieces of a sequence; block_k: keys per block.
        widest: keys a query can see beyond its own, with a window or chunk; None: unbounded.
    """
    block_b = max(16, next_power_of_2(into.batch_size))
    block_w = max(1, min(128, 8192 // block_b))
    num_work = into.work.shape[0]
    schedule_kernel[(cdiv(num_work, block_w),)](
        into.num_splits,
        into.split_start,
        into.work,
        **lengths,
        batch_size=into.batch_size,
        num_work=num_work,
        tiles=tiles,
        slots=slots,
        max_splits=max_splits,
        widest=0 if widest is None else widest,
        block_k=block_k,
        HAS_WIDEST=widest is not None,
        LENGTH_CLASSES=LENGTH_CLASSES,
        BLOCK_B=block_b,
        BLOCK_W=block_w,
        num_warps=4 if block_b <= 1024 else 8,
    )
