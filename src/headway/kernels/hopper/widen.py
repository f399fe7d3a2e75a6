"""Float8 keys and values of a call as 16-bit ones, for the forward kernel, which multiplies no others.

Each float8 number is exact in bfloat16 and in float16, so nothing is rounded here: what a stored 1 means is
handed on beside the copies, and scores and outputs are multiplied by it in float32. A sequence's keys keep
their places, so lengths, padding on the left, windows and positions mean what they did.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, jit, launch, tl, triton
from headway.kernels.portable.numeric import cast
from headway.kernels.portable.numeric import widen as widened
from headway.kernels.portable.operands import bits, block_width, device_of
from headway.kernels.portable.spans import key_span, query_span, visible_span
from headway.problem import KVLayout, Problem

#: Rows of keys and of values per program, and its warps.
ROWS, WARPS = 32, 4

#: Sequences whose descales are copied at once.
SEQUENCES = 64

#: Bytes, and float8 numbers, of which addresses and strides are multiples.
UNIT = 16

#: Keys of a block of the forward kernel, at most. It multiplies values that its mask hides, if their block
#: holds one that it does not: they have to be numbers.
BLOCK_KEYS = tl.constexpr(128)

#: Of the copies that there are at once, at most: memory that an engine must find beside its cache. Enough
#: for 131,072 keys of 8 heads of 128. Sequences that need more take turns.
MOST_BYTES = 512 << 20

#: Queries that a key is multiplied with, times the query heads that share it, on average: from so many on
#: the time that 16-bit products save is more than the time of widening. Reading in
#: docs/notes/hopper-prefill.md: 256 lose (0.83 to 1.10 of the portable kernel), 508 win (1.09 to 1.52).
LEAST_QUERIES = 384

#: More of them for the mask's sake: a tile is multiplied with all of a block that one of its queries sees.
MASKED_QUERIES = 64

_LENGTHS = (
    "cu_seqlens_q",
    "seqused_q",
    "seqlens_k",
    "cu_seqlens_new",
    "leftpad_k",
    "cache_batch_idx",
)


@jit
def _in_16_bits(x, dtype: tl.constexpr):
    """Exactly. By way of float32 to bfloat16: the instruction that goes there from float16 is slow."""
    x = widened(x, tl.float16)
    if dtype == tl.bfloat16:
        x = cast(x.to(tl.float32), dtype)
    return x


@triton.jit(
    do_not_specialize=[
        "rows_q",
        "num_new",
        "capacity",
        "rows",
        "batch_size",
        "window_left",
        "chunk",
        "stride_table",
        "stride_k_page",
        "stride_k_row",
        "stride_k_head",
        "stride_v_page",
        "stride_v_row",
        "stride_v_head",
        "stride_k_descale_batch",
        "stride_k_descale_head",
        "stride_v_descale_batch",
        "stride_v_descale_head",
    ],
    do_not_specialize_on_alignment=[*_LENGTHS, "page_table", "descales", "k_descale", "v_descale"],
)
def widen_kernel(
    k,
    v,
    k_wide,
    v_wide,
    descales,
    k_descale,
    v_descale,
    cu_seqlens_q,
    seqused_q,
    seqlens_k,
    cu_seqlens_new,
    leftpad_k,
    cache_batch_idx,
    page_table,
    rows_q,
    num_new,
    capacity,
    rows,  # of a sequence in the copies
    batch_size,  # of the descales: ragged keys are copied as one sequence
    window_left,
    chunk,
    stride_table,
    stride_k_page,  # these six in units of UNIT elements, which the compiler is to know
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_k_descale_batch,
    stride_k_descale_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    HEADS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    UNIT: tl.constexpr,
    num_warps: tl.constexpr,
):
    h = tl.program_id(0) % HEADS
    start = tl.program_id(0) // HEADS * ROWS
    b = tl.program_id(1)
    if descales is not None:
        if (start == 0) & (b == 0):
            for one in range(0, batch_size, SEQUENCES):
                batches = one + tl.arange(0, SEQUENCES)
                given = batches < batch_size
                k_scale = tl.full([SEQUENCES], 1.0, tl.float32)
                v_scale = k_scale
                if k_descale is not None:
                    k_at = batches * stride_k_descale_batch + h * stride_k_descale_head
                    k_scale = tl.load(k_descale + k_at, mask=given, other=1.0)
                if v_descale is not None:
                    v_at = batches * stride_v_descale_batch + h * stride_v_descale_head
                    v_scale = tl.load(v_descale + v_at, mask=given, other=1.0)
                to = descales + (batches * HEADS + h) * 2
                tl.store(to, k_scale, mask=given)
                tl.store(to + 1, v_scale, mask=given)
    source, first, length = key_span(
        b, seqlens_k, num_new, cu_seqlens_new, None, leftpad_k, cache_batch_idx, capacity
    )
    begin = first
    if HAS_LEFT or HAS_CHUNK:
        _, queries = query_span(b, cu_seqlens_q, seqused_q, rows_q)
        lo, _, _, _ = visible_span(
            length - queries, length - 1, length, window_left, 0, chunk, HAS_LEFT, False, HAS_CHUNK
        )
        begin = first + tl.maximum(lo - BLOCK_KEYS, 0)
    end = tl.minimum(first + length, rows)
    if (start >= end) | (start + ROWS <= begin):
        return
    at = start + tl.arange(0, ROWS)
    inside = (at >= begin) & (at < end)
    if PAGE_SIZE > 0:
        table = page_table + source.to(tl.int64) * stride_table
        page = tl.load(table + at // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        row = (at % PAGE_SIZE).to(tl.int64)
    else:
        page = source.to(tl.int64)
        row = at.to(tl.int64)
    k_rows = k + (h * stride_k_head + page * stride_k_page + row * stride_k_row) * UNIT
    v_rows = v + (h * stride_v_head + page * stride_v_page + row * stride_v_row) * UNIT
    wide_rows = (b.to(tl.int64) * rows + at) * HEADS + h
    cols = tl.arange(0, BLOCK_D)[None, :]
    cols_v = tl.arange(0, BLOCK_DV)[None, :]
    k_mask = inside[:, None] & (cols < D)
    v_mask = inside[:, None] & (cols_v < DV)
    keys = tl.load(k_rows[:, None] + cols, mask=k_mask, other=0.0)
    values = tl.load(v_rows[:, None] + cols_v, mask=v_mask, other=0.0)
    keys = _in_16_bits(keys, k_wide.dtype.element_ty)
    values = _in_16_bits(values, v_wide.dtype.element_ty)
    tl.store(k_wide + (wide_rows * D)[:, None] + cols, keys, mask=k_mask)
    tl.store(v_wide + (wide_rows * DV)[:, None] + cols_v, values, mask=v_mask)


@dataclass(frozen=True)
class Widened:
    """Keys and values as 16-bit numbers.

    k, v: (total_k, Hkv, D | Dv) for ragged keys, else (B, rows, Hkv, D | Dv), without a page table or
    cache_batch_idx. Rows that no query sees hold anything.
    descales: (B, Hkv, 2) float32, what a 1 in k and in v means; None where it means 1.
    """

    k: Tensor
    v: Tensor
    descales: Tensor | None


def reason_against(problem: Problem) -> str | None:
    """Why the float8 keys of a call are better not widened, in a word; None: they are.

    The answer follows from shapes and options. Lengths are on the device: what bounds them is max_seqlen_k
    and, for the copies, the batch size times it.
    """
    p, at_once = problem, sequences_at_once(problem)
    if at_once == 0:
        return f"16-bit copies of the keys and values would take more than {MOST_BYTES >> 20} MiB"
    if at_once < p.batch_size and (p.scores.score_mod or p.mask.mask_mod):
        return f"score_mod and mask_mod know all {p.batch_size} sequences, of which {at_once} fit"
    seen = queries_per_key(p) * (p.num_q_heads // p.num_kv_heads)
    if seen < LEAST_QUERIES:
        return f"{seen:.0f} queries and heads to a key; from {LEAST_QUERIES} on it pays to widen it"
    return None


def sequences_at_once(problem: Problem) -> int:
    """Sequences of which there may be copies at the same time; 0: not one. Ragged keys are one to that end.

    So many that turns are of equal length, and in fours where possible: their lengths then begin at
    multiples of 16 bytes, as those of all do.
    """
    p = problem
    row_bytes = 2 * p.num_kv_heads * (p.head_dim + p.head_dim_v)
    most = MOST_BYTES // max(rows_of(p) * row_bytes, 1)
    if p.kv_layout is KVLayout.RAGGED:
        return p.batch_size if most else 0
    if most >= p.batch_size or most == 0:
        return min(most, p.batch_size)
    even = cdiv(p.batch_size, cdiv(p.batch_size, most))
    return min(cdiv(even, 4) * 4, most // 4 * 4) if most >= 4 else even


def rows_of(problem: Problem) -> int:
    """Rows of a sequence's keys in the copies; at least one, for the copy engine takes no empty tensors."""
    p = problem
    if p.kv_layout is KVLayout.RAGGED:
        return p.k.shape[0]
    capacity = p.k.shape[1]
    if p.kv_layout is KVLayout.PAGED:
        assert p.page_table is not None
        capacity *= p.page_table.shape[1]
    return capacity if p.seqlens_k is None else max(min(capacity, p.max_seqlen_k), 1)


