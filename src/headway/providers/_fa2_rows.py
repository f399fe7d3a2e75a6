"""What FlashAttention 2 takes for granted of the lengths of queries and keys, and calls that do without.

Its host code drops a right bound that reaches ``max_seqlen_k``, which is right where no sequence has more
queries than keys. With ``max_seqlen_q == 1`` it takes row i to be sequence i's. And over pages, a block of
queries of which none sees a key gets its LSE written where it would lie if all sequences were
``max_seqlen_q`` long: in another row's place, or behind the end of the buffer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.problem import Problem


def longest_k(p: Problem) -> int:
    """A max_seqlen_k that no right bound reaches unless it hides nothing."""
    bounded = p.mask.window_right is not None and not p.mask.causal
    return max(p.max_seqlen_k, p.max_seqlen_q) if bounded else p.max_seqlen_k


def ragged_at_any_length(p: Problem) -> Problem:
    """The problem, never with a max_seqlen_q that says that each sequence has one row."""
    return dataclasses.replace(p, max_seqlen_q=max(p.max_seqlen_q, 2))


def one_row_each(p: Problem) -> tuple[Problem, Tensor]:
    """Ragged decode over pages as dense, and the sequence of each row, (total_q,), for the way back.

    Sequences without a query get a row that nobody reads.
    """
    assert p.cu_seqlens_q is not None
    starts, ends = p.cu_seqlens_q[:-1], p.cu_seqlens_q[1:]
    dense = dataclasses.replace(
        p,
        q=p.q.index_select(0, starts.clamp(max=p.q.shape[0] - 1)).unsqueeze(1),
        cu_seqlens_q=None,
        out=None,
    )
    return dense, _owners(p, ends)


def without_unseeing(p: Problem, lengths: Tensor) -> tuple[Problem, Tensor]:
    """A problem over pages without the rows that see no key; and which those are, boolean (total_q,).

    ``lengths``: int32 (B,), keys per sequence. The sequences come in reverse order, and what lies between
    two of them is a sequence of its own. It ends before it begins, so the kernels do nothing for it.
    """
    assert p.cu_seqlens_q is not None
    assert p.page_table is not None
    starts, ends = p.cu_seqlens_q[:-1], p.cu_seqlens_q[1:]
    firsts = _first_seeing(p, starts, ends, lengths)
    seqlens_k = lengths.new_zeros(2 * p.batch_size - 1)
    seqlens_k[::2] = lengths.flip(0)
    seeing = dataclasses.replace(
        p,
        batch_size=2 * p.batch_size - 1,
        cu_seqlens_q=torch.stack((firsts, ends), dim=1).flip(0).flatten(),
        seqlens_k=seqlens_k,
        page_table=p.page_table.flip(0).repeat_interleave(2, dim=0)[:-1],
    )
    rows, owner = _rows(p), _owners(p, ends)
    return seeing, (rows >= starts[owner]) & (rows < firsts[owner])


def _rows(p: Problem) -> Tensor:
    return torch.arange(p.q.shape[0], dtype=torch.int32, device=p.device)


def _owners(p: Problem, ends: Tensor) -> Tensor:
    """(total_q,): the sequence of each row; rows of padding count as the last one's."""
    return torch.searchsorted(ends, _rows(p), right=True).clamp_(max=p.batch_size - 1)


def _first_seeing(p: Problem, starts: Tensor, ends: Tensor, lengths: Tensor) -> Tensor:
    """int32 (B,): the first row of each sequence that sees a key; its end where none does."""
    firsts, right = starts, p.mask.window_right
    if right is not None:
        firsts = torch.maximum(starts, ends - lengths - min(right, p.max_seqlen_q))
    return torch.where(lengths > 0, firsts, ends)
