"""Append to a KV cache on a CPU: rotate the new keys and the queries, write keys and values, in one pass.

New token i of sequence b goes to row ``seqlens_k[b] + i`` of the sequence, through the page table
where there is one. Rotation is computed in float32 and rounded once; without it rows are copied.
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
"""Elements that are worth another thread: moving them takes about as long as waking it."""

_ADDRESSES = (
    *("k_new", "v_new", "k", "v", "q", "q_out", "seqlens_k", "cu_seqlens_new", "cu_seqlens_q"),
    *("seqused_q", "page_table", "cache_batch_idx", "cos", "sin", "rotary_seqlens", "scratch"),
    "arguments",
)
_NUMBERS = (
    *("batch_size", "num_q_heads", "num_kv_heads", "head_dim", "head_dim_v", "seqlen_new"),
    *("seqlen_q", "page_size", "new_dtype", "cache_dtype", "q_dtype", "rotary_half", "interleaved"),
    *("q_at_own", "k_new_batch", "k_new_token", "k_new_head", "v_new_batch", "v_new_token"),
    *("v_new_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head", "q_batch"),
    *("q_token", "q_head", "q_out_batch", "q_out_token", "q_out_head", "page_table_row"),
    *("cos_row", "sin_row", "thread_bytes", "next_thread", "next_task"),
)
_ARGUMENTS = np.dtype([(name, np.int64) for name in _ADDRESSES + _NUMBERS])
_PACKED = struct.Struct(f"{len(_ADDRESSES + _NUMBERS)}q")
_NEXT_THREAD = int(_ARGUMENTS.fields["next_thread"][1])  # type: ignore[index]
_NEXT_TASK = int(_ARGUMENTS.fields["next_task"][1])  # type: ignore[index]
_TENSORS = struct.Struct("4q")
"""The first addresses: k_new, v_new, k, v."""
_COUNTERS = struct.Struct("2q")
"""From next_thread on: what a run counts up."""

_TOKENS_PER_TASK = 16


@inline
def _convert_row(source, source_dtype, target, target_dtype, count, scratch):  # type: ignore[no-untyped-def]
    one = np.float32(1)
    widen(source_dtype, source, scratch, count, one)
    narrow(target_dtype, scratch, target, count, one)


@inline
def _rotate_row(a, row, position):  # type: ignore[no-untyped-def]
    """Rotary embedding of one float32 row, in place."""
    cos, sin = a.cos + position * a.cos_row * 4, a.sin + position * a.sin_row * 4
    step, distance = (2, 1) if a.interleaved != 0 else (1, a.rotary_half)
    for i in range(a.rotary_half):
        c, s = simd.load_float32(cos, i), simd.load_float32(sin, i)
        x = simd.load_float32(row, i * step)
        y = simd.load_float32(row, i * step + distance)
        simd.store_float32(row, i * step, x * c - y * s)
        simd.store_float32(row, i * step + distance, x * s + y * c)


@inline
def _move_row(a, source, source_dtype, target, target_dtype, position, scratch):  # type: ignore[no-untyped-def]
    """Convert a row of head_dim elements, rotated to ``position`` if that is not negative."""
    if position < 0:
        _convert_row(source, source_dtype, target, target_dtype, a.head_dim, scratch)
        return
    _convert_row(source, source_dtype, scratch, 0, a.head_dim, scratch)
    _rotate_row(a, scratch, position)
    narrow(target_dtype, scratch, target, a.head_dim, np.float32(1))


@inline
def _length(cu_seqlens, used, uniform, b):  # type: ignore[no-untyped-def]
    if used != 0:
        return np.int64(simd.load_int32(used, b))
    if cu_seqlens != 0:
        end = np.int64(simd.load_int32(cu_seqlens, b + 1))
        return end - np.int64(simd.load_int32(cu_seqlens, b))
    return uniform


@inline
def _origin(cu_seqlens, b, token, batch):  # type: ignore[no-untyped-def]
    """Offset in elements of a sequence's first token in a ragged or dense tensor."""
    if cu_seqlens != 0:
        return np.int64(simd.load_int32(cu_seqlens, b)) * token
    return b * batch


