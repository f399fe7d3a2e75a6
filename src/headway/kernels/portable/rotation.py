"""Rotary embedding within kernels: which columns turn together, and their turn."""

from __future__ import annotations

from headway.kernels._triton import jit, tl


@jit
def turning_columns(HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each column: (the one it turns with, its angle, whether it is the first of the two)."""
    cols = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        return cols ^ 1, cols // 2, cols % 2 == 0
    else:
        return tl.where(cols < HALF, cols + HALF, cols - HALF), cols % HALF, cols < HALF


@jit
def turned(x, other, at, angle, first, turns, cos, sin, stride_cos, stride_sin):
    """Rows ``x`` with the columns they turn with, ``other``, (rows, columns) float32, turned by angles of
    positions ``at`` (rows, 1); as they are where not ``turns``."""
    c = tl.load(cos + at * stride_cos + angle[None, :], mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + at * stride_sin + angle[None, :], mask=turns, other=0.0).to(tl.float32)
    return x * c + tl.where(first, -1.0, 1.0)[None, :] * other * s
