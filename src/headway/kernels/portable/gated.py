"""The gated activation of a feed-forward block: act(gate) * up, of one product that holds both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, gdc_wait, jit, tl
from headway.kernels.portable.numeric import cast
from headway.kernels.portable.operands import dependent_launch

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")

#: Columns per program.
BLOCK = 1024


@jit
def gated_kernel(
    x_ptr,
    out_ptr,
    stride_row,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    source = x_ptr + row * stride_row + cols
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == 1:
        # 1 + tanh(u) is 2 sigmoid(2u)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    # The activation's result is a tensor of the model's dtype before it is multiplied.
    gate = cast(gate, out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + cols, cast(gate * up, out_ptr.dtype.element_ty), mask=inside)


def gated(x: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up.

    Args:
        x: (..., 2 * width), contiguous: gates, then what they gate.

    Returns:
        (..., width), of the same dtype.
    """
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    rows = out.numel() // width
    if rows:
        gated_kernel[(rows, cdiv(width, BLOCK))](
            x,
            out,
            x.stride(-2) if x.dim() > 1 else 0,
            WIDTH=width,
            ACTIVATION=ACTIVATIONS.index(activation),
            BLOCK=BLOCK,
            num_warps=4,
            **dependent_launch(x.device),
        )
    return out
