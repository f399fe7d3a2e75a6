"""Sampler: from a step's logits to one token per row, for all rows at once.

Each row has its own parameters. A row's draw depends on its own logits, its request's seed and the number
of tokens the request has drawn so far, and on nothing else in the batch, so a seeded request repeats
whatever it is batched with (as far as the model's logits do).

Filters apply in this order: temperature, top-k, top-p (on what top-k left), min-p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.engine.request import SamplingParams, TokenLogprob

#: Top-p without a top-k looks at this many of the most likely tokens first, at all of them if need be.
HEAD_SIZE = 1024


@dataclass(frozen=True)
class Row:
    """How one row of the logits is sampled. ``index``: how many tokens its request has drawn before."""

    params: SamplingParams
    seed: int
    index: int


@dataclass(frozen=True)
class Sampled:
    """One row's token; ``error`` instead, where the row could not be sampled."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: str | None = None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Draw one token per row.

    Args:
        logits: (rows, vocabulary), any float dtype.

    Returns:
        One :class:`Sampled` per row. A row whose logits contain NaN or +inf, or nothing finite, gets an
        error and leaves the others alone.
    """
    logits = logits.float()
    largest, tokens = logits.max(dim=-1)
    healthy = torch.isfinite(largest).tolist()  # max() passes NaN on; all -inf is no distribution
    tokens_list = tokens.tolist()
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and healthy[i]]
    if drawn:
        picked = _draw(
            logits[drawn] if len(drawn) < len(rows) else logits, [rows[i] for i in drawn]
        )
        for i, token in zip(drawn, picked, strict=True):
            tokens_list[i] = token
    logprobs = _logprobs(logits, rows, tokens_list, healthy)
    return [
        Sampled(token, logprobs.get(i))
        if healthy[i]
        else Sampled(error="the model's logits are not finite")
        for i, token in enumerate(tokens_list)
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a function of both, 53 random bits of it."""
    message = (seed & (1 << 64) - 1).to_bytes(8, "little") + index.to_bytes(8, "little")
    bits = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Tokens for rows that all have a temperature."""
    temperatures = _column([row.params.temperature for row in rows], logits)
    scaled = logits / temperatures
    uniforms = _column([uniform(row.seed, row.index) for row in rows], logits, torch.float64)
    tokens = [-1] * len(rows)
    for size, members in _by_head_size(rows, logits.shape[-1]).items():
        subset = scaled if len(members) == len(rows) else scaled[members]
        params = [rows[i].params for i in members]
        picked = _draw_from(subset, params, uniforms[members], size)
        for i, token in zip(members, picked, strict=True):
            tokens[i] = token
    return tokens


def _by_head_size(rows: Sequence[Row], vocabulary: int) -> dict[int, list[int]]:
    """Rows grouped by how many of the most likely tokens they need sorted; 0: none.

    The group is a function of the row's own parameters, so that ties fall the same way in every batch.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        params = row.params
        size = 0
        if 0 < params.top_k < vocabulary:
            size = next((n for n in (64, HEAD_SIZE) if params.top_k <= n), vocabulary)
        elif params.top_p < 1:
            size = HEAD_SIZE
        groups.setdefault(min(size, vocabulary), []).append(i)
    return groups


def _draw_from(
    scaled: Tensor, params: Sequence[SamplingParams], uniforms: Tensor, head_size: int
) -> list[int]:
    """Inverse-CDF draws; with a head size, from that many most likely tokens in descending order."""
    if head_size == 0:
        probs = torch.softmax(scaled, dim=-1)
        return _invert(_keep_min_p(probs, params), uniforms).tolist()
    values, ids = scaled.topk(head_size, dim=-1)
    probs = torch.exp(values - scaled.logsumexp(dim=-1, keepdim=True))
    probs = _keep_top_k(probs, params)
    # With top-k, top-p counts shares of what top-k left; without, of the whole vocabulary.
    limited = _column([0 < p.top_k <= head_size for p in params], scaled, torch.bool)
    totals = torch.where(limited, probs.sum(dim=-1, keepdim=True), 1.0)
    mass = _column([p.top_p for p in params], scaled) * totals
    before = probs.cumsum(dim=-1) - probs
    short = (before[:, -1:] + probs[:, -1:] < mass) & ~limited
    picked = _invert(_keep_min_p(probs.masked_fill(before >= mass, 0.0), params), uniforms)
    tokens = ids.gather(-1, picked[:, None])[:, 0].tolist()
    vocabulary = scaled.shape[-1]
    if head_size < vocabulary:
        for i in short[:, 0].nonzero()[:, 0].tolist():
            row = slice(i, i + 1)
            tokens[i] = _draw_from(scaled[row], params[row], uniforms[row], vocabulary)[0]
    return tokens


def _keep_top_k(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what is behind each row's top_k; probabilities are in descending order."""
    limits = [p.top_k if p.top_k > 0 else probs.shape[-1] for p in params]
    if min(limits) >= probs.shape[-1]:
        return probs
    rank = torch.arange(probs.shape[-1], device=probs.device)
    return probs.masked_fill(rank >= _column(limits, probs, torch.int64), 0.0)


def _keep_min_p(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what is less likely than min_p times the most likely token."""
    if not any(p.min_p for p in params):
        return probs
    floor = _column([p.min_p for p in params], probs) * probs.amax(dim=-1, keepdim=True)
    return probs.masked_fill(probs < floor, 0.0)


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(rows,) index drawn from each row of unnormalised probabilities by its uniform number."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms * cumulative[:, -1:]
    # right=True finds the first index whose cumulative mass exceeds the target: never one of mass zero.
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return index.clamp_(max=probs.shape[-1] - 1)


def _logprobs(
    logits: Tensor, rows: Sequence[Row], tokens: Sequence[int], healthy: Sequence[bool]
) -> dict[int, TokenLogprob]:
    """Log-probabilities of the chosen and the most likely tokens, for the rows that ask for them."""
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and healthy[i]]
    if not wanted:
        return {}
    logprobs = torch.log_softmax(logits[wanted], dim=-1)
    most = max(rows[i].params.logprobs or 0 for i in wanted)
    chosen = logprobs.gather(-1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device))
    values, ids = (t.tolist() for t in logprobs.topk(min(most, logprobs.shape[-1]), dim=-1))
    result = {}
    for at, i in enumerate(wanted):
        count = rows[i].params.logprobs or 0
        top = tuple(zip(ids[at][:count], values[at][:count], strict=True))
        result[i] = TokenLogprob(tokens[i], float(chosen[at]), top)
    return result


def _column(values: Sequence[object], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, 1) tensor on the device of ``like``."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
