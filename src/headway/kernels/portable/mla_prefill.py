"""Persistent prefill attention: every program is a compute unit that walks its list of work.

The lists are those of :mod:`headway.persistent`. q and k may be wider than v (192/128 in latent
attention after its up-projection); bfloat16, float16, or float8 with a scale per tensor or KV head.

In float8 the weights are multiplied in float8 too: a row's largest is 256, which uses the format's
range, and the row's sum carries the same factor. Hopper multiplies float8 only from operands whose
reduced dimension is contiguous, so values come transposed (:func:`..quantise.transpose_values`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.errors import UnsupportedError
from headway.kernels._triton import cdiv, jit, next_power_of_2, tl
from headway.kernels.portable.mainloop import load_rows
from headway.kernels.portable.numeric import LN2, LOG2E, cast, dot, widen
from headway.kernels.portable.operands import Device, bits, device_of, knows_float8
from headway.persistent import DeviceWork
from headway.problem import FLOAT8_DTYPES

#: log2 of the largest weight in float8.
WEIGHT_BITS = tl.constexpr(8.0)


@dataclass(frozen=True)
class PrefillTile:
    """Rows and keys of a tile, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: Tiles by (architecture, float8): large ones that compile without spilled registers at 192/128.
TILES = {
    ("sm80", True): PrefillTile(128, 32, 8, 2),
    ("sm80", False): PrefillTile(128, 32, 8, 2),
    ("sm90", True): PrefillTile(128, 128, 8, 2),
    ("sm90", False): PrefillTile(128, 64, 8, 3),
    ("sm100", True): PrefillTile(128, 64, 8, 2),
    ("sm100", False): PrefillTile(64, 32, 8, 2),
    ("sm120", True): PrefillTile(128, 64, 8, 2),
    ("sm120", False): PrefillTile(128, 32, 8, 2),
    ("gfx942", True): PrefillTile(64, 32, 4, 2),
    ("gfx942", False): PrefillTile(128, 32, 8, 2),
    ("gfx950", True): PrefillTile(128, 64, 8, 2),
    ("gfx950", False): PrefillTile(128, 32, 8, 2),
    ("gfx1100", True): PrefillTile(32, 32, 16, 1),
    ("gfx1100", False): PrefillTile(32, 32, 16, 1),
    ("interpreter", True): PrefillTile(32, 32, 4, 1),
    ("interpreter", False): PrefillTile(32, 32, 4, 1),
}


def choose_tile(device: Device, float8: bool) -> PrefillTile:
    """The tile of a device, or of the plainest one of its maker where it is not in the table."""
    known = (device.arch, float8)
    if known in TILES:
        return TILES[known]
    return TILES["gfx942" if device.arch.startswith("gfx") else "sm80", float8]


