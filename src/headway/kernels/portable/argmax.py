"""The largest entry of each row and where it is, for rows as wide as a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, tl

#: Columns per program of the first kernel.
BLOCK = 4096


@jit
def parts_kernel(x, values, places, stride_row, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(x + row * stride_row + cols, mask=cols < width, other=float("-inf"))
    found = found.to(tl.float32)
    # A row with NaN has no largest entry: infinity says so, as it is none that can be drawn either.
    found = tl.where(found != found, float("inf"), found)
    best, place = tl.max(found, axis=0, return_indices=True)
    tl.store(values + row * PARTS + part, best)
    tl.store(places + row * PARTS + part, part * BLOCK + place)


@jit
def rows_kernel(values, places, largest, at, PARTS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    parts = tl.arange(0, WIDE)
    found = tl.load(values + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
    best, part = tl.max(found, axis=0, return_indices=True)
    tl.store(largest + row, best)
    tl.store(at + row, tl.load(places + row * PARTS + part).to(tl.int64))


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entries of rows (rows, width), last stride 1, of any float dtype.

    Returns:
        values (rows,) float32, infinity where a row contains NaN, and their places (rows,) int64, the
        first where several are as large.
    """
    rows, width = x.shape
    parts = max(1, cdiv(width, BLOCK))
    wide = 1 << (parts - 1).bit_length()
    values = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=x.device)
    largest = torch.empty(rows, dtype=torch.float32, device=x.device)
    at = torch.empty(rows, dtype=torch.int64, device=x.device)
    if rows:
        parts_kernel[(rows, parts)](
            x, values, places, x.stride(0), width, PARTS=parts, BLOCK=BLOCK, num_warps=8
        )
        rows_kernel[(rows,)](values, places, largest, at, PARTS=parts, WIDE=wide, num_warps=1)
    return largest, at
