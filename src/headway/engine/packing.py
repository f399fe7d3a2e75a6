"""Weights of linear layers in the blocked layout of oneDNN, which otherwise converts them in every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedWeight:
    """A weight (out, in) in oneDNN's blocked layout, and the product with it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def of(*layers: nn.Linear) -> PackedWeight:
        """Layers that read the same input, as one; all have a bias, or none."""
        if len(layers) == 1:
            return PackedWeight(layers[0].weight, layers[0].bias)
        biases = [one.bias for one in layers if one.bias is not None]
        weight = torch.cat(tuple(one.weight for one in layers))
        return PackedWeight(weight, torch.cat(tuple(biases)) if biases else None)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )
        return out

    def plus(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the product, in the product's own kernel."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._weight, self._bias, "add"
        )
        return out


def packing_unavailable(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype cannot be packed here, or None."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch has no oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN computes no bfloat16 on this CPU"
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN computes no float16 on this CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"linear layers of {dtype}"
    return None
