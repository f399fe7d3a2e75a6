"""Flash attention on a CPU: one compiled kernel for prefill, decode and any mix of them.

A call is cut into tiles: some queries of one sequence, with all the query heads that share one
key/value head. A tile walks over the keys it can see in blocks of :data:`BLOCK_KEYS` with an
online softmax. All blocks of all tiles form one line, which is cut into equal chunks for the
threads; a tile that lies across a cut is finished from its partial results. So sixteen short
sequences and one long one keep every core equally busy, as split-KV (flash decoding) does, with
no more than two partial results per chunk.

Keys and values are read where they lie, through the page table. Invisible keys are not read at all,
so unused pages and tails of caches may hold anything. Scores, softmax and sums are float32.
"""

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
from headway.kernels.cpu.simd import LANES

BLOCK_KEYS = 64
"""Keys of one block of the online softmax: a multiple of LANES, and a block stays in L2."""

TILE_ROWS = 64
"""Rows (queries x heads of a group) that a prefill tile aims for."""

STAGE_ROWS = 16
"""Tiles of more rows than this convert a block of 16-bit keys once instead of once per four rows."""

CHUNKS_PER_THREAD = 4
"""Chunks of a large call, so that a thread that is held up leaves work to the others."""

FLOAT8_CODE = 3
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)

_UNBOUNDED = 1 << 40
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_NEGATIVE_INFINITY = np.float32(-np.inf)

_ADDRESSES = (
    *("q", "k", "v", "out", "lse", "cu_seqlens_q", "seqused_q", "cu_seqlens_k", "seqlens_k"),
    *("leftpad_k", "cache_batch_idx", "page_table", "sinks", "q_descale", "k_descale", "v_descale"),
    *("float8_table", "scratch", "arguments"),
)
_NUMBERS = (
    *("batch_size", "num_kv_heads", "group", "head_dim", "head_dim_v", "seqlen_q", "seqlen_k"),
    *(
        "page_size",
        "window_left",
        "window_right",
        "chunk",
        "tile_queries",
        "tile_rows",
        "num_threads",
    ),
    *("q_dtype", "out_dtype", "q_batch", "q_token", "q_head", "out_batch", "out_token", "out_head"),
    *("lse_batch", "lse_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head"),
    *("page_table_row", "q_descale_row", "q_descale_head", "k_descale_row", "k_descale_head"),
    *(
        "v_descale_row",
        "v_descale_head",
        "thread_bytes",
        "slot_floats",
        "next_thread",
        "next_chunk",
    ),
    *("chunks_done",),
)
_FACTORS = ("softmax_scale", "softcap")
_ARGUMENTS = np.dtype(
    [(name, np.int64) for name in _ADDRESSES + _NUMBERS] + [(name, np.float64) for name in _FACTORS]
)
_PACKED = struct.Struct(f"{len(_ADDRESSES + _NUMBERS)}q{len(_FACTORS)}d")
_TENSORS = struct.Struct("5q")
"""The first addresses: q, k, v, out, lse."""
_COUNTERS = struct.Struct("3q")
"""From next_thread on: what a run counts up."""
_NEXT_THREAD = int(_ARGUMENTS.fields["next_thread"][1])  # type: ignore[index]
_NEXT_CHUNK = int(_ARGUMENTS.fields["next_chunk"][1])  # type: ignore[index]
_CHUNKS_DONE = int(_ARGUMENTS.fields["chunks_done"][1])  # type: ignore[index]
_SINKS = int(_ARGUMENTS.fields["sinks"][1])  # type: ignore[index]


def _specialised(dtype: str) -> Any:
    """Compile a function made once per dtype, under a name of its own.

    Compiled code that comes from the cache on disk is linked by name, so two specialisations that
    were compiled in different processes must not share one.
    """

    def compile_under_own_name(function: Any) -> Any:
        function.__qualname__ = function.__name__ = f"{function.__name__}_{dtype}"
        return inline(function)

    return compile_under_own_name


@inline
def _padded(count, multiple):  # type: ignore[no-untyped-def]
    return (count + multiple - 1) // multiple * multiple


