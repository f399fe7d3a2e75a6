"""The order in which ragged tiles are worked on: longest first, made on the device without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, tl
from headway.kernels.hopper.direct import launch

#: int32 entries in front of the tiles: next tile, finished CTAs (both 0 between launches), number of tiles
HEADER = 3
_TILES_PER_PROGRAM = 16
_SEQUENCES_AT_ONCE = 128


@jit
def _load_lengths(
    batch, batch_size, cu_seqlens_q, seqused_q, cu_seqlens_k, seqused_k, rows_q, rows_k
):
    """(rows, keys) of the sequences ``batch``; 0 beyond the last."""
    inside = batch < batch_size
    rows = tl.where(inside, rows_q, 0)
    keys = tl.where(inside, rows_k, 0)
    if cu_seqlens_q is not None:
        begin = tl.load(cu_seqlens_q + batch, mask=inside, other=0)
        rows = tl.load(cu_seqlens_q + batch + 1, mask=inside, other=0) - begin
    if seqused_q is not None:
        rows = tl.load(seqused_q + batch, mask=inside, other=0)
    if cu_seqlens_k is not None:
        begin = tl.load(cu_seqlens_k + batch, mask=inside, other=0)
        keys = tl.load(cu_seqlens_k + batch + 1, mask=inside, other=0) - begin
    if seqused_k is not None:
        keys = tl.load(seqused_k + batch, mask=inside, other=0)
    return rows, keys


@jit
def _tiles_at_least(cost, first_cost, tiles, step, limit):
    """How many of a sequence's tiles cost at least ``cost``. Tile m costs first_cost + m * step, clamped
    to [0, limit]."""
    below = (cost - first_cost + step - 1) // step  # tiles that the unclamped line puts below cost
    below = tl.where(cost - first_cost <= 0, 0, below)
    count = tiles - tl.minimum(below, tiles)
    count = tl.where(cost > limit, 0, count)
    return tl.where(cost <= 0, tiles, count)


@jit(do_not_specialize=["batch_size", "rows_q", "rows_k", "step", "pack", "window"])
def order_tiles_kernel(
    schedule,
    cu_seqlens_q,
    seqused_q,
    cu_seqlens_k,
    seqused_k,
    batch_size,
    rows_q,
    rows_k,
    step,  # tokens by which a tile's last visible key moves per tile; 0: all tiles of a sequence alike
    pack,
    window,  # tokens seen at most; 2^30 where nothing limits them
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    BATCHES: tl.constexpr,
    HEADER: tl.constexpr,
    num_warps: tl.constexpr = 4,
):
    """Each tile finds its own place: the number of tiles that cost more, or the same and come earlier."""
    mine = tl.program_id(0)
    rows, keys = _load_lengths(
        mine, batch_size, cu_seqlens_q, seqused_q, cu_seqlens_k, seqused_k, rows_q, rows_k
    )
    my_tiles = tl.cdiv(rows * pack, BLOCK_M)
    m = tl.program_id(1) * TILES + tl.arange(0, TILES)
    slope = tl.maximum(step, 1)
    my_limit = tl.minimum(keys, window)
    my_first = tl.where(step > 0, keys - rows + step, my_limit)
    cost = tl.minimum(tl.maximum(my_first + m * step, 0), my_limit)
    place = tl.zeros([TILES], tl.int32)
    total = 0
    for start in range(0, batch_size, BATCHES):
        other = start + tl.arange(0, BATCHES)
        their_rows, their_keys = _load_lengths(
            other, batch_size, cu_seqlens_q, seqused_q, cu_seqlens_k, seqused_k, rows_q, rows_k
        )
        tiles = tl.cdiv(their_rows * pack, BLOCK_M)
        limit = tl.minimum(their_keys, window)
        first = tl.where(step > 0, their_keys - their_rows + step, limit)
        total += tl.sum(tiles)
        # Among tiles of equal cost, earlier sequences go first: they count from the same cost on.
        threshold = tl.where(other[None, :] < mine, cost[:, None], cost[:, None] + 1)
        ahead = _tiles_at_least(threshold, first[None, :], tiles[None, :], slope, limit[None, :])
        flat = tl.where(threshold <= limit[None, :], tiles[None, :], 0)
        ahead = tl.where(step > 0, ahead, flat)
        place += tl.sum(ahead, 1)
    # Within a sequence cost grows with m; equal ones, at the clamps, keep the order of m.
    equal_from = my_tiles - tl.where(
        step > 0,
        _tiles_at_least(cost, my_first, my_tiles, slope, my_limit),
        my_tiles,
    )
    place += tl.maximum(m - equal_from, 0)
    inside = m < my_tiles
    tl.store(schedule + HEADER + 2 * place, tl.zeros([TILES], tl.int32) + mine, mask=inside)
    tl.store(schedule + HEADER + 2 * place + 1, m, mask=inside)
    if (mine == 0) & (tl.program_id(1) == 0):
        tl.store(schedule, 0)
        tl.store(schedule + 1, 0)
        tl.store(schedule + 2, total)


def max_tiles(batch_size: int, total_rows: int, block_m: int) -> int:
    """Upper bound of the number of tiles that ``total_rows`` rows in ``batch_size`` sequences make."""
    return total_rows // block_m + batch_size


def order_tiles(
    *,
    batch_size: int,
    total_rows: int,
    block_m: int,
    pack: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor | None,
    seqused_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    causal: bool,
    window_tokens: int | None,
    device: torch.device,
) -> Tensor:
    """A schedule for one forward call over ragged rows: int32 (HEADER + 2 * tiles,) on ``device``.

    ``total_rows`` counts rows as packed; lengths are read on the device. The result may be used by every
    call of a step that has the same lengths, mask and tile height, one call at a time.
    """
    tiles = max_tiles(batch_size, total_rows, block_m)
    schedule = torch.empty(HEADER + 2 * tiles, dtype=torch.int32, device=device)
    per_sequence = cdiv(max_seqlen_q * pack, block_m)
    grid = (batch_size, max(cdiv(per_sequence, _TILES_PER_PROGRAM), 1), 1)
    lengths = (cu_seqlens_q, seqused_q, cu_seqlens_k, seqused_k)
    numbers = (
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        block_m // pack if causal else 0,
        pack,
        2**30 if window_tokens is None else window_tokens,
    )
    blocks = (block_m, _TILES_PER_PROGRAM, _SEQUENCES_AT_ONCE, HEADER)
    kinds = (None if t is None else t.data_ptr() % 16 == 0 for t in (schedule, *lengths))
    key = (order_tiles_kernel, *blocks, *kinds, device)
    launch(order_tiles_kernel, grid, key, (schedule, *lengths, *numbers, *blocks, 4))
    return schedule
