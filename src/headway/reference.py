"""The semantics of attention, in plain torch. Every provider is tested against this file.

Written for reading: one sequence at a time, whole score matrices, float64. What is not here is not
promised; what is here holds for every provider. Positions, lengths and masks follow FlashAttention 3
where it defines them (bottom-right alignment, inclusive windows, in-place append).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.problem import (
    FLOAT8_DTYPES,
    Append,
    KVLayout,
    Mask,
    Problem,
    append_lengths,
    key_ends,
    query_lengths,
)


@dataclass(frozen=True)
class Sequence1:
    """One sequence of a problem, gathered: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv)."""

    index: int
    rows: slice  # where its queries lie in the flattened (rows, Hq, D) view of q
    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    positions: Tensor  # (Sq,) absolute position of each query


def attention(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    """Solve a problem; caches are appended to in place first.

    Returns:
        ``out`` as the problem shapes it, and the LSE (float32, natural logarithm), or None unless asked
        for. Rows of ``out`` that belong to no query in use are left as they were.
    """
    q = problem.q
    if problem.append is not None:
        q = append(problem, problem.append)
    out = problem.empty_out()
    lse = problem.empty_lse()
    for sequence in sequences(problem, q, dtype):
        o, row_lse = attend(problem, sequence)
        n = o.shape[0]
        if problem.ragged_q:
            out[sequence.rows] = o.to(out.dtype)
            lse[:, sequence.rows] = row_lse.to(lse.dtype)
        else:
            out[sequence.index, :n] = o.to(out.dtype)
            lse[sequence.index, :, :n] = row_lse.to(lse.dtype)
    return out, (lse if problem.return_lse else None)


def sequences(problem: Problem, q: Tensor, dtype: torch.dtype) -> list[Sequence1]:
    """The problem's sequences, gathered from whatever layout they lie in."""
    lengths, ends = query_lengths(problem).tolist(), key_ends(problem).tolist()
    pads = problem.leftpad_k.tolist() if problem.leftpad_k is not None else [0] * len(ends)
    starts = problem.cu_seqlens_q.tolist() if problem.cu_seqlens_q is not None else None
    gathered = []
    for b, (length, end, pad) in enumerate(zip(lengths, ends, pads, strict=True)):
        rows = slice(starts[b], starts[b] + length) if starts is not None else slice(0, length)
        rows_q = q[rows] if starts is not None else q[b, rows]
        qv = None
        if problem.qv is not None:
            qv = (problem.qv[rows] if starts is not None else problem.qv[b, rows]).to(dtype)
        k = _scaled(kv_rows(problem, problem.k, b)[pad:end], problem.descales.k, b, dtype)
        v = _scaled(kv_rows(problem, problem.v, b)[pad:end], problem.descales.v, b, dtype)
        group = problem.num_q_heads // problem.num_kv_heads
        q_scale = problem.descales.q
        if q_scale is not None:
            q_scale = q_scale.repeat_interleave(group, dim=1)
        positions = torch.arange(length, device=q.device) + (end - pad - length)
        gathered.append(Sequence1(b, rows, _scaled(rows_q, q_scale, b, dtype), k, v, qv, positions))
    return gathered


