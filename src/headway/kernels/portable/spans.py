"""Where a sequence's queries and keys lie, and which keys a tile of queries can see."""

from __future__ import annotations

from headway.kernels._triton import jit, tl


@jit
def query_span(b, cu_seqlens_q, seqused_q, rows_q):
    """(first row, number of rows) of sequence b's queries; first is 0 unless they are ragged."""
    first = 0
    length = rows_q
    if cu_seqlens_q is not None:
        first = tl.load(cu_seqlens_q + b)
        length = tl.load(cu_seqlens_q + b + 1) - first
    if seqused_q is not None:
        length = tl.load(seqused_q + b)
    return first, length


@jit
def key_span(
    b, seqlens_k, num_new, cu_seqlens_new, cu_seqlens_k, leftpad_k, cache_batch_idx, capacity
):
    """(cache row, first key's place in it, number of keys) of sequence b, appended keys included."""
    row = b
    first = 0
    length = capacity
    if cu_seqlens_k is not None:
        row = 0
        first = tl.load(cu_seqlens_k + b)
        length = tl.load(cu_seqlens_k + b + 1) - first
    if seqlens_k is not None:
        length = tl.load(seqlens_k + b) + num_new
        if cu_seqlens_new is not None:
            length += tl.load(cu_seqlens_new + b + 1) - tl.load(cu_seqlens_new + b)
    if leftpad_k is not None:
        pad = tl.load(leftpad_k + b)
        first += pad
        length -= pad
    if cache_batch_idx is not None:
        row = tl.load(cache_batch_idx + b)
    return row, first, length


@jit
def visible_span(
    pos_first,
    pos_last,
    seqlen_k,
    window_left,
    window_right,
    chunk,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
):
    """Keys for queries at positions pos_first..pos_last: (lo, hi, full_lo, full_hi).

    [lo, hi) holds every key that some query sees; all of them see all of [full_lo, full_hi).
    """
    lo = 0
    hi = seqlen_k
    full_lo = 0
    full_hi = seqlen_k
    if HAS_LEFT:
        lo = tl.maximum(lo, pos_first - window_left)
        full_lo = tl.maximum(full_lo, pos_last - window_left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, pos_last + window_right + 1)
        full_hi = tl.minimum(full_hi, pos_first + window_right + 1)
    if HAS_CHUNK:
        # A query before the first key (negative position) is in a chunk that holds no key.
        first_chunk = tl.maximum(pos_first, 0) // chunk
        last_chunk = tl.maximum(pos_last, 0) // chunk
        lo = tl.maximum(lo, first_chunk * chunk)
        hi = tl.where(pos_last < 0, 0, tl.minimum(hi, (last_chunk + 1) * chunk))
        full_lo = tl.maximum(full_lo, last_chunk * chunk)
        full_hi = tl.where(pos_first < 0, 0, tl.minimum(full_hi, (first_chunk + 1) * chunk))
    hi = tl.maximum(hi, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, hi, full_lo, full_hi