@inline
def _append_token(a, b, i, scratch):  # type: ignore[no-untyped-def]
    length = np.int64(simd.load_int32(a.seqlens_k, b))
    row = b
    if a.cache_batch_idx != 0:
        row = np.int64(simd.load_int32(a.cache_batch_idx, b))
    page, offset = row, length + i
    if a.page_table != 0:
        at = row * a.page_table_row + offset // a.page_size
        page, offset = np.int64(simd.load_int32(a.page_table, at)), offset % a.page_size
    position = np.int64(-1)
    if a.cos != 0:
        position = length + i
        if a.rotary_seqlens != 0:
            position = np.int64(simd.load_int32(a.rotary_seqlens, b)) + i
    new, size = element_bytes(a.new_dtype), element_bytes(a.cache_dtype)
    k_new = _origin(a.cu_seqlens_new, b, a.k_new_token, a.k_new_batch) + i * a.k_new_token
    v_new = _origin(a.cu_seqlens_new, b, a.v_new_token, a.v_new_batch) + i * a.v_new_token
    for h in range(a.num_kv_heads):
        source = a.k_new + (k_new + h * a.k_new_head) * new
        target = a.k + (page * a.k_page + offset * a.k_token + h * a.k_head) * size
        _move_row(a, source, a.new_dtype, target, a.cache_dtype, position, scratch)
        source = a.v_new + (v_new + h * a.v_new_head) * new
        target = a.v + (page * a.v_page + offset * a.v_token + h * a.v_head) * size
        _convert_row(source, a.new_dtype, target, a.cache_dtype, a.head_dim_v, scratch)


@inline
def _rotate_query(a, b, i, scratch):  # type: ignore[no-untyped-def]
    lengths = a.rotary_seqlens if a.rotary_seqlens != 0 else a.seqlens_k
    position = np.int64(simd.load_int32(lengths, b))
    if a.q_at_own != 0:
        position += i
    size = element_bytes(a.q_dtype)
    q = _origin(a.cu_seqlens_q, b, a.q_token, a.q_batch) + i * a.q_token
    q_out = _origin(a.cu_seqlens_q, b, a.q_out_token, a.q_out_batch) + i * a.q_out_token
    for h in range(a.num_q_heads):
        source = a.q + (q + h * a.q_head) * size
        target = a.q_out + (q_out + h * a.q_out_head) * size
        _move_row(a, source, a.q_dtype, target, a.q_dtype, position, scratch)


@inline
def _drive(arguments):  # type: ignore[no-untyped-def]
    """What each thread does: take the next few tokens until none is left."""
    a = carray(arguments, (1,))[0]
    scratch = a.scratch + simd.atomic_increment(a.arguments + _NEXT_THREAD) * a.thread_bytes
    mine = simd.atomic_increment(a.arguments + _NEXT_TASK)
    task = 0
    for b in range(a.batch_size):
        new = _length(a.cu_seqlens_new, 0, a.seqlen_new, b)
        queries = np.int64(0)
        if a.q != 0:
            queries = _length(a.cu_seqlens_q, a.seqused_q, a.seqlen_q, b)
        for first in range(0, max(new, queries), _TOKENS_PER_TASK):
            if task == mine:
                last = first + _TOKENS_PER_TASK
                for i in range(first, min(last, new)):
                    _append_token(a, b, i, scratch)
                for i in range(first, min(last, queries)):
                    _rotate_query(a, b, i, scratch)
                mine = simd.atomic_increment(a.arguments + _NEXT_TASK)
            task += 1


