"""What the stand-ins compute with: the reference, into memory that was never initialised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import headway


def attend(
    function: str, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call of :mod:`headway`, by the reference; rows of padding hold NaN."""
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = arguments.pop("out", None)
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=dtype)
    call = getattr(headway, function)
    return call(q, k, v, out=out, return_lse=True, backend="reference", **arguments)


def check_window(window: Any) -> tuple[int, int]:
    """A window as FlashAttention 2 and 3 take it: two integers, -1 unbounded."""
    left, right = window
    assert all(isinstance(side, int) and side >= -1 for side in (left, right)), window
    return left, right


def check_int32(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or (tensor.dtype == torch.int32 and tensor.stride(-1) == 1)


def check_heads(q: Tensor, k: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have one dtype"
    assert q.dtype in dtypes, q.dtype
    assert q.shape[-2] % k.shape[-2] == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v))


def check_rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor | None) -> None:
    if cos is None:
        return
    assert k is not None, "rotary needs new keys"
    assert cos.dtype == q.dtype
    assert sin is not None
    assert sin.shape == cos.shape
    assert 2 * cos.shape[-1] % 16 == 0
