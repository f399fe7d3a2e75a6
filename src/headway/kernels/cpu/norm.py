"""RMS norm of rows on a CPU, in one pass, rounded where the models of transformers round."""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, from_dtype, types
from torch import Tensor

from headway.kernels.cpu import simd
from headway.kernels.cpu.compile import compile_entry, source_fingerprint
from headway.kernels.cpu.parallel import run_on_threads, thread_count
from headway.kernels.cpu.rows import DTYPE_CODES, element_bytes, inline, narrow, widen
from headway.kernels.norm_style import NormStyle

ELEMENTS_PER_THREAD = 1 << 15
"""Elements that are worth another thread: normalising them takes about as long as waking it."""

_NUMBERS = (
    *("x", "weight", "out", "scratch", "arguments", "rows", "inner", "outer_stride"),
    *("inner_stride", "width", "dtype", "style", "thread_bytes", "next_thread", "next_task"),
)
_ARGUMENTS = np.dtype([(name, np.int64) for name in _NUMBERS] + [("eps", np.float64)])
_PACKED = struct.Struct(f"{len(_NUMBERS)}qd")
_NEXT_THREAD = int(_ARGUMENTS.fields["next_thread"][1])  # type: ignore[index]
_NEXT_TASK = int(_ARGUMENTS.fields["next_task"][1])  # type: ignore[index]

_ROWS_PER_TASK = 16


@inline
def _drive(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (1,))[0]
    line = a.scratch + simd.atomic_increment(a.arguments + _NEXT_THREAD) * a.thread_bytes
    padded = (a.width + simd.LANES - 1) // simd.LANES * simd.LANES
    size = element_bytes(a.dtype)
    for i in range(a.width, padded):
        simd.store_float32(line, i, np.float32(0))
    while True:
        first = simd.atomic_increment(a.arguments + _NEXT_TASK) * _ROWS_PER_TASK
        if first >= a.rows:
            return
        for row in range(first, min(first + _ROWS_PER_TASK, a.rows)):
            at = row // a.inner * a.outer_stride + row % a.inner * a.inner_stride
            out = a.out + row * a.width * size
            widen(a.dtype, a.x + at * size, line, a.width, np.float32(1))
            mean = simd.row_square_sum(line, padded) / a.width
            simd.row_scale(line, padded, np.float32(1 / math.sqrt(mean + a.eps)))
            if a.style == 0 and a.dtype != 0:
                narrow(a.dtype, line, out, a.width, np.float32(1))
                widen(a.dtype, out, line, a.width, np.float32(1))
            simd.row_multiply(line, padded, a.weight)
            narrow(a.dtype, line, out, a.width, np.float32(1))


def _entry(fingerprint: int) -> Any:
    def normalise_rows(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:  # names the sources in the key of numba's cache on disk
            _drive(arguments)

    return normalise_rows


@cache
def _compiled() -> tuple[Any, int]:
    """The compiled entry point (kept alive) and its address."""
    signature = types.void(types.CPointer(from_dtype(_ARGUMENTS)))
    compiled = compile_entry(_entry(source_fingerprint()), signature)
    return compiled, compiled.address


class RMSNorm:
    """An RMS norm over the last dimension.

    Args:
        weight: (D,), any float dtype.
        eps: joins the mean of the squares.
        style: what the weight does to a normalised row.
    """

    def __init__(self, weight: Tensor, eps: float, style: NormStyle) -> None:
        self.eps = eps
        self.style = style
        width = weight.shape[0]
        padded = -(-width // simd.LANES) * simd.LANES
        self._weight = torch.zeros(padded, dtype=torch.float32, device="cpu")
        self._weight[:width] = weight.detach().float() + (style is NormStyle.OFFSET)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, D) or (outer rows, inner rows, D) of float32, bfloat16 or float16; last stride 1.

        Returns:
            Like x, contiguous.
        """
        *shape, width = x.shape
        inner, inner_stride = (1, 0) if len(shape) == 1 else (shape[1], x.stride(1))
        rows = shape[0] * inner
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        threads = max(1, min(thread_count(), rows * width // ELEMENTS_PER_THREAD))
        thread_bytes = 4 * self._weight.shape[0]
        scratch = torch.empty(threads * thread_bytes, dtype=torch.uint8, device="cpu")
        arguments = ctypes.create_string_buffer(_PACKED.size)
        address = ctypes.addressof(arguments)
        _PACKED.pack_into(
            arguments,
            0,
            x.data_ptr(),
            self._weight.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
            address,
            rows,
            inner,
            x.stride(0),
            inner_stride,
            width,
            DTYPE_CODES[x.dtype],
            int(self.style),
            thread_bytes,
            0,
            0,
            self.eps,
        )
        run_on_threads(_compiled()[1], address, threads)
        return out
