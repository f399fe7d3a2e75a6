"""Rotary embedding of a step's queries and keys on a CPU, both in one pass.

Element i of a head turns with element i + half (the non-interleaved form), computed in float32 and
rounded once.
"""

from __future__ import annotations

import ctypes
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

ELEMENTS_PER_THREAD = 1 << 15
"""Elements that are worth another thread: turning them takes about as long as waking it."""

_NUMBERS = (
    *("q", "k", "q_out", "k_out", "cos", "sin", "scratch", "arguments", "tokens", "q_heads"),
    *("k_heads", "half", "dtype", "q_token", "q_head", "k_token", "k_head", "cos_token"),
    *("sin_token", "thread_bytes", "next_thread", "next_task"),
)
_ARGUMENTS = np.dtype([(name, np.int64) for name in _NUMBERS])
_PACKED = struct.Struct(f"{len(_NUMBERS)}q")
_NEXT_THREAD = int(_ARGUMENTS.fields["next_thread"][1])  # type: ignore[index]
_NEXT_TASK = int(_ARGUMENTS.fields["next_task"][1])  # type: ignore[index]

_TOKENS_PER_TASK = 16


@inline
def _rotate_head(dtype, source, target, cos, sin, half, row):  # type: ignore[no-untyped-def]
    one = np.float32(1)
    widen(dtype, source, row, 2 * half, one)
    for i in range(half):
        c, s = simd.load_float32(cos, i), simd.load_float32(sin, i)
        x, y = simd.load_float32(row, i), simd.load_float32(row, i + half)
        simd.store_float32(row, i, x * c - y * s)
        simd.store_float32(row, i + half, y * c + x * s)
    narrow(dtype, row, target, 2 * half, one)


@inline
def _drive(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (1,))[0]
    cos = a.scratch + simd.atomic_increment(a.arguments + _NEXT_THREAD) * a.thread_bytes
    sin = cos + a.half * 4
    row = sin + a.half * 4
    size = element_bytes(a.dtype)
    dim = 2 * a.half
    while True:
        first = simd.atomic_increment(a.arguments + _NEXT_TASK) * _TOKENS_PER_TASK
        if first >= a.tokens:
            return
        for t in range(first, min(first + _TOKENS_PER_TASK, a.tokens)):
            widen(a.dtype, a.cos + t * a.cos_token * size, cos, a.half, np.float32(1))
            widen(a.dtype, a.sin + t * a.sin_token * size, sin, a.half, np.float32(1))
            for h in range(a.q_heads):
                source = a.q + (t * a.q_token + h * a.q_head) * size
                target = a.q_out + (t * a.q_heads + h) * dim * size
                _rotate_head(a.dtype, source, target, cos, sin, a.half, row)
            for h in range(a.k_heads):
                source = a.k + (t * a.k_token + h * a.k_head) * size
                target = a.k_out + (t * a.k_heads + h) * dim * size
                _rotate_head(a.dtype, source, target, cos, sin, a.half, row)


def _entry(fingerprint: int) -> Any:
    def rotate_tokens(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:  # names the sources in the key of numba's cache on disk
            _drive(arguments)

    return rotate_tokens


@cache
def _compiled() -> tuple[Any, int]:
    """The compiled entry point (kept alive) and its address."""
    signature = types.void(types.CPointer(from_dtype(_ARGUMENTS)))
    compiled = compile_entry(_entry(source_fingerprint()), signature)
    return compiled, compiled.address


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the angles of their tokens.

    Args:
        q: (tokens, Hq, D), D even; k: (tokens, Hkv, D); float32, bfloat16 or float16, last stride 1.
        cos, sin: (tokens, D / 2 or D) of the dtype of q, last stride 1; the first D / 2 are used.

    Returns:
        New contiguous tensors of the shapes of q and k.
    """
    tokens, q_heads, dim = q.shape
    k_heads = k.shape[1]
    q_out = torch.empty((tokens, q_heads, dim), dtype=q.dtype, device=q.device)
    k_out = torch.empty((tokens, k_heads, dim), dtype=q.dtype, device=q.device)
    elements = tokens * (q_heads + k_heads) * dim
    threads = max(1, min(thread_count(), elements // ELEMENTS_PER_THREAD))
    thread_bytes = 8 * dim
    scratch = torch.empty(threads * thread_bytes, dtype=torch.uint8, device="cpu")
    arguments = ctypes.create_string_buffer(_PACKED.size)
    address = ctypes.addressof(arguments)
    _PACKED.pack_into(
        arguments,
        0,
        q.data_ptr(),
        k.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        scratch.data_ptr(),
        address,
        tokens,
        q_heads,
        k_heads,
        dim // 2,
        DTYPE_CODES[q.dtype],
        *q.stride()[:2],
        *k.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        thread_bytes,
        0,
        0,
    )
    run_on_threads(_compiled()[1], address, threads)
    return q_out, k_out
