"""The compiled RMS norm is the formula of each style, rounded where that style rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from headway.kernels.cpu.norm import RMSNorm
from headway.kernels.norm_style import NormStyle


def formula(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    wide = x.double()
    row = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if style is NormStyle.ROUNDED:
        return row.to(x.dtype).double() * weight.double()
    return row * (weight.double() + (style is NormStyle.OFFSET))


@pytest.mark.parametrize("style", NormStyle)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 576), (7, 65), (300, 16), (5, 3, 40), (0, 8)])
def test_rows_are_normalised(shape: tuple[int, ...], dtype: torch.dtype, style: NormStyle) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]  # rows lie apart
    weight = torch.randn(shape[-1]).to(dtype)
    got = RMSNorm(weight, 1e-5, style)(x)
    assert got.dtype == dtype
    assert got.is_contiguous()
    want = formula(x, weight, 1e-5, style)
    steps = 2 if style is NormStyle.ROUNDED else 1  # each rounding may fall the other way once
    bound = steps * torch.finfo(dtype).eps * want.abs() + 1e-6
    assert ((got.double() - want).abs() <= bound).all()


def test_a_row_of_zeros_stays_zero() -> None:
    assert (RMSNorm(torch.ones(20), 1e-6, NormStyle.WIDE)(torch.zeros(3, 20)) == 0).all()


def test_columns_beside_a_row_are_not_read() -> None:
    x = torch.full((4, 32), float("nan"))
    x[:, :17] = 1.0
    out = RMSNorm(torch.ones(17), 0.0, NormStyle.WIDE)(x[:, :17])
    torch.testing.assert_close(out, torch.ones(4, 17))