def _entry(fingerprint: int) -> Any:
    def append_tokens(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:  # names the sources in the key of numba's cache on disk
            _drive(arguments)

    return append_tokens


@cache
def _compiled() -> tuple[Any, int]:
    """The compiled entry point (kept alive) and its address."""
    signature = types.void(types.CPointer(from_dtype(_ARGUMENTS)))
    compiled = compile_entry(_entry(source_fingerprint()), signature)
    return compiled, compiled.address


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _token_strides(tensor: Tensor, ragged: bool) -> tuple[int, int, int]:
    """Strides of (batch, token, head), the first 0 for a ragged tensor."""
    strides = tensor.stride()
    return (0 if ragged else strides[0], strides[-3], strides[-2])


class AppendCall:
    """Writing new keys and values into a cache in place, rotating keys and queries if rotary is given.

    It runs once, or for many layers of a model. The call keeps alive what its arguments point to, and
    serves one thread of the program at a time.

    Arguments are taken as checked: nothing here looks at values or raises anything about them.

    Args:
        k_new: (B, Snew, Hkv, D), or (total_new, Hkv, D) with ``cu_seqlens_new``; float32, bfloat16
            or float16. Last stride 1, as for every tensor here; other strides are free.
        v_new: like ``k_new`` with head dim Dv.
        k: (rows, Sk, Hkv, D), or (num_pages, page_size, Hkv, D) with ``page_table``; float32,
            bfloat16 or float16.
        v: like k with head dim Dv.
        seqlens_k: (B,) int32, rows in use before the call (left padding included).
        cu_seqlens_new: (B + 1,) int32.
        page_table: (rows, max_pages) int32.
        cache_batch_idx: (B,) int32, row of the dense cache or of the page table per sequence.
        rotary_cos, rotary_sin: (max_position, rotary_dim / 2), any float dtype; None: no rotation.
        rotary_interleaved: pairs (0, 1), (2, 3).. rather than (i, i + rotary_dim / 2).
        rotary_seqlens: (B,) int32, position of the first new token; None: ``seqlens_k``.
        q: (B, Sq, Hq, D), or (total_q, Hq, D) with ``cu_seqlens_q``: queries to rotate into
            ``q_out``, of the same shape and dtype. None: only keys are rotated.
        seqused_q: (B,) int32, queries in use of each sequence.
        q_at_own_positions: rotate query i to the first position + i rather than all to the first.
    """

    def __init__(
        self,
        k_new: Tensor,
        v_new: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        seqlens_k: Tensor,
        cu_seqlens_new: Tensor | None = None,
        page_table: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = True,
        rotary_seqlens: Tensor | None = None,
        q: Tensor | None = None,
        q_out: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        seqused_q: Tensor | None = None,
        q_at_own_positions: bool = True,
    ) -> None:
        cos = None if rotary_cos is None else rotary_cos.float()
        sin = None if rotary_sin is None else rotary_sin.float()
        if q is None or q_out is None or cos is None:
            q = q_out = None
        ragged_new, ragged_q = cu_seqlens_new is not None, cu_seqlens_q is not None
        elements = k_new.numel() + v_new.numel() + (0 if q is None else q.numel())
        threads = max(1, min(thread_count(), elements // ELEMENTS_PER_THREAD))
        thread_bytes = 4 * max(k.shape[-1], v.shape[-1])
        scratch = torch.empty(threads * thread_bytes, dtype=torch.uint8, device="cpu")
        k_strides, v_strides = k.stride(), v.stride()
        arguments = ctypes.create_string_buffer(_PACKED.size)
        address = ctypes.addressof(arguments)
        _PACKED.pack_into(
            arguments,
            0,
            k_new.data_ptr(),
            v_new.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            _address(q),
            _address(q_out),
            seqlens_k.data_ptr(),
            _address(cu_seqlens_new),
            _address(cu_seqlens_q),
            _address(seqused_q),
            _address(page_table),
            _address(cache_batch_idx),
            _address(cos),
            _address(sin),
            _address(rotary_seqlens),
            scratch.data_ptr(),
            address,
            seqlens_k.shape[0],
            0 if q is None else q.shape[-2],
            k.shape[-2],
            k.shape[-1],
            v.shape[-1],
            0 if ragged_new else k_new.shape[1],
            0 if q is None or ragged_q else q.shape[1],
            k.shape[1],
            DTYPE_CODES[k_new.dtype],
            DTYPE_CODES[k.dtype],
            0 if q is None else DTYPE_CODES[q.dtype],
            0 if cos is None else cos.shape[1],
            int(rotary_interleaved),
            int(q_at_own_positions),
            *_token_strides(k_new, ragged_new),
            *_token_strides(v_new, ragged_new),
            *k_strides[:3],
            *v_strides[:3],
            *((0, 0, 0) if q is None else _token_strides(q, ragged_q)),
            *((0, 0, 0) if q_out is None else _token_strides(q_out, ragged_q)),
            0 if page_table is None else page_table.stride(0),
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            thread_bytes,
            0,
            0,
        )
        self._function = _compiled()[1]
        self._arguments, self._address, self._threads = arguments, address, threads
        self._alive = (
            *(k_new, v_new, k, v, seqlens_k, cu_seqlens_new, page_table, cache_batch_idx, cos, sin),
            *(rotary_seqlens, q, q_out, cu_seqlens_q, seqused_q, scratch),
        )

    def run(self) -> None:
        """Write what it was built from."""
        _COUNTERS.pack_into(self._arguments, _NEXT_THREAD, 0, 0)
        run_on_threads(self._function, self._address, self._threads)

    def run_with(self, k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor) -> None:
        """Write other tensors of the same shapes, strides and dtypes."""
        addresses = k_new.data_ptr(), v_new.data_ptr(), k.data_ptr(), v.data_ptr()
        _TENSORS.pack_into(self._arguments, 0, *addresses)
        self.run()