@inline
def _lengths(a, b):  # type: ignore[no-untyped-def]
    """Queries and visible-at-most keys of sequence b."""
    if a.seqused_q != 0:
        seqlen_q = np.int64(simd.load_int32(a.seqused_q, b))
    elif a.cu_seqlens_q != 0:
        seqlen_q = np.int64(simd.load_int32(a.cu_seqlens_q, b + 1))
        seqlen_q -= np.int64(simd.load_int32(a.cu_seqlens_q, b))
    else:
        seqlen_q = a.seqlen_q
    if a.seqlens_k != 0:
        seqlen_k = np.int64(simd.load_int32(a.seqlens_k, b))
    elif a.cu_seqlens_k != 0:
        seqlen_k = np.int64(simd.load_int32(a.cu_seqlens_k, b + 1))
        seqlen_k -= np.int64(simd.load_int32(a.cu_seqlens_k, b))
    else:
        seqlen_k = a.seqlen_k
    if a.leftpad_k != 0:
        seqlen_k -= np.int64(simd.load_int32(a.leftpad_k, b))
    return seqlen_q, max(seqlen_k, 0)


@inline
def _visible(a, first, last, seqlen_k):  # type: ignore[no-untyped-def]
    """Keys [start, stop) outside of which no query at positions first..last sees anything."""
    start = max(first - a.window_left, 0)
    stop = min(last + a.window_right + 1, seqlen_k)
    if a.chunk > 0:
        start = max(start, first // a.chunk * a.chunk)
        stop = min(stop, (last // a.chunk + 1) * a.chunk)
    return start, max(stop, start)


@inline
def _tile_blocks(a, start, stop):  # type: ignore[no-untyped-def]
    """Units of work in a tile. One that sees no key still has its zeros to write."""
    return max((stop - start + BLOCK_KEYS - 1) // BLOCK_KEYS, 1)


@inline
def _total_blocks(a):  # type: ignore[no-untyped-def]
    total = 0
    for b in range(a.batch_size):
        seqlen_q, seqlen_k = _lengths(a, b)
        for first in range(0, seqlen_q, a.tile_queries):
            last = min(first + a.tile_queries, seqlen_q) - 1
            shift = seqlen_k - seqlen_q
            start, stop = _visible(a, first + shift, last + shift, seqlen_k)
            total += _tile_blocks(a, start, stop) * a.num_kv_heads
    return total


@inline
def _num_chunks(a, total):  # type: ignore[no-untyped-def]
    wanted = a.num_threads
    if total >= 16 * CHUNKS_PER_THREAD * a.num_threads:
        wanted *= CHUNKS_PER_THREAD
    return min(total, wanted)


@inline
def _float8_row(a, source, target, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        code = np.int64(simd.load_uint8(source, i))
        simd.store_float32(target, i, simd.load_float32(a.float8_table, code))


@inline
def _widen_row(a, dtype, source, target, count, factor):  # type: ignore[no-untyped-def]
    """A row of ``count`` elements as float32 times ``factor``, zero-padded to a multiple of LANES."""
    if dtype == FLOAT8_CODE:
        _float8_row(a, source, target, count)
        widen(0, target, target, count, factor)
    else:
        widen(dtype, source, target, count, factor)
    for i in range(count, _padded(count, LANES)):
        simd.store_float32(target, i, np.float32(0))


@inline
def _stored_bytes(dtype):  # type: ignore[no-untyped-def]
    return 1 if dtype == FLOAT8_CODE else element_bytes(dtype)


@inline
def _descale(address, row, head, b, h):  # type: ignore[no-untyped-def]
    if address == 0:
        return np.float32(1)
    return simd.load_float32(address, b * row + h * head)


@inline
def _load_queries(a, b, h, first, count, rows, target):  # type: ignore[no-untyped-def]
    """The tile's queries as float32 rows, scaled for the softmax, padded with rows of zeros."""
    factor = a.softmax_scale * _descale(a.q_descale, a.q_descale_row, a.q_descale_head, b, h)
    factor *= _descale(a.k_descale, a.k_descale_row, a.k_descale_head, b, h)
    factor = factor / a.softcap if a.softcap > 0 else factor * _LOG2_E
    padded = _padded(a.head_dim, LANES)
    token = b * a.q_batch + first * a.q_token
    if a.cu_seqlens_q != 0:
        token += np.int64(simd.load_int32(a.cu_seqlens_q, b)) * a.q_token
    size = _stored_bytes(a.q_dtype)
    for row in range(count * a.group):
        i, head = row // a.group, h * a.group + row % a.group
        source = a.q + (token + i * a.q_token + head * a.q_head) * size
        _widen_row(a, a.q_dtype, source, target + row * padded * 4, a.head_dim, np.float32(factor))
    for i in range(count * a.group * padded, rows * padded):
        simd.store_float32(target, i, np.float32(0))


@inline
def _fill_addresses(a, b, h, key, count, size, keys, values):  # type: ignore[no-untyped-def]
    """Addresses of the rows of keys and values [key, key + count) of sequence b."""
    row = b
    if a.cache_batch_idx != 0:
        row = np.int64(simd.load_int32(a.cache_batch_idx, b))
    if a.leftpad_k != 0:
        key += np.int64(simd.load_int32(a.leftpad_k, b))
    page, page_size = row, a.page_size
    if a.page_table == 0:
        page_size = key + count  # a dense row is one page that never ends
    if a.cu_seqlens_k != 0:
        page = 0
        key += np.int64(simd.load_int32(a.cu_seqlens_k, b))
        page_size = key + count
    done = 0
    while done < count:
        offset = key + done
        if a.page_table != 0:
            page = np.int64(
                simd.load_int32(a.page_table, row * a.page_table_row + offset // page_size)
            )
            offset = offset % page_size
        k = a.k + (page * a.k_page + offset * a.k_token + h * a.k_head) * size
        v = a.v + (page * a.v_page + offset * a.v_token + h * a.v_head) * size
        for _ in range(min(page_size - offset, count - done)):
            simd.store_int64(keys, done, k)
            simd.store_int64(values, done, v)
            k += a.k_token * size
            v += a.v_token * size
            done += 1
    for i in range(count, _padded(count, LANES)):  # the score tiles read whole groups of keys
        simd.store_int64(keys, i, simd.load_int64(keys, count - 1))


@inline
def _stage(a, dtype, addresses, count, head_dim, target):  # type: ignore[no-untyped-def]
    """Convert the rows at ``addresses`` to float32 rows at ``target`` and point the addresses there."""
    padded = _padded(head_dim, LANES)
    for i in range(count):
        row = target + i * padded * 4
        _widen_row(a, dtype, simd.load_int64(addresses, i), row, head_dim, np.float32(1))
        simd.store_int64(addresses, i, row)
    for i in range(count, _padded(count, LANES)):
        simd.store_int64(addresses, i, simd.load_int64(addresses, count - 1))


@inline
def _mask_scores(a, scores, first, rows, shift, key, count, seqlen_k):  # type: ignore[no-untyped-def]
    """-inf where a row does not see a key, and in the padding behind the last key."""
    padded = _padded(count, LANES)
    for row in range(rows):
        position = first + row // a.group + shift
        start, stop = _visible(a, position, position, seqlen_k)
        line = scores + row * BLOCK_KEYS * 4
        for i in range(min(max(start - key, 0), count)):
            simd.store_float32(line, i, _NEGATIVE_INFINITY)
        for i in range(max(min(stop - key, count), 0), padded):
            simd.store_float32(line, i, _NEGATIVE_INFINITY)


@inline
def _update_softmax(a, scores, rows, count, best, total, sums):  # type: ignore[no-untyped-def]
    """Turn a block of scores into probabilities, and rescale what came before to the new maximum."""
    padded = _padded(count, LANES)
    width = _padded(a.head_dim_v, LANES)
    for row in range(rows):
        line = scores + row * BLOCK_KEYS * 4
        before = simd.load_float32(best, row)
        now = max(before, simd.row_max(line, padded))
        offset = np.float32(0) if now == _NEGATIVE_INFINITY else now
        added = simd.row_exp2(line, padded, offset)
        kept = np.float32(1)
        if now != before:
            kept = np.float32(0)
            if before != _NEGATIVE_INFINITY:
                kept = np.float32(math.exp((before - now) * _LN_2))
            simd.row_scale(sums + row * width * 4, width, kept)
            simd.store_float32(best, row, now)
        simd.store_float32(total, row, simd.load_float32(total, row) * kept + added)


@inline
def _write_rows(a, b, h, first, count, best, total, sums):  # type: ignore[no-untyped-def]
    """Normalise a finished tile into out and lse, with the sinks in the denominator."""
    width = _padded(a.head_dim_v, LANES)
    descale = _descale(a.v_descale, a.v_descale_row, a.v_descale_head, b, h)
    origin = 0
    if a.cu_seqlens_q != 0:
        origin = np.int64(simd.load_int32(a.cu_seqlens_q, b))
    for row in range(count * a.group):
        i, head = origin + first + row // a.group, h * a.group + row % a.group
        largest, weight = simd.load_float32(best, row), simd.load_float32(total, row)
        kept = np.float32(1)
        if a.sinks != 0:
            sink = np.float32(simd.load_float32(a.sinks, head) * _LOG2_E)
            top = max(largest, sink)
            if top != _NEGATIVE_INFINITY:
                kept = np.float32(math.exp((largest - top) * _LN_2))
                weight = np.float32(weight * kept + math.exp((sink - top) * _LN_2))
            largest = top
        factor = np.float32(0) if weight == 0 else np.float32(kept * descale / weight)
        source = sums + row * width * 4
        at = b * a.out_batch + i * a.out_token + head * a.out_head
        narrow(a.out_dtype, source, a.out + at * element_bytes(a.out_dtype), a.head_dim_v, factor)
        if a.lse != 0:
            lse = _NEGATIVE_INFINITY
            if weight != 0:
                lse = np.float32(largest * _LN_2 + math.log(weight))
            simd.store_float32(a.lse, b * a.lse_batch + head * a.lse_head + i, lse)


@inline
def _merge_slot(a, slot, rows, best, total, sums):  # type: ignore[no-untyped-def]
    """Add a partial result to the one in (best, total, sums)."""
    width = _padded(a.head_dim_v, LANES)
    for row in range(rows):
        mine, other = simd.load_float32(best, row), simd.load_float32(slot, row)
        top = max(mine, other)
        if other == _NEGATIVE_INFINITY:
            continue
        keep = np.float32(0) if mine == _NEGATIVE_INFINITY else math.exp((mine - top) * _LN_2)
        take = np.float32(math.exp((other - top) * _LN_2))
        weight = simd.load_float32(slot + a.tile_rows * 4, row)
        simd.store_float32(best, row, top)
        merged = np.float32(simd.load_float32(total, row) * keep + weight * take)
        simd.store_float32(total, row, merged)
        source = slot + (2 * a.tile_rows + row * width) * 4
        target = sums + row * width * 4
        for i in range(width):
            value = simd.load_float32(target, i) * keep + simd.load_float32(source, i) * take
            simd.store_float32(target, i, np.float32(value))


@inline
def _clear(best, total, sums, rows, width):  # type: ignore[no-untyped-def]
    for row in range(rows):
        simd.store_float32(best, row, _NEGATIVE_INFINITY)
        simd.store_float32(total, row, np.float32(0))
    for i in range(rows * width):
        simd.store_float32(sums, i, np.float32(0))


@inline
def _slot(a, chunk, which):  # type: ignore[no-untyped-def]
    return a.scratch + a.num_threads * a.thread_bytes + (2 * chunk + which) * a.slot_floats * 4


@inline
def _save_slot(a, slot, rows, best, total, sums):  # type: ignore[no-untyped-def]
    width = _padded(a.head_dim_v, LANES)
    for row in range(rows):
        simd.store_float32(slot, row, simd.load_float32(best, row))
        simd.store_float32(slot + a.tile_rows * 4, row, simd.load_float32(total, row))
    for i in range(rows * width):
        simd.store_float32(slot + 2 * a.tile_rows * 4, i, simd.load_float32(sums, i))


@inline
def _finish_split_tiles(a, total, chunks):  # type: ignore[no-untyped-def]
    """Merge and write every tile that more than one chunk worked on."""
    at = 0
    for b in range(a.batch_size):
        seqlen_q, seqlen_k = _lengths(a, b)
        shift = seqlen_k - seqlen_q
        for first in range(0, seqlen_q, a.tile_queries):
            count = min(a.tile_queries, seqlen_q - first)
            start, stop = _visible(a, first + shift, first + count - 1 + shift, seqlen_k)
            blocks = _tile_blocks(a, start, stop)
            for h in range(a.num_kv_heads):
                begin = ((at + 1) * chunks - 1) // total
                end = ((at + blocks) * chunks - 1) // total
                at += blocks
                if begin == end:
                    continue
                slot = _slot(a, begin, 1)
                best, weights = slot, slot + a.tile_rows * 4
                sums = slot + 2 * a.tile_rows * 4
                for chunk in range(begin + 1, end + 1):
                    _merge_slot(a, _slot(a, chunk, 0), count * a.group, best, weights, sums)
                _write_rows(a, b, h, first, count, best, weights, sums)


def _make_products(dtype: str, *, prefetch: bool) -> tuple[Any, Any]:
    """``scores`` and ``accumulate`` over whole tiles, for keys and values of ``dtype`` in memory."""
    scores_1, scores_2, scores_4 = (
        simd.make_scores(dtype, rows, prefetch=prefetch) for rows in (1, 2, 4)
    )
    sums_1, sums_2, sums_4 = (simd.make_accumulate(dtype, rows) for rows in (1, 2, 4))
    name = f"{dtype}_ahead" if prefetch else dtype

    @_specialised(name)
    def scores(queries, rows, keys, ahead_k, ahead_v, count, width, out):  # type: ignore[no-untyped-def]
        if rows == 1:
            count = _padded(count, LANES)
            scores_1(queries, width, keys, ahead_k, ahead_v, count, width, out, BLOCK_KEYS)
        elif rows == 2:
            count = _padded(count, LANES // 2)
            scores_2(queries, width, keys, ahead_k, ahead_v, count, width, out, BLOCK_KEYS)
        else:
            count = _padded(count, LANES // 4)
            for row in range(0, rows, 4):
                source, line = queries + row * width * 4, out + row * BLOCK_KEYS * 4
                scores_4(source, width, keys, ahead_k, ahead_v, count, width, line, BLOCK_KEYS)

    @_specialised(name)
    def accumulate(weights, rows, values, count, width, out):  # type: ignore[no-untyped-def]
        if rows == 1:
            sums_1(weights, BLOCK_KEYS, values, count, width, out, width)
        elif rows == 2:
            sums_2(weights, BLOCK_KEYS, values, count, width, out, width)
        else:
            for row in range(0, rows, 4):
                line, target = weights + row * BLOCK_KEYS * 4, out + row * width * 4
                sums_4(line, BLOCK_KEYS, values, count, width, target, width)

    return scores, accumulate


_SCORES_STAGED, _ACCUMULATE_STAGED = _make_products("float32", prefetch=False)


def _make_run_chunk(dtype: str) -> Any:
    """The work of one chunk, for keys and values of ``dtype``."""
    code = {"float32": 0, "bfloat16": 1, "float16": 2, "float8": FLOAT8_CODE}[dtype]
    size = {0: 4, 1: 2, 2: 2, 3: 1}[code]
    direct = dtype in simd.VECTOR_DTYPES
    scores_direct, accumulate_direct = (
        _make_products(dtype, prefetch=True) if direct else (_SCORES_STAGED, _ACCUMULATE_STAGED)
    )

    @_specialised(dtype)
    def attend(a, b, h, first, count, key_start, key_stop, blocks, scratch):  # type: ignore[no-untyped-def]
        """Online softmax of one tile over its blocks [blocks[0], blocks[1])."""
        width_k, width_v = _padded(a.head_dim, LANES), _padded(a.head_dim_v, LANES)
        live = count * a.group
        rows = live if live <= 2 else _padded(live, 4)
        keys, next_keys = scratch, scratch + BLOCK_KEYS * 8
        values, next_values = next_keys + BLOCK_KEYS * 8, next_keys + BLOCK_KEYS * 16
        best = next_values + BLOCK_KEYS * 8
        total = best + a.tile_rows * 4
        queries = total + a.tile_rows * 4
        sums = queries + a.tile_rows * width_k * 4
        scores = sums + a.tile_rows * width_v * 4
        staged_k = scores + a.tile_rows * BLOCK_KEYS * 4
        staged_v = staged_k + BLOCK_KEYS * width_k * 4
        _load_queries(a, b, h, first, count, rows, queries)
        _clear(best, total, sums, rows, width_v)
        seqlen_q, seqlen_k = _lengths(a, b)
        shift = seqlen_k - seqlen_q
        many = rows > STAGE_ROWS and code != 0
        key = key_start + blocks[0] * BLOCK_KEYS
        end = min(key_start + blocks[1] * BLOCK_KEYS, key_stop)
        following = min(BLOCK_KEYS, end - key)
        if following > 0:
            _fill_addresses(a, b, h, key, following, size, next_keys, next_values)
        while key < end:
            n = following
            keys, next_keys, values, next_values = next_keys, keys, next_values, values
            following = min(BLOCK_KEYS, end - key - n)
            if following > 0:
                _fill_addresses(a, b, h, key + n, following, size, next_keys, next_values)
            if many or not direct or a.head_dim != width_k:
                _stage(a, code, keys, n, a.head_dim, staged_k)
                _SCORES_STAGED(queries, rows, keys, keys, values, n, width_k, scores)
            else:
                ahead_k, ahead_v = (next_keys, next_values) if following > 0 else (keys, values)
                scores_direct(queries, rows, keys, ahead_k, ahead_v, n, width_k, scores)
            if a.softcap > 0:
                cap = np.float32(a.softcap * _LOG2_E)
                for row in range(live):
                    simd.row_softcap(scores + row * BLOCK_KEYS * 4, _padded(n, LANES), cap)
            _mask_scores(a, scores, first, live, shift, key, n, seqlen_k)
            _update_softmax(a, scores, live, n, best, total, sums)
            if many or not direct or a.head_dim_v != width_v:
                _stage(a, code, values, n, a.head_dim_v, staged_v)
                _ACCUMULATE_STAGED(scores, rows, values, n, width_v, sums)
            else:
                accumulate_direct(scores, rows, values, n, width_v, sums)
            key += n
        return live, best, total, sums

    @_specialised(dtype)
    def run_chunk(a, total, chunks, chunk, scratch):  # type: ignore[no-untyped-def]
        begin, end = total * chunk // chunks, total * (chunk + 1) // chunks
        at = 0
        for b in range(a.batch_size):
            seqlen_q, seqlen_k = _lengths(a, b)
            shift = seqlen_k - seqlen_q
            for first in range(0, seqlen_q, a.tile_queries):
                count = min(a.tile_queries, seqlen_q - first)
                start, stop = _visible(a, first + shift, first + count - 1 + shift, seqlen_k)
                blocks = _tile_blocks(a, start, stop)
                if at + blocks * a.num_kv_heads <= begin:
                    at += blocks * a.num_kv_heads
                    continue
                for h in range(a.num_kv_heads):
                    mine = max(begin - at, 0), min(end - at, blocks)
                    at += blocks
                    if mine[0] >= mine[1]:
                        continue
                    rows, best, weights, sums = attend(
                        a, b, h, first, count, start, stop, mine, scratch
                    )
                    if mine[0] == 0 and mine[1] == blocks:
                        _write_rows(a, b, h, first, count, best, weights, sums)
                    else:
                        slot = _slot(a, chunk, 1 if mine[0] == 0 else 0)
                        _save_slot(a, slot, rows, best, weights, sums)
                if at >= end:
                    return

    return run_chunk


def _make_drive(dtype: str) -> Any:
    """What each thread does: take the next chunk until none is left; the last one done merges."""
    run_chunk = _make_run_chunk(dtype)

    @_specialised(dtype)
    def drive(arguments):  # type: ignore[no-untyped-def]
        a = carray(arguments, (1,))[0]
        total = _total_blocks(a)
        if total == 0:
            return
        chunks = _num_chunks(a, total)
        counters = a.arguments
        scratch = a.scratch + simd.atomic_increment(counters + _NEXT_THREAD) * a.thread_bytes
        while True:
            chunk = simd.atomic_increment(counters + _NEXT_CHUNK)
            if chunk >= chunks:
                return
            run_chunk(a, total, chunks, chunk, scratch)
            if simd.atomic_increment(counters + _CHUNKS_DONE) == chunks - 1:
                _finish_split_tiles(a, total, chunks)

    return drive


_DRIVE_FLOAT32 = _make_drive("float32")
_DRIVE_BFLOAT16 = _make_drive("bfloat16")
_DRIVE_FLOAT16 = _make_drive("float16")
_DRIVE_FLOAT8 = _make_drive("float8")


def _entries(fingerprint: int) -> dict[str, Any]:
    """Entry points by the dtype of keys and values.

    ``fingerprint`` stands for the sources that numba's on-disk cache does not look at: as a closure
    variable it is part of the cache key.
    """

    def float32(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:
            _DRIVE_FLOAT32(arguments)

    def bfloat16(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:
            _DRIVE_BFLOAT16(arguments)

    def float16(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:
            _DRIVE_FLOAT16(arguments)

    def float8(arguments):  # type: ignore[no-untyped-def]
        if fingerprint != 0:
            _DRIVE_FLOAT8(arguments)

    return {entry.__name__: entry for entry in (float32, bfloat16, float16, float8)}


@cache
def _compiled(dtype: str) -> tuple[Any, int]:
    """The compiled entry point (kept alive) and its address."""
    entry = _entries(source_fingerprint())[dtype]
    signature = types.void(types.CPointer(from_dtype(_ARGUMENTS)))
    compiled = compile_entry(entry, signature)
    return compiled, compiled.address


@cache
def _float8_table(dtype: torch.dtype) -> Tensor:
    """The 256 values of a float8 dtype as float32."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


def _kv_dtype_name(dtype: torch.dtype) -> str:
    return "float8" if dtype in FLOAT8_DTYPES else str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()  # type: ignore[return-value]


def _longest(k: Tensor, page_table: Tensor | None) -> int:
    """Rows of keys that a sequence has where no length is given; ragged ones always have lengths."""
    return k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]


class AttentionCall:
    """Attention over ragged, dense or paged keys and values, to run once or for many layers of a model.

    A run fills ``out`` and ``lse``. The call keeps alive what its arguments point to, and serves one
    thread of the program at a time.

    Arguments are taken as checked: nothing here looks at values or raises anything about them.

    Args:
        q: (B, Sq, Hq, D), or (total_q, Hq, D) with ``cu_seqlens_q``; float32, bfloat16, float16 or
            float8. Last stride 1, as for every tensor here; other strides are free.
        k: (B, Sk, Hkv, D); (total_k, Hkv, D) with ``cu_seqlens_k``; (num_pages, page_size, Hkv, D)
            with ``page_table``. float32, bfloat16, float16 or float8, any mix with the dtype of
            ``q``.
        v: like k with head dim Dv.
        out: like q with head dim Dv; float32, bfloat16 or float16. Rows that belong to no query are
            left alone.
        lse: float32 (B, Hq, Sq) or (Hq, total_q), last stride 1: natural logarithm, the sinks
            included.
        softmax_scale: factor on the dot products.
        cu_seqlens_q: (B + 1,) int32.
        seqused_q: (B,) int32, queries in use of each sequence.
        cu_seqlens_k: (B + 1,) int32, for ragged keys.
        seqlens_k: (B,) int32, where each sequence's keys end, counted from the start of its row (so
            ``leftpad_k`` included). None: every key there is.
        leftpad_k: (B,) int32, rows to skip at the start.
        cache_batch_idx: (B,) int32, row of the dense cache or of the page table for each sequence.
        page_table: (rows, max_pages) int32. Entries outside the keys in use may hold anything.
        window_left, window_right: keys seen before and after a query's own position; None:
            unbounded. Causal attention is ``window_right=0``.
        attention_chunk: queries see keys of their own chunk of this many positions only; 0: off.
        softcap: cap of the scores, cap * tanh(score / cap); 0: off.
        sinks: (Hq,) float32, one more logit per head in the denominator.
        q_descale, k_descale, v_descale: (B, Hkv) float32 with any strides, factors of float8
            values.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        *,
        softmax_scale: float,
        cu_seqlens_q: Tensor | None = None,
        seqused_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqlens_k: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        page_table: Tensor | None = None,
        window_left: int | None = None,
        window_right: int | None = None,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
    ) -> None:
        self._function = _compiled(_kv_dtype_name(k.dtype))[1]
        num_q_heads, head_dim = q.shape[-2:]
        num_kv_heads, head_dim_v = v.shape[-2:]
        group = num_q_heads // num_kv_heads
        ragged_q, ragged_k = cu_seqlens_q is not None, cu_seqlens_k is not None
        batch_size = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
        threads = thread_count()
        seqlen_q = q.shape[0] if ragged_q else q.shape[1]
        tile_queries = min(max(TILE_ROWS // group, 1), max(seqlen_q, 1))
        tile_rows = -(-tile_queries * group // 4) * 4
        width, width_v = -(-head_dim // LANES) * LANES, -(-head_dim_v // LANES) * LANES
        thread_bytes = 32 * BLOCK_KEYS + 4 * (
            tile_rows * (2 + width + width_v + BLOCK_KEYS) + BLOCK_KEYS * (width + width_v)
        )
        slot_floats = tile_rows * (2 + width_v)
        slots = 2 * CHUNKS_PER_THREAD * threads
        scratch_bytes = threads * thread_bytes + 4 * slots * slot_floats
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device="cpu")
        q_strides, out_strides = q.stride(), out.stride()
        k_strides, v_strides = k.stride(), v.stride()
        float8 = k.dtype if k.dtype in FLOAT8_DTYPES else q.dtype
        table = _float8_table(float8) if float8 in FLOAT8_DTYPES else None
        arguments = ctypes.create_string_buffer(_PACKED.size)
        address = ctypes.addressof(arguments)
        _PACKED.pack_into(
            arguments,
            0,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            _address(lse),
            _address(cu_seqlens_q),
            _address(seqused_q),
            _address(cu_seqlens_k),
            _address(seqlens_k),
            _address(leftpad_k),
            _address(cache_batch_idx),
            _address(page_table),
            _address(sinks),
            _address(q_descale),
            _address(k_descale),
            _address(v_descale),
            _address(table),
            scratch.data_ptr(),
            address,
            batch_size,
            num_kv_heads,
            group,
            head_dim,
            head_dim_v,
            seqlen_q,
            _longest(k, page_table),
            0 if ragged_k else k.shape[1],
            _UNBOUNDED if window_left is None else window_left,
            _UNBOUNDED if window_right is None else window_right,
            attention_chunk,
            tile_queries,
            tile_rows,
            threads,
            DTYPE_CODES.get(q.dtype, FLOAT8_CODE),
            DTYPE_CODES[out.dtype],
            0 if ragged_q else q_strides[0],
            *q_strides[-3:-1],
            0 if ragged_q else out_strides[0],
            *out_strides[-3:-1],
            *(
                lse.stride()[-3:-1]
                if lse is not None and not ragged_q
                else (0, lse.stride(0) if lse is not None else 0)
            ),
            0 if ragged_k else k_strides[0],
            *k_strides[-3:-1],
            0 if ragged_k else v_strides[0],
            *v_strides[-3:-1],
            0 if page_table is None else page_table.stride(0),
            *_strides(q_descale),
            *_strides(k_descale),
            *_strides(v_descale),
            thread_bytes,
            slot_floats,
            0,
            0,
            0,
            softmax_scale,
            softcap,
        )
        self._arguments, self._address, self._threads = arguments, address, threads
        self._alive = (
            *(q, k, v, out, lse, cu_seqlens_q, seqused_q, cu_seqlens_k, seqlens_k, leftpad_k),
            *(cache_batch_idx, page_table, sinks, q_descale, k_descale, v_descale, table, scratch),
        )

    def run(self) -> None:
        """Compute what it was built from."""
        _COUNTERS.pack_into(self._arguments, _NEXT_THREAD, 0, 0, 0)
        run_on_threads(self._function, self._address, self._threads)

    def run_with(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor | None = None
    ) -> None:
        """Compute with other tensors of the same shapes, strides and dtypes, and no LSE."""
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0
        _TENSORS.pack_into(self._arguments, 0, *addresses)
        struct.pack_into("q", self._arguments, _SINKS, _address(sinks))
        self.run()