def queries_per_key(problem: Problem) -> float:
    """Query tokens that a key is multiplied with, on average over the keys that are read."""
    p, mask = problem, problem.mask
    batch_size = max(p.batch_size, 1)
    queries = p.q.shape[0] / batch_size if p.ragged_q else float(p.q.shape[1])
    keys = rows_of(p) / (batch_size if p.kv_layout is KVLayout.RAGGED else 1)
    if queries == 0 or keys == 0:
        return 0.0
    right = 0 if mask.causal else mask.window_right
    seen = queries
    if right is not None:
        queries = min(queries, keys)
        seen = min(queries, queries - queries**2 / (2 * keys) + MASKED_QUERIES)
    width = keys
    if mask.window_left is not None and right is not None:
        width = min(width, mask.window_left + right + 1)
    if mask.attention_chunk:
        width = min(width, mask.attention_chunk)
    if width < keys:
        seen = min(seen, queries * (width + MASKED_QUERIES) / min(keys, queries + width))
    return seen


def widen(problem: Problem, dtype: torch.dtype) -> Widened:
    """The keys and values that a call's queries may see, appended ones included, as ``dtype``.

    k, v: float8_e4m3fn in any layout, addresses and strides multiples of 16 bytes; descales: as the problem
    has them. Nothing synchronises.
    """
    p = problem
    rows, ragged = rows_of(p), p.kv_layout is KVLayout.RAGGED
    shape = (rows,) if ragged else (p.batch_size, rows)
    heads, d, dv = p.num_kv_heads, p.head_dim, p.head_dim_v
    k = torch.empty((*shape, heads, d), dtype=dtype, device=p.device)
    v = torch.empty((*shape, heads, dv), dtype=dtype, device=p.device)
    descales = None
    if p.descales.k is not None or p.descales.v is not None:
        descales = torch.empty((p.batch_size, heads, 2), dtype=torch.float32, device=p.device)
    wide = Widened(k, v, descales)
    if p.batch_size:
        grid = (cdiv(rows, ROWS) * heads, 1 if ragged else p.batch_size, 1)
        _launch(p, wide, rows, grid)
    return wide