@jit
def key_offsets(
    start,
    n,
    first,
    inside,
    pages,
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Element offsets of the keys n = start.. of a request, as one of the tile and one of each key.

    Ragged where PAGE_SIZE is 0: only the tile's needs 64 bits, those of keys stay the same along the loop.
    """
    if PAGE_SIZE == 0:
        return (first + start).to(tl.int64) * stride_row, tl.arange(0, BLOCK_N) * stride_row
    else:
        page = tl.load(pages + first + n // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        return 0, page * stride_page + (n % PAGE_SIZE).to(tl.int64) * stride_row


@jit
def interleave(x):
    """Columns in the order of transposed values (:func:`..quantise.interleaved`).

    On Hopper this takes no instruction: it renames the scores' registers to those that float8 weights
    must be in, which without it costs shuffles.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [ROWS, COLS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(pairs, [ROWS, COLS])


@jit
def load_values(
    v_ptr,
    offsets,
    inside,
    v_first,
    start,
    stride_v_dim,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Values (BLOCK_N, BLOCK_DV) of a tile of keys. Transposed ones are padded with zeros: no masks."""
    if TRANSPOSED:
        d = tl.arange(0, BLOCK_DV)
        n = tl.arange(0, BLOCK_N)
        place = tl.multiple_of(v_first + start, BLOCK_N)
        ptrs = v_ptr + place + n[None, :]
        ptrs += d[:, None] * stride_v_dim  # of one head: the launcher keeps it within 32 bits
        if DV == BLOCK_DV:
            return tl.trans(tl.load(ptrs))
        else:
            ZERO: tl.constexpr = 0 if v_ptr.dtype.element_ty.is_int() else 0.0
            return tl.trans(tl.load(ptrs, mask=(d < DV)[:, None], other=ZERO))
    else:
        return load_rows(v_ptr, offsets, inside, DV, BLOCK_DV, MASKED)


@jit
def attend_keys(
    acc,
    row_sum,
    row_max,
    q1,
    q2,
    pos,
    begin,
    end,
    limit,
    first,
    v_first,
    k_ptr,
    v_ptr,
    pages,
    stride_k_page,
    stride_k_row,
    stride_v_page,
    stride_v_row,
    stride_v_dim,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8_DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take in keys [begin, end); MASKED: not those from ``limit`` on, or behind a row's position."""
    for start in tl.range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < limit
        tile, offsets = key_offsets(
            start, n, first, inside, pages, stride_k_page, stride_k_row, PAGE_SIZE, BLOCK_N
        )
        k1 = load_rows(k_ptr + tile, offsets, inside, D1, D1, MASKED)
        if not FP8_DOT:
            k1 = widen(k1, tl.float16)
        scores = tl.zeros([q1.shape[0], BLOCK_N], dtype=tl.float32)
        scores = dot(q1, tl.trans(k1), scores)
        if D2 > 0:
            k2 = load_rows(k_ptr + tile + D1, offsets, inside, D2, BLOCK_D2, MASKED)
            if not FP8_DOT:
                k2 = widen(k2, tl.float16)
            scores = dot(q2, tl.trans(k2), scores)
        if MASKED:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (n[None, :] <= pos[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        shift = new_max
        if MASKED:  # rows may have seen nothing yet
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(row_max - shift)
        if FP8_DOT:
            p = tl.exp2(scores * scale - (shift - WEIGHT_BITS)[:, None])
        else:
            p = tl.exp2(scores * scale - shift[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if not TRANSPOSED:
            tile, offsets = key_offsets(
                start, n, first, inside, pages, stride_v_page, stride_v_row, PAGE_SIZE, BLOCK_N
            )
        else:
            tile = 0
        v = load_values(
            v_ptr + tile,
            offsets,
            inside,
            v_first,
            start,
            stride_v_dim,
            DV,
            BLOCK_DV,
            BLOCK_N,
            TRANSPOSED,
            MASKED,
        )
        if not FP8_DOT:
            v = widen(v, tl.float16)
        weights = cast(p, v.dtype)
        if TRANSPOSED:
            weights = interleave(weights)
        if FP8_DOT:
            # Hopper's tensor cores keep some 14 bits of a float8 sum: a block's is added in float32.
            acc = tl.dot(weights, v, acc, max_num_imprecise_acc=BLOCK_N)
        else:
            acc = dot(weights, v, acc)
        row_max = new_max
    return acc, row_sum, row_max


@jit
def store_rows(ptr, x, offsets, in_use, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The first WIDTH columns of (rows, BLOCK_WIDTH) to rows at ``offsets``, in the pointer's dtype."""
    cols = tl.arange(0, BLOCK_WIDTH)
    mask = in_use[:, None] & (cols < WIDTH)[None, :]
    tl.store(ptr + offsets[:, None] + cols[None, :], cast(x, ptr.dtype.element_ty), mask=mask)


@jit
def load_scale(ptr, head, stride):
    """One float32 scale, or 1 where there is none."""
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr + head * stride)


@jit
def mla_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    partial_out,
    partial_lse,
    work_indptr,
    work_info,
    qo_indptr,
    kv_indptr,
    context_lens,
    value_indptr,
    pages,
    q_scale,
    k_scale,
    v_scale,
    softmax_scale,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_v_dim,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    stride_partial_row,
    stride_partial_head,
    stride_partial_lse_row,
    stride_q_scale,
    stride_k_scale,
    stride_v_scale,
    HEADS_PER_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8_DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PER_PAGE: tl.constexpr = PAGE_SIZE if PAGE_SIZE > 0 else 1
    cu = tl.program_id(0)
    for item in range(tl.load(work_indptr + cu), tl.load(work_indptr + cu + 1)):
        fields = work_info + item * 8
        b = tl.load(fields)
        partial_row = tl.load(fields + 1)
        q_start = tl.load(fields + 2)
        q_end = tl.load(fields + 3)
        heads = tl.load(fields + 7)
        first_head = heads & 0xFFFF
        tiles = tl.cdiv(q_end - q_start, BLOCK_M)
        first = tl.load(kv_indptr + b)
        length = tl.load(context_lens + b)
        lo = (tl.load(fields + 4) - first) * PER_PAGE
        hi = tl.minimum((tl.load(fields + 5) - first) * PER_PAGE, length)
        q_first = tl.load(qo_indptr + b)
        q_shift = length - (tl.load(qo_indptr + b + 1) - q_first) - q_first
        v_first = 0
        if TRANSPOSED:
            v_first = tl.load(value_indptr + b)
        for piece in range(((heads >> 16) - first_head) * tiles):
            head = (first_head + piece // tiles).to(tl.int64)
            kv_head = head // HEADS_PER_KV
            tile_start = q_start + piece % tiles * BLOCK_M
            rows = tile_start + tl.arange(0, BLOCK_M)
            in_use = rows < q_end
            pos = rows + q_shift
            row = rows.to(tl.int64)
            offsets = row * stride_q_row + head * stride_q_head
            q1 = load_rows(q_ptr, offsets, in_use, D1, D1, True)
            q2 = q1
            if D2 > 0:
                q2 = load_rows(q_ptr + D1, offsets, in_use, D2, BLOCK_D2, True)
            if not FP8_DOT:
                q1 = widen(q1, tl.float16)
                q2 = widen(q2, tl.float16)
            scale = softmax_scale * load_scale(q_scale, kv_head, stride_q_scale)
            scale *= load_scale(k_scale, kv_head, stride_k_scale)
            end = hi
            full = hi
            if CAUSAL:
                last = tl.minimum(tile_start + BLOCK_M, q_end) - 1 + q_shift
                end = tl.minimum(hi, last + 1)
                full = tl.minimum(hi, tile_start + q_shift + 1)
            full = lo + tl.maximum(full - lo, 0) // BLOCK_N * BLOCK_N
            acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            for MASKED in tl.static_range(2):
                if MASKED:
                    begin_at = full
                    end_at = end
                else:
                    begin_at = lo
                    end_at = full
                acc, row_sum, row_max = attend_keys(
                    acc,
                    row_sum,
                    row_max,
                    q1,
                    q2,
                    pos,
                    begin_at,
                    end_at,
                    hi,
                    first,
                    v_first,
                    k_ptr + kv_head * stride_k_head,
                    v_ptr + kv_head * stride_v_head,
                    pages,
                    stride_k_page,
                    stride_k_row,
                    stride_v_page,
                    stride_v_row,
                    stride_v_dim,
                    scale,
                    MASKED,
                    CAUSAL,
                    FP8_DOT,
                    TRANSPOSED,
                    PAGE_SIZE,
                    D1,
                    D2,
                    DV,
                    BLOCK_D2,
                    BLOCK_DV,
                    BLOCK_N,
                )
            empty = row_sum == 0.0
            factor = load_scale(v_scale, kv_head, stride_v_scale)
            out = acc * tl.where(empty, 0.0, factor / row_sum)[:, None]
            bits_of_weights: tl.constexpr = WEIGHT_BITS if FP8_DOT else 0.0
            lse = (row_max + tl.log2(row_sum) - bits_of_weights) * LN2
            lse = tl.where(empty, float("-inf"), lse)
            if partial_row < 0:
                store_rows(
                    out_ptr + head * stride_out_head,
                    out,
                    row * stride_out_row,
                    in_use,
                    DV,
                    BLOCK_DV,
                )
                if lse_ptr is not None:
                    at = row * stride_lse_row + head * stride_lse_head
                    tl.store(lse_ptr + at, lse, mask=in_use)
            else:
                part = row - q_start + partial_row
                store_rows(
                    partial_out + head * stride_partial_head,
                    out,
                    part * stride_partial_row,
                    in_use,
                    DV,
                    BLOCK_DV,
                )
                tl.store(partial_lse + part * stride_partial_lse_row + head, lse, mask=in_use)


@jit
def mla_reduce_kernel(
    partial_out,
    partial_lse,
    out_ptr,
    lse_ptr,
    reduce_indptr,
    reduce_final_map,
    reduce_partial_map,
    stride_partial_row,
    stride_partial_head,
    stride_partial_lse_row,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merge the parts of one group's rows. Parts without keys, whatever marks them, weigh nothing."""
    group = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    part_begin = tl.load(reduce_indptr + group)
    part_end = tl.load(reduce_indptr + group + 1)
    if part_begin == part_end:
        return
    q_start = tl.load(reduce_final_map + group * 2)
    q_end = tl.load(reduce_final_map + group * 2 + 1)
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_use = r < q_end - q_start
    cols = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for part in range(part_begin, part_end):
        row = (tl.load(reduce_partial_map + part) + r).to(tl.int64)
        lse = tl.load(
            partial_lse + row * stride_partial_lse_row + head, mask=in_use, other=float("-inf")
        )
        lse = tl.where(lse < float("inf"), lse, float("-inf"))  # also what is NaN
        new_max = tl.maximum(row_max, lse)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - shift) * LOG2E)
        weight = tl.exp2((lse - shift) * LOG2E)
        at = row * stride_partial_row + head * stride_partial_head
        seen = (weight > 0.0)[:, None] & (cols < DV)[None, :]
        values = tl.load(partial_out + at[:, None] + cols[None, :], mask=seen, other=0.0)
        acc = acc * alpha[:, None] + values * weight[:, None]
        total = total * alpha + weight
        row_max = new_max
    empty = total == 0.0
    out = acc * tl.where(empty, 0.0, 1.0 / total)[:, None]
    row = (q_start + r).to(tl.int64)
    store_rows(out_ptr + head * stride_out_head, out, row * stride_out_row, in_use, DV, BLOCK_DV)
    if lse_ptr is not None:
        lse = tl.where(empty, float("-inf"), row_max + tl.log2(total) * LN2)
        tl.store(lse_ptr + row * stride_lse_row + head * stride_lse_head, lse, mask=in_use)


@dataclass(frozen=True)
class Scales:
    """float32 factors of float8 inputs, (1,) or (Hkv,); None: 1."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("q", "k", "v"):
            scale = getattr(self, name)
            found[f"{name}_scale"] = scale
            many = scale is not None and scale.numel() > 1
            found[f"stride_{name}_scale"] = scale.stride(0) if many else 0
        return found


def mla_prefill(
    work: DeviceWork,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float,
    scales: Scales = Scales(),
    kv_page_indices: Tensor | None = None,
    v_transposed: bool = False,
    tile: PrefillTile | None = None,
) -> None:
    """Execute a work list and merge what was split; ``out`` and ``lse`` are filled.

    Args:
        q: (total_q, Hq, D).
        k: ragged (total_k, Hkv, D), or (pages, page_size, Hkv, D) with kv_page_indices.
        v: like k, (.., Dv); with ``v_transposed`` (Hkv, Dv, padded keys) at ``work.value_indptr``.
        out: (total_q, Hq, Dv). lse: (total_q, Hq) with any strides, or None.
        tile: default by device. With ``v_transposed`` its block_n divides the plan's unit of keys.
    """
    _check_format(q)
    heads, dv = q.shape[1], out.shape[-1]
    partial_out, partial_lse = work.partial_buffers(heads, dv)
    _attend(
        work,
        (q, k, v),
        (out, lse, partial_out, partial_lse),
        softmax_scale,
        scales,
        kv_page_indices,
        v_transposed,
        tile,
    )
    if work.num_groups > 0:
        mla_reduce(work, partial_out, partial_lse, out, lse)


def _check_format(q: Tensor) -> None:
    device = device_of(q.device)
    if q.dtype in FLOAT8_DTYPES and not knows_float8(q.dtype, device):
        given = str(q.dtype).removeprefix("torch.")
        raise UnsupportedError(f"{given} on {device.arch}: takes float8_e4m3fn, or wider inputs")


def _attend(
    work: DeviceWork,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor | None, Tensor, Tensor],
    softmax_scale: float,
    scales: Scales,
    pages: Tensor | None,
    v_transposed: bool,
    tile: PrefillTile | None,
) -> None:
    """One launch of the attention kernel: whole tiles to ``out``, parts to the partial buffers."""
    q, k, v = inputs
    out, lse, partial_out, partial_lse = outputs
    device = device_of(q.device)
    float8 = q.dtype in FLOAT8_DTYPES
    tile = choose_tile(device, float8) if tile is None else tile
    dim, dv = q.shape[-1], out.shape[-1]
    d1 = next_power_of_2(dim + 1) // 2
    smallest = 32 if float8 else 16
    k_page, v_page = ((0,), (0,)) if pages is None else ((k.stride(0),), (v.stride(0),))
    if v_transposed:
        v_strides = (0, 0, v.stride(0), v.stride(1))
    else:
        v_strides = (*v_page, v.stride(-3), v.stride(-2), 0)
    names = ("page", "row", "head", "dim")
    strides = dict(
        zip((f"stride_k_{n}" for n in names), (*k_page, k.stride(-3), k.stride(-2)), strict=False)
    )
    strides |= dict(zip((f"stride_v_{n}" for n in names), v_strides, strict=True))
    mla_prefill_kernel[(work.num_cu,)](
        q_ptr=bits(q, device.converts_float8),
        k_ptr=bits(k, device.converts_float8),
        v_ptr=bits(v, device.converts_float8),
        out_ptr=out,
        lse_ptr=lse,
        partial_out=partial_out,
        partial_lse=partial_lse,
        work_indptr=work.work_indptr,
        work_info=work.work_info,
        qo_indptr=work.qo_indptr,
        kv_indptr=work.kv_indptr,
        context_lens=work.context_lens,
        value_indptr=work.value_indptr if v_transposed else None,
        pages=pages,
        softmax_scale=softmax_scale * LOG2E.value,
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        stride_lse_row=0 if lse is None else lse.stride(0),
        stride_lse_head=0 if lse is None else lse.stride(1),
        stride_partial_row=partial_out.stride(0),
        stride_partial_head=partial_out.stride(1),
        stride_partial_lse_row=partial_lse.stride(0),
        **strides,
        **scales.arguments(),
        HEADS_PER_KV=q.shape[1] // work.num_heads_k,
        CAUSAL=work.is_causal,
        FP8_DOT=float8 and _multiplies(device, q.dtype),
        TRANSPOSED=v_transposed,
        PAGE_SIZE=0 if pages is None else k.shape[1],
        D1=d1,
        D2=dim - d1,
        DV=dv,
        BLOCK_D2=max(next_power_of_2(dim - d1), smallest) if dim > d1 else 0,
        BLOCK_DV=max(next_power_of_2(dv), smallest),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _multiplies(device: Device, dtype: torch.dtype) -> bool:
    """gfx94x multiplies only the fnuz format, everything newer only the other."""
    fnuz = dtype == torch.float8_e4m3fnuz
    return device.arch.startswith("gfx94") if fnuz else device.multiplies_float8


def mla_reduce(
    work: DeviceWork,
    partial_out: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor | None,
    block_m: int = 16,
) -> None:
    """Merge the parts of every split tile; rows of the partial buffers that no item wrote are not read."""
    dv = out.shape[-1]
    mla_reduce_kernel[(work.num_groups, cdiv(work.granularity.qlen, block_m), out.shape[1])](
        partial_out,
        partial_lse,
        out,
        lse,
        work.reduce_indptr,
        work.reduce_final_map,
        work.reduce_partial_map,
        partial_out.stride(0),
        partial_out.stride(1),
        partial_lse.stride(0),
        out.stride(0),
        out.stride(1),
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        DV=dv,
        BLOCK_DV=next_power_of_2(dv),
        BLOCK_M=block_m,
        num_warps=4,
    )
