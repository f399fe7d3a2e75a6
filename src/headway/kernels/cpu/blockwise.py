"""Attention in torch operations, a block of query rows at a time: every feature, bounded memory.

The path of calls that the compiled kernel does not take: score_mod, mask_mod, qv, float64. Scores exist
for one block of rows only, over the keys that block can see at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway import reference
from headway.kernels.tracing import check_mods
from headway.problem import Mask, Problem
from headway.reference import Sequence1

#: Scores held at once, in elements: 64 MiB of float32.
SCORES_BUDGET = 1 << 24


def attention(problem: Problem, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Solve a problem whose append has been done already; ``q`` is its query, rotated if need be.

    Returns:
        ``out`` and the LSE (None unless asked for), as :func:`headway.reference.attention` does, but
        computed in float32 (float64 for float64 inputs).
    """
    # What cannot be part of a kernel is refused here too: scores come in blocks, never as whole rows, and
    # a mod that sums over them would give another result for every size of the blocks.
    mods = problem.scores.score_mod, problem.mask.mask_mod
    check_mods(*mods, problem.aux_tensors, problem.device)
    dtype = torch.float64 if problem.q.dtype is torch.float64 else torch.float32
    out = problem.empty_out()
    lse = problem.empty_lse() if problem.return_lse else None
    for sequence in reference.sequences(problem, q, dtype):
        for rows in _row_blocks(problem, sequence):
            o, row_lse = _attend_rows(problem, sequence, rows)
            if problem.ragged_q:
                at = slice(sequence.rows.start + rows.start, sequence.rows.start + rows.stop)
                out[at] = o.to(out.dtype)
                if lse is not None:
                    lse[:, at] = row_lse
            else:
                out[sequence.index, rows] = o.to(out.dtype)
                if lse is not None:
                    lse[sequence.index, :, rows] = row_lse
    return out, lse


def _row_blocks(problem: Problem, s: Sequence1) -> list[slice]:
    rows, keys = s.q.shape[0], max(1, s.k.shape[0])
    size = max(1, SCORES_BUDGET // (problem.num_q_heads * keys))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _visible_range(mask: Mask, first: int, last: int, num_keys: int) -> tuple[int, int]:
    """Keys outside [start, stop) are invisible to every query at positions first..last."""
    start, stop = 0, num_keys
    if mask.window_left is not None:
        start = max(start, first - mask.window_left)
    if mask.window_right is not None:
        stop = min(stop, last + mask.window_right + 1)
    if mask.attention_chunk > 0:
        chunk = mask.attention_chunk
        start = max(start, (first // chunk) * chunk)
        stop = min(stop, (last // chunk + 1) * chunk)
    start = min(max(start, 0), num_keys)
    return start, min(max(stop, start), num_keys)


def _attend_rows(problem: Problem, s: Sequence1, rows: slice) -> tuple[Tensor, Tensor]:
    """out (rows, Hq, Dv) and lse (Hq, rows) of a block of one sequence's queries."""
    pos = s.positions[rows]
    first, last = int(pos[0]), int(pos[-1])
    start, stop = _visible_range(problem.mask, first, last, s.k.shape[0])
    k, v = s.k[start:stop], s.v[start:stop]
    keys = torch.arange(start, stop, device=k.device)
    scores = _grouped_products(s.q[rows], k)
    if s.qv is not None:
        scores = scores + _grouped_products(s.qv[rows], v)
    scores = scores * problem.scores.softmax_scale
    if problem.scores.softcap > 0:
        scores = problem.scores.softcap * torch.tanh(scores / problem.scores.softcap)
    scores = reference.apply_score_mod(problem, scores, s.index, pos, keys)
    visible = reference.visible_keys(problem, s.index, pos, keys)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = None if problem.scores.sinks is None else problem.scores.sinks.to(scores.dtype)
    weights, lse = reference.softmax_with_sinks(scores, sinks)
    return _grouped_sums(weights, v), lse


def _grouped_products(q: Tensor, k: Tensor) -> Tensor:
    """(Hq, n, Sk) dot products of (n, Hq, D) with (Sk, Hkv, D), without repeating any key."""
    n, hq, d = q.shape
    hkv = k.shape[1]
    grouped = q.transpose(0, 1).reshape(hkv, hq // hkv * n, d)
    return torch.bmm(grouped, k.permute(1, 2, 0)).view(hq, n, -1)


def _grouped_sums(weights: Tensor, v: Tensor) -> Tensor:
    """(n, Hq, Dv) sums of (Sk, Hkv, Dv) values weighted by (Hq, n, Sk)."""
    hq, n, keys = weights.shape
    hkv = v.shape[1]
    sums = torch.bmm(weights.reshape(hkv, hq // hkv * n, keys), v.transpose(0, 1))
    return sums.view(hq, n, -1).transpose(0, 1)
