"""Rows of any float dtype as rows of float32, and back, for compiled kernels that take both."""

from __future__ import annotations

from typing import Any

import torch
from numba import njit

from headway.kernels.cpu import simd

#: Numbers by which compiled code knows the dtypes.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

inline: Any = njit(error_model="numpy")

_WIDEN_FLOAT32 = simd.make_widen("float32")
_WIDEN_BFLOAT16 = simd.make_widen("bfloat16")
_WIDEN_FLOAT16 = simd.make_widen("float16")
_NARROW_FLOAT32 = simd.make_narrow("float32")
_NARROW_BFLOAT16 = simd.make_narrow("bfloat16")
_NARROW_FLOAT16 = simd.make_narrow("float16")


@inline
def element_bytes(dtype):  # type: ignore[no-untyped-def]
    return 4 if dtype == 0 else 2


@inline
def widen(dtype, source, target, count, factor):  # type: ignore[no-untyped-def]
    """target[i] = float32(source[i]) * factor for ``count`` elements."""
    if dtype == 0:
        _WIDEN_FLOAT32(source, target, count, factor)
    elif dtype == 1:
        _WIDEN_BFLOAT16(source, target, count, factor)
    else:
        _WIDEN_FLOAT16(source, target, count, factor)


@inline
def narrow(dtype, source, target, count, factor):  # type: ignore[no-untyped-def]
    """target[i] = dtype(source[i] * factor) for ``count`` elements of float32, rounded to nearest even."""
    if dtype == 0:
        for i in range(count):
            _NARROW_FLOAT32(source, target, i, factor)
    elif dtype == 1:
        for i in range(count):
            _NARROW_BFLOAT16(source, target, i, factor)
    else:
        for i in range(count):
            _NARROW_FLOAT16(source, target, i, factor)
