"""RMS norm of rows, rounded where the models of transformers round.

Implementations differ in where they leave float32: :class:`NormStyle` names the ways in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, gdc_wait, next_power_of_2, tl, triton
from headway.kernels.norm_style import NormStyle
from headway.kernels.portable.numeric import cast
from headway.kernels.portable.operands import dependent_launch

#: Elements that a program takes at once, at most.
ELEMENTS = 4096


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    inner,
    stride_outer,
    stride_inner,
    eps,
    STYLE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (cols < D)[None, :]
    offsets = row // inner * stride_outer + row % inner * stride_inner
    x = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    variance = tl.sum(x * x, 1) / D
    x = x * tl.rsqrt(variance + eps)[:, None]
    if STYLE == 0:
        x = cast(x, out_ptr.dtype.element_ty).to(tl.float32)
    elif STYLE == 1:
        weight = weight + 1.0
    y = cast(x * weight, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + cols[None, :], y, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: (..., D), last stride 1; copied unless its rows lie in at most two regular dimensions.
        weight: (D,), any float dtype.

    Returns:
        Like x, contiguous.
    """
    d = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = out.numel() // d
    if rows == 0:
        return out
    inner, stride_outer, stride_inner = _places(x)
    if inner == 0:
        x, inner, stride_outer, stride_inner = x.contiguous(), 1, d, 0
    block_d = next_power_of_2(d)
    block_r = max(1, min(16, ELEMENTS // block_d, next_power_of_2(cdiv(rows, 256))))
    norm_kernel[(cdiv(rows, block_r),)](
        x,
        weight,
        out,
        rows,
        inner,
        stride_outer,
        stride_inner,
        eps,
        STYLE=int(style),
        D=d,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        num_warps=max(1, min(8, block_r * block_d // 256)),
        **dependent_launch(x.device),
    )
    return out


def _places(x: Tensor) -> tuple[int, int, int]:
    """(inner, outer stride, inner stride) of the rows, row r at r // inner and r % inner; inner 0: none."""
    dims: list[tuple[int, int]] = []
    for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == n * stride:
            dims[-1] = (dims[-1][0] * n, stride)
        elif n != 1:
            dims.append((n, stride))
    if len(dims) > 2:
        return 0, 0, 0
    (_, outer), (inner, inner_stride) = ((1, 0), (1, 0), *dims)[-2:]
    return (inner, outer, inner_stride) if len(dims) == 2 else (1, inner_stride, 0)