def _launch(p: Problem, to: Widened, rows: int, grid: tuple[int, int, int]) -> None:
    native, ragged = device_of(p.device).converts_float8, p.kv_layout is KVLayout.RAGGED
    mask, table = p.mask, p.page_table
    where, new_tokens = _places(p)
    left, chunk = (None, 0) if ragged else (mask.window_left, mask.attention_chunk)
    tensors = (
        bits(p.k, native),
        bits(p.v, native),
        to.k,
        to.v,
        to.descales,
        p.descales.k,
        p.descales.v,
        *where,
        table,
    )
    numbers = (
        p.max_seqlen_q if p.ragged_q else p.q.shape[1],
        new_tokens,
        rows,
        rows,
        p.batch_size,
        left or 0,
        chunk,
        0 if table is None else table.stride(0),
        *_steps(p.k, ragged),
        *_steps(p.v, ragged),
        *((0, 0) if p.descales.k is None else p.descales.k.stride()),
        *((0, 0) if p.descales.v is None else p.descales.v.stride()),
    )
    d, dv = p.head_dim, p.head_dim_v
    widths = d, dv, block_width(d), block_width(dv)
    limits = left is not None, chunk > 0
    constants = (p.num_kv_heads, *limits, p.page_size or 0, *widths, ROWS, SEQUENCES, UNIT, WARPS)
    kinds = [None if t is None else t.dtype for t in tensors]
    key = (widen_kernel, *constants, *kinds, *(n >= 2**31 for n in numbers), p.device)
    launch(widen_kernel, grid, key, (*tensors, *numbers, *constants))


def _places(p: Problem) -> tuple[tuple[Tensor | None, ...], int]:
    """The tensors of ``_LENGTHS``, and the new tokens of every sequence. Ragged rows stay where they are,
    whosever they are."""
    if p.kv_layout is KVLayout.RAGGED:
        return (None,) * len(_LENGTHS), 0
    cu_seqlens_new, count = None, 0
    if p.append is not None and p.seqlens_k is not None:
        cu_seqlens_new = p.append.cu_seqlens
        count = p.append.k.shape[1] if cu_seqlens_new is None else 0
    queries = p.cu_seqlens_q, p.seqused_q
    return (*queries, p.seqlens_k, cu_seqlens_new, p.leftpad_k, p.cache_batch_idx), count


def _steps(t: Tensor, ragged: bool) -> tuple[int, int, int]:
    """Strides of page, row and head, in units."""
    *pages, row, head, _ = t.stride()
    return (0 if ragged else pages[0] // UNIT), row // UNIT, head // UNIT