def _scaled(rows: Tensor, descale: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    wide = rows.to(dtype)
    return wide if descale is None else wide * descale[b].to(dtype)[None, :, None]


def kv_rows(problem: Problem, cache: Tensor, b: int) -> Tensor:
    """All KV rows of sequence b, (rows, Hkv, D): a view where the layout allows, else a gather."""
    if problem.kv_layout is KVLayout.RAGGED:
        assert problem.cu_seqlens_k is not None
        start, end = problem.cu_seqlens_k[b : b + 2].tolist()
        return cache[start:end]
    row = b if problem.cache_batch_idx is None else int(problem.cache_batch_idx[b])
    if problem.kv_layout is KVLayout.DENSE:
        return cache[row]
    assert problem.page_table is not None
    used = -(-int(key_ends(problem)[b]) // cache.shape[1])
    pages = problem.page_table[row, :used].long()
    if problem.leftpad_k is not None:  # entries before the first used page may hold anything
        pages[: int(problem.leftpad_k[b]) // cache.shape[1]] = 0
    return cache[pages].flatten(0, 1)


def attend(problem: Problem, s: Sequence1) -> tuple[Tensor, Tensor]:
    """Attention of one sequence: out (Sq, Hq, Dv) and lse (Hq, Sq)."""
    group = problem.num_q_heads // problem.num_kv_heads
    k = s.k.repeat_interleave(group, dim=1)
    v = s.v.repeat_interleave(group, dim=1)
    products = torch.einsum("qhd,khd->hqk", s.q, k)
    if s.qv is not None:
        products = products + torch.einsum("qhd,khd->hqk", s.qv, v)
    scores = problem.scores.softmax_scale * products
    if problem.scores.softcap > 0:
        scores = problem.scores.softcap * torch.tanh(scores / problem.scores.softcap)
    keys = torch.arange(k.shape[0], device=k.device)
    scores = apply_score_mod(problem, scores, s.index, s.positions, keys)
    visible = visible_keys(problem, s.index, s.positions, keys)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = None if problem.scores.sinks is None else problem.scores.sinks.to(scores.dtype)
    weights, lse = softmax_with_sinks(scores, sinks)
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension of (Hq, Sq, Sk), empty rows zero; and its LSE (Hq, Sq)."""
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], float("-inf"))
    else:
        lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None].expand_as(lse))
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(scores - shift[..., None]), lse


def apply_score_mod(problem: Problem, scores: Tensor, b: int, pos: Tensor, keys: Tensor) -> Tensor:
    """``score_mod`` over a whole (Hq, Sq, Sk) block; its indices arrive as broadcastable tensors."""
    mod = problem.scores.score_mod
    if mod is None:
        return scores
    aux = (problem.aux_tensors,) if problem.aux_tensors else ()
    changed = mod(scores, *_indices(problem, b, pos, keys), *aux)
    if changed is None:
        raise InvalidInputError("score_mod", "None returned by it", "the new score, returned")
    return torch.as_tensor(changed, device=scores.device).to(scores.dtype).expand_as(scores)


def visible_keys(problem: Problem, b: int, pos: Tensor, keys: Tensor) -> Tensor:
    """Boolean (Hq or 1, Sq, Sk): what the mask of a problem lets each query see."""
    visible = visible_by_position(problem.mask, pos, keys)[None]
    if problem.mask.mask_mod is None:
        return visible
    aux = (problem.aux_tensors,) if problem.aux_tensors else ()
    shown = problem.mask.mask_mod(*_indices(problem, b, pos, keys), *aux)
    if shown is None:
        raise InvalidInputError("mask_mod", "None returned by it", "true or false, returned")
    return visible & torch.as_tensor(shown, device=pos.device).bool()


def _indices(problem: Problem, b: int, pos: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    heads = torch.arange(problem.num_q_heads, device=pos.device)
    batch = torch.tensor(b, device=pos.device)
    return batch, heads[:, None, None], pos[None, :, None], keys[None, None, :]


def visible_by_position(mask: Mask, pos: Tensor, keys: Tensor) -> Tensor:
    """Boolean (Sq, Sk): causal, window and chunk, which depend on positions alone."""
    distance = keys[None, :] - pos[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mask.window_left is not None:
        visible &= distance >= -mask.window_left
    if mask.window_right is not None:
        visible &= distance <= mask.window_right
    if mask.attention_chunk > 0:
        chunk = torch.div(pos, mask.attention_chunk, rounding_mode="floor")
        visible &= torch.div(keys, mask.attention_chunk, rounding_mode="floor") == chunk[:, None]
    return visible


# --- append -----------------------------------------------------------------------------------------


def append(problem: Problem, new: Append) -> Tensor:
    """Rotate and write the new keys and values into the cache; return q, rotated where asked for.

    Row ``cache_seqlens[b] + i`` of the sequence receives new token i. The rotary position of that
    token is ``rotary_seqlens[b] + i`` (default: cache_seqlens). A query is rotated at its own position
    when the mask is causal or local, otherwise every query at the first one, as FA3 does.
    """
    assert problem.seqlens_k is not None
    lengths = append_lengths(problem)
    assert lengths is not None
    q = problem.q.clone() if new.rotary is not None else problem.q
    starts = new.cu_seqlens.tolist() if new.cu_seqlens is not None else None
    q_starts = problem.cu_seqlens_q.tolist() if problem.cu_seqlens_q is not None else None
    q_lengths = query_lengths(problem).tolist()
    for b, (old, n) in enumerate(zip(problem.seqlens_k.tolist(), lengths.tolist(), strict=True)):
        k = new.k[starts[b] : starts[b] + n] if starts is not None else new.k[b, :n]
        v = new.v[starts[b] : starts[b] + n] if starts is not None else new.v[b, :n]
        if new.rotary is not None:
            rotary = new.rotary
            base = old if rotary.seqlens is None else int(rotary.seqlens[b])
            steps = torch.arange(max(n, q_lengths[b]), device=q.device)
            k = rotate(k, rotary.cos, rotary.sin, base + steps[:n], rotary.interleaved)
            at_own = problem.mask.causal or problem.mask.is_local
            pos = base + (steps if at_own else torch.zeros_like(steps))[: q_lengths[b]]
            rows = (
                q[q_starts[b] : q_starts[b] + q_lengths[b]]
                if q_starts is not None
                else q[b, : q_lengths[b]]
            )
            rows.copy_(rotate(rows, rotary.cos, rotary.sin, pos, rotary.interleaved))
        write_rows(problem, problem.k, b, old, quantised(k, problem.k.dtype, problem.descales.k, b))
        write_rows(problem, problem.v, b, old, quantised(v, problem.v.dtype, problem.descales.v, b))
    return q


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of (n, H, D) rows; pairs (0, 1), (2, 3).. if interleaved, else (i, i + half).

    Computed in float32 (float64 stays float64) and rounded once to the dtype of ``x``; float8 saturates.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    half = cos.shape[1]
    c, s = (t[positions].to(wide)[:, None, :] for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    if x.dtype in FLOAT8_DTYPES:
        pairs = _saturated(pairs, x.dtype)
    return torch.cat((pairs.to(x.dtype), rest), dim=-1)


def quantised(rows: Tensor, dtype: torch.dtype, descale: Tensor | None, b: int) -> Tensor:
    """(n, Hkv, D) rows as the cache stores them: a wider dtype is divided by descale and saturated."""
    if rows.dtype == dtype or dtype not in FLOAT8_DTYPES:
        return rows.to(dtype)
    wide = rows.float()
    if descale is not None:
        wide = wide / descale[b][None, :, None]
    return _saturated(wide, dtype).to(dtype)


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x within the range of ``dtype``: a plain cast would turn what is beyond it into NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit)


def write_rows(problem: Problem, cache: Tensor, b: int, start: int, rows: Tensor) -> None:
    """Store (n, Hkv, D) rows at positions start.. of sequence b, through the page table if paged."""
    n = rows.shape[0]
    row = b if problem.cache_batch_idx is None else int(problem.cache_batch_idx[b])
    if problem.kv_layout is KVLayout.DENSE:
        cache[row, start : start + n] = rows
        return
    assert problem.page_table is not None
    at = torch.arange(start, start + n, device=cache.device)
    pages = problem.page_table[row, at // cache.shape[1]].long()
    cache[pages, at % cache.shape[1]] = rows


# --- merging of partial results -----------------------------------------------------------------------


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial attentions over disjoint keys.

    Args:
        out_partial: (n, ..., Dv), each normalised by its own softmax.
        lse_partial: (n, ...), natural logarithm; -inf, +inf and NaN all mean "saw no key".

    Returns:
        out (..., Dv) and lse (...), float64; where no part saw a key, 0 and -inf.
    """
    lses = lse_partial.double()
    lses = lses.masked_fill(lses.isnan() | (lses == float("inf")), float("-inf"))
    lse = torch.logsumexp(lses, dim=0)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(lses - shift)[..., None]
    parts = out_partial.double().masked_fill(weights == 0, 0.0)
    return (weights * parts).sum(dim=0), lse


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`combine` for separate results whose lse puts heads first, as attention returns them.

    Dense: out (B, Sq, Hq, Dv) with lse (B, Hq, Sq); ragged: (total_q, Hq, Dv) with (Hq, total_q).
    """
    if not outs or len(outs) != len(lses):
        raise InvalidInputError(
            "outs", f"{len(outs)} outs, {len(lses)} lses", "as many, at least one"
        )
    out, lse = combine(torch.stack(list(outs)), torch.stack([x.transpose(-1, -2) for x in lses]))
    return out.to(outs[0].dtype), lse.transpose(-1, -2).float().contiguous()
