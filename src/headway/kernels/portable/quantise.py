"""float8 quantisation: the largest magnitude of a tensor, and values scaled, saturated and rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, next_power_of_2, tl
from headway.kernels.portable.numeric import to_e4m3_bits
from headway.kernels.portable.operands import bits, device_of


@jit
def amax_kernel(
    x_ptr,
    out_ptr,
    rows,
    stride_row,
    stride_head,
    PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """out[head], or out[0]: at least the largest finite magnitude of BLOCK_ROWS rows of a head."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * stride_row + head * stride_head + col[None, :]
    size = tl.abs(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32))
    size = tl.where(size < float("inf"), size, 0.0)
    tl.atomic_max(out_ptr + head * PER_HEAD, tl.max(tl.max(size, 1), 0), sem="relaxed")


@jit
def to_float8(x, dtype: tl.constexpr, limit):
    """float32 as float8, or as the bits of float8_e4m3fn where the device has none; saturates."""
    if dtype == tl.uint8:
        return to_e4m3_bits(x)
    else:
        kept = tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), x)
        return kept.to(dtype)


@jit
def quantise_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    limit,
    rows,
    stride_row,
    stride_head,
    stride_out_row,
    stride_out_head,
    stride_scale,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """out = x / scale[head], rounded and saturated."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
    wide = row.to(tl.int64)[:, None]
    x = tl.load(
        x_ptr + wide * stride_row + head * stride_head + col[None, :], mask=inside, other=0.0
    )
    x = x.to(tl.float32) * (1.0 / tl.load(scale_ptr + head * stride_scale))
    at = wide * stride_out_row + head * stride_out_head + col[None, :]
    tl.store(out_ptr + at, to_float8(x, out_ptr.dtype.element_ty, limit), mask=inside)


@jit
def interleaved(place):
    """Which key lies at a place among transposed values: of every 16 keys, pairs 0, 4, 1, 5, 2, 6, 3, 7."""
    return place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2


@jit
def transpose_values_kernel(
    v_ptr,
    out_ptr,
    scale_ptr,
    limit,
    kv_indptr,
    value_indptr,
    stride_row,
    stride_head,
    stride_out_head,
    stride_out_dim,
    stride_scale,
    QUANTISE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Make keys the contiguous dimension, each request's from ``value_indptr`` on, zeros behind its end."""
    b = tl.program_id(2)
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    first = tl.load(kv_indptr + b)
    length = tl.load(kv_indptr + b + 1) - first
    if start >= length:
        return
    # Rows are read in the order in which they are stored, so that stores are contiguous.
    n = start + interleaved(tl.arange(0, BLOCK_N))
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (n < length)[:, None] & (col < WIDTH)[None, :]
    at = (first + n).to(tl.int64)[:, None] * stride_row + head * stride_head + col[None, :]
    if QUANTISE:
        x = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x * (1.0 / tl.load(scale_ptr + head * stride_scale))
        x = to_float8(x, out_ptr.dtype.element_ty, limit)
    else:
        ZERO: tl.constexpr = 0 if v_ptr.dtype.element_ty.is_int() else 0.0
        x = tl.load(v_ptr + at, mask=inside, other=ZERO)
    place = tl.multiple_of(tl.load(value_indptr + b) + start, BLOCK_N) + tl.arange(0, BLOCK_N)
    at = head * stride_out_head + col.to(tl.int64)[:, None] * stride_out_dim + place[None, :]
    tl.store(out_ptr + at, tl.trans(x), mask=(col < WIDTH)[:, None])


#: Elements that a program takes of a tensor whose heads it need not tell apart, and of one head.
FLAT, OF_A_HEAD = 8192, 16384


@dataclass(frozen=True)
class _Grid:
    """How programs share out (rows, heads, width)."""

    rows: int
    heads: int
    width: int
    block_rows: int

    @property
    def programs(self) -> tuple[int, int]:
        return self.heads, cdiv(self.rows, self.block_rows)

    @property
    def constants(self) -> dict[str, int]:
        block_width = next_power_of_2(self.width)
        return {"WIDTH": self.width, "BLOCK_WIDTH": block_width, "BLOCK_ROWS": self.block_rows}


def _shared_out(one_scale: bool, *tensors: Tensor) -> tuple[_Grid, tuple[Tensor, ...]]:
    """A grid for tensors of one shape (rows, heads, width), and the tensors as it sees them.

    With one scale for all heads, contiguous tensors are rows of a power of two: no lane is idle.
    """
    rows, heads, width = tensors[0].shape
    even = heads * width & -(heads * width)
    if one_scale and even >= 64 and all(x.is_contiguous() for x in tensors):
        width = min(even, 1024)
        tensors = tuple(x.view(-1, 1, width) for x in tensors)
        return _Grid(tensors[0].shape[0], 1, width, FLAT // width), tensors
    return _Grid(rows, heads, width, max(OF_A_HEAD // next_power_of_2(width), 1)), tensors


def amax(x: Tensor, out: Tensor) -> None:
    """Raise ``out`` (heads,) or (1,) float32 to the largest finite magnitudes of (rows, heads, width)."""
    if x.shape[0] == 0:
        return
    grid, (x,) = _shared_out(out.numel() == 1, x)
    amax_kernel[grid.programs](
        x,
        out,
        grid.rows,
        x.stride(0),
        x.stride(1),
        PER_HEAD=out.numel() > 1,
        **grid.constants,
        num_warps=4,
    )


def quantise(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out`` (rows, heads, width) float8 = x / scale; scale (heads,) or (1,) float32."""
    if x.shape[0] == 0:
        return
    grid, (x, stored) = _shared_out(scale.numel() == 1, x, out)
    quantise_kernel[grid.programs](
        x,
        bits(stored, device_of(x.device).converts_float8),
        scale,
        torch.finfo(out.dtype).max,
        grid.rows,
        x.stride(0),
        x.stride(1),
        stored.stride(0),
        stored.stride(1),
        scale.stride(0) if scale.numel() > 1 else 0,
        **grid.constants,
        num_warps=4,
    )


def transpose_values(
    v: Tensor,
    scale: Tensor | None,
    out: Tensor,
    kv_indptr: Tensor,
    value_indptr: Tensor,
    max_seqlen_k: int,
    block_n: int,
    num_warps: int = 4,
) -> None:
    """``out`` (Hkv, Dv, padded keys) from v (total_k, Hkv, Dv), quantised by ``scale`` if v is no float8.

    Request b's keys go to columns ``value_indptr[b]`` on, multiples of block_n, itself one of 16; columns
    behind its last key, up to the next multiple, become zero. Within every 16 columns keys are in the order
    0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, which :func:`.mla_prefill.interleave` gives the
    weights too.
    """
    native = device_of(v.device).converts_float8
    _, heads, width = v.shape
    transpose_values_kernel[(heads, max(cdiv(max_seqlen_k, block_n), 1), len(kv_indptr) - 1)](
        bits(v, native),
        bits(out, native),
        scale,
        torch.finfo(out.dtype).max,
        kv_indptr,
        value_indptr,
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        scale.stride(0) if scale is not None and scale.numel() > 1 else 0,
        QUANTISE=scale is not None,
        WIDTH=width,
        BLOCK_WIDTH=next_power_of_2(width),
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
