"""What becomes of gradients: there are none. A forward pass that would need some says so in its backward.

So models whose parameters require gradients answer outside of ``torch.no_grad`` too, and training fails at
the place where it would go wrong, instead of leaving weights as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError, UnsupportedError


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, instead: str, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.instead = instead
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedError(f"Headway computes no gradients: {ctx.instead}")


def required(*inputs: object) -> bool:
    """Whether autograd wants to know how a result follows from these (tensors and others)."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and getattr(x, "requires_grad", False):
                return True
    return False


def check_out(out: Tensor | None) -> None:
    """Inputs that require gradients go with no ``out``, as everywhere in torch: it could not tell."""
    if out is not None:
        given = "a tensor beside inputs that require gradients"
        raise InvalidInputError("out", given, "the call in torch.no_grad()")


def refused(
    out: Tensor, *inputs: object, instead: str = "train with torch's own attention"
) -> Tensor:
    """``out`` as a result of the inputs whose backward pass raises :class:`UnsupportedError`."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    refusing: Tensor = _NoBackward.apply(instead, out, *tensors)
    return refusing
