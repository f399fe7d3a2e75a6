"""Keys and values in float8, with a scale for every block of keys of a head, in one pass over them.

A scale per tensor needs its largest magnitude before the first value can be rounded: the tensor is read
twice. A block of keys of one head fits into registers, so its magnitude is found where it is rounded. A
sequence's results then depend on nothing else in the batch, and no block loses precision to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, next_power_of_2, tl, triton
from headway.kernels.portable.operands import bits, device_of
from headway.kernels.portable.quantise import interleaved, to_float8

#: Least scale of a block: 1 over it is finite, and so are its ratios to the scales of other blocks.
SMALLEST_SCALE = tl.constexpr(2.0**-80)
#: float32 about a block of keys: its scale, its values' scale, 1 over that, and one unused.
RECORD = tl.constexpr(4)


@jit
def largest_of(words, INFINITE: tl.constexpr):
    """A number that grows with the largest finite magnitude of pairs of 16-bit floats.

    Their order is that of their bits. Here these begin so high that what is not finite becomes negative.
    Pairs stay packed: what bounds the speed is how many blocks' loads registers hold.
    """
    START: tl.constexpr = (0x8000 - INFINITE) << 16
    low = ((words << 16) & 0x7FFF0000) + START
    high = (words & 0x7FFF0000) + START
    return tl.maximum(tl.max(tl.max(tl.maximum(low, high), 1), 0), START)


@jit
def scale_of(largest, limit, dtype: tl.constexpr, INFINITE: tl.constexpr):
    """What puts a magnitude at the largest value of the format; 1 for 0."""
    bits_of_it = (largest >> 16) - (0x8000 - INFINITE)
    size = bits_of_it.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.where(size > 0.0, tl.maximum(size / limit, SMALLEST_SCALE), 1.0)


@jit
def unpacked(words, dtype: tl.constexpr):
    """(rows, n) pairs as (rows, 2 n) 16-bit floats."""
    pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    return tl.reshape(pairs, [words.shape[0], 2 * words.shape[1]]).to(dtype, bitcast=True)


@jit
def rounded(x, scale, dtype: tl.constexpr, limit, SATURATES: tl.constexpr):
    """Scaled, as float8; SATURATES: the device's own conversion keeps to the format's range."""
    x = x.to(tl.float32) * (1.0 / scale)
    if SATURATES:
        return x.to(dtype)
    else:
        return to_float8(x, dtype, limit)


@jit
def quantise_keys(
    k_ptr,
    rest_ptr,
    out_ptr,
    record_ptr,
    scale_ptr,
    at_scale,
    limit,
    rows,
    n_inside,
    stride_row,
    stride_rest_row,
    stride_out_row,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    FROM: tl.constexpr,
    INFINITE: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """A block of keys of a head: D1 columns, a power of two, and D2 more, which may lie elsewhere."""
    inside = n_inside[:, None]
    pair = tl.arange(0, D1 // 2)[None, :]
    rest_pair = tl.arange(0, BLOCK_D2 // 2)[None, :]
    rest_inside = inside & (rest_pair < D2 // 2)
    from_row = k_ptr + rows[:, None] * stride_row
    from_rest = rest_ptr + rows[:, None] * stride_rest_row
    words = tl.load(from_row + pair, mask=inside, other=0)
    rest = tl.load(from_rest + rest_pair, mask=rest_inside, other=0)
    if scale_ptr is None:
        largest = tl.maximum(largest_of(words, INFINITE), largest_of(rest, INFINITE))
        scale = scale_of(largest, limit, FROM, INFINITE)
    else:
        scale = tl.load(scale_ptr + at_scale)
    if record_ptr is not None:
        tl.store(record_ptr, scale)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    to_row = out_ptr + rows[:, None] * stride_out_row
    col = tl.arange(0, D1)[None, :]
    tl.store(
        to_row + col, rounded(unpacked(words, FROM), scale, dtype, limit, SATURATES), mask=inside
    )
    col = tl.arange(0, BLOCK_D2)[None, :]
    tl.store(
        to_row + D1 + col,
        rounded(unpacked(rest, FROM), scale, dtype, limit, SATURATES),
        mask=inside & (col < D2),
    )


@jit
def quantise_values(
    v_ptr,
    out_ptr,
    record_ptr,
    scale_ptr,
    at_scale,
    limit,
    rows,
    n_inside,
    place,
    stride_row,
    stride_out_dim,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FROM: tl.constexpr,
    INFINITE: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """A block of values of a head, transposed; zeros behind the last key."""
    pair = tl.arange(0, BLOCK_DV // 2)[None, :]
    inside = n_inside[:, None] & (pair < DV // 2)
    words = tl.load(v_ptr + rows[:, None] * stride_row + pair, mask=inside, other=0)
    if scale_ptr is None:
        scale = scale_of(largest_of(words, INFINITE), limit, FROM, INFINITE)
    else:
        scale = tl.load(scale_ptr + at_scale)
    if record_ptr is not None:
        tl.store(record_ptr + 1, scale)
        tl.store(record_ptr + 2, 1.0 / scale)
    x = tl.trans(unpacked(words, FROM))
    x = rounded(x, scale, out_ptr.dtype.element_ty, limit, SATURATES)
    dim = tl.arange(0, BLOCK_DV)[:, None]
    at = dim.to(tl.int64) * stride_out_dim + place[None, :]
    tl.store(out_ptr + at, x, mask=dim < DV)


@triton.jit(do_not_specialize_on_alignment=["kv_indptr", "value_indptr"])
def quantise_blocks_kernel(
    k_ptr,
    rest_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    records_ptr,
    k_scale,
    v_scale,
    limit,
    kv_indptr,
    value_indptr,
    stride_k_row,
    stride_k_head,
    stride_rest_row,
    stride_rest_head,
    stride_v_row,
    stride_v_head,
    stride_keys_row,
    stride_keys_head,
    stride_values_head,
    stride_values_dim,
    stride_records_head,
    stride_k_scale,
    stride_v_scale,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FROM: tl.constexpr,
    INFINITE: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """Programs (2 x heads, blocks of the longest request, requests): of keys and of values by turns."""
    head = (tl.program_id(0) // 2).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    request = tl.program_id(2)
    first = tl.load(kv_indptr + request)
    length = tl.load(kv_indptr + request + 1) - first
    if start >= length:
        return
    place = tl.multiple_of(tl.load(value_indptr + request) + start, BLOCK_N)
    record_ptr = records_ptr
    if records_ptr is not None:
        record_ptr += head * stride_records_head + place // BLOCK_N * RECORD
    if tl.program_id(0) % 2 == 0:
        n = start + tl.arange(0, BLOCK_N)
        quantise_keys(
            k_ptr + head * stride_k_head,
            rest_ptr + head * stride_rest_head,
            keys_ptr + head * stride_keys_head,
            record_ptr,
            k_scale,
            head * stride_k_scale,
            limit,
            (first + n).to(tl.int64),
            n < length,
            stride_k_row,
            stride_rest_row,
            stride_keys_row,
            D1,
            D2,
            BLOCK_D2,
            FROM,
            INFINITE,
            SATURATES,
        )
    else:
        # Rows are read in the order in which they are stored, so that stores are contiguous.
        n = start + interleaved(tl.arange(0, BLOCK_N))
        quantise_values(
            v_ptr + head * stride_v_head,
            values_ptr + head * stride_values_head,
            record_ptr,
            v_scale,
            head * stride_v_scale,
            limit,
            (first + n).to(tl.int64),
            n < length,
            place + tl.arange(0, BLOCK_N),
            stride_v_row,
            stride_values_dim,
            DV,
            BLOCK_DV,
            FROM,
            INFINITE,
            SATURATES,
        )


def takes(k: Tensor, v: Tensor, k_rope: Tensor | None = None) -> bool:
    """Whether :func:`quantise_blocks` takes such tensors: it reads two floats of 16 bits as a word."""
    if k_rope is not None and k.shape[-1].bit_count() != 1:
        return False
    return all(
        x.element_size() == 2 and not any(n % 2 for n in (*x.stride()[:-1], x.storage_offset()))
        for x in (k, v, *(() if k_rope is None else (k_rope,)))
    )


def quantise_blocks(
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    kv_indptr: Tensor,
    value_indptr: Tensor,
    padded_keys: int,
    max_seqlen_k: int,
    dtype: torch.dtype,
    *,
    k_rope: Tensor | None = None,
    block_n: int = 128,
    num_warps: int = 8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of a ragged batch in float8, values transposed, in one launch.

    Args:
        k: (total_k, Hkv, D), v: (total_k, Hkv, Dv), bfloat16 or float16, as :func:`takes` says.
        k_rope: (total_k, 1 or Hkv, R), columns of the keys behind k's, whose number is then a power of two.
        scales: float32 (1,) or (Hkv,) of k and of v; None: each block's own, from its largest finite
            magnitude.
        kv_indptr, value_indptr: (B + 1) int32, where requests begin in k and v, and in the transposed
            values, multiples of ``block_n``; ``padded_keys`` is the last of these.

    Returns:
        keys (total_k, Hkv, D or D + R); values (Hkv, Dv, padded_keys) as :func:`.quantise.transpose_values`
        orders them; and unless both scales are given, records (Hkv, padded_keys / block_n, 4) float32: the
        scale of a block's keys, that of its values, and 1 over the latter.
    """
    total, heads, width = k.shape
    if k_rope is None:
        d1 = next_power_of_2(width) // 2
        k, rest = k[..., :d1], k[..., d1:]
    else:
        d1, rest = width, k_rope.expand(-1, heads, -1)
    d2, dv = rest.shape[-1], v.shape[-1]
    keys = torch.empty(total, heads, d1 + d2, dtype=dtype, device=k.device)
    values = torch.empty(heads, dv, padded_keys, dtype=dtype, device=k.device)
    records = None
    if None in scales:
        shape = (heads, padded_keys // block_n, RECORD.value)
        records = torch.empty(shape, dtype=torch.float32, device=k.device)
    if total == 0:
        return keys, values, records
    device = device_of(k.device)
    native = device.converts_float8
    quantise_blocks_kernel[(2 * heads, max(cdiv(max_seqlen_k, block_n), 1), len(kv_indptr) - 1)](
        *(x.view(torch.int32) for x in (k, rest, v)),
        bits(keys, native),
        bits(values, native),
        records,
        *scales,
        torch.finfo(dtype).max,
        kv_indptr,
        value_indptr,
        *(step // 2 for x in (k, rest, v) for step in x.stride()[:-1]),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        0 if records is None else records.stride(0),
        *(x.stride(0) if x is not None and x.numel() > 1 else 0 for x in scales),
        D1=d1,
        D2=d2,
        BLOCK_D2=next_power_of_2(d2),
        DV=dv,
        BLOCK_DV=next_power_of_2(dv),
        BLOCK_N=block_n,
        FROM=tl.float16 if k.dtype == torch.float16 else tl.bfloat16,
        INFINITE=0x7C00 if k.dtype == torch.float16 else 0x7F80,
        SATURATES=device.arch.startswith("sm") and device.converts_float8,
        num_warps=num_warps,
    )
    return keys, values, records
