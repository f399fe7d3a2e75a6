"""Sampler: from a step's logits to one token per row, for all rows at once.

Each row has its own parameters. A row's draw depends on its own logits, its request's seed and the number
of tokens the request has drawn so far, and on nothing else in the batch, so a seeded request repeats
whatever it is batched with (as far as the model's logits do).

Filters apply in this order: temperature, top-k, top-p (on what top-k left), min-p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headway.engine.request import SamplingParams, TokenLogprob
from headway.engine.transfer import Download, upload

#: A top-k up to one of these has that many tokens sorted, otherwise the whole vocabulary.
HEAD_SIZES = (64, 1024)

#: Kinds of rows beside those with a top-k.
WHOLE, NUCLEUS = 0, -1

#: Temperatures and top_p below this, and temperatures above its inverse, are taken for it: float32 has no
#: quotients of logits by smaller ones, and what is drawn is the same.
SMALLEST = 1e-30

#: Tokens (rows,) int64 to those that count.
Settle = Callable[[Tensor], Tensor]

#: Width of the blocks in which wide rows are searched.
BLOCK = 64


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


class Drawn:
    """Tokens that a device has been asked for: ``tokens`` (rows,) int64 are there, or will be.

    ``collect`` waits for them. ``settle`` may change them before anyone sees them.
    """

    def __init__(self, logits: Tensor, rows: Sequence[Row], settle: Settle | None = None) -> None:
        self._rows = rows
        # NaN and +inf come out as such; all -inf is no distribution
        largest, self.tokens = _largest(logits)
        healthy = torch.isfinite(largest)
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        if drawn and logits.device.type == "cpu":
            fine = healthy.tolist()
            drawn = [i for i in drawn if fine[i]]
        if drawn:
            everyone = len(drawn) == len(rows)
            index = None if everyone else _indices(drawn, logits)
            subset = (logits if index is None else logits[index]).float()
            if logits.device.type != "cpu":  # nobody looks whether there is one
                sick = ~(healthy if index is None else healthy[index])
                subset = subset.masked_fill(sick[:, None], 0.0)
            picked = _draw(subset, [rows[i] for i in drawn])
            self.tokens = picked if index is None else self.tokens.index_copy(0, index, picked)
        if settle is not None:
            self.tokens = settle(self.tokens)
        self._wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        told = _logprobs(logits, rows, self.tokens, self._wanted) if self._wanted else ()
        self._download = Download([self.tokens, healthy, *told])

    def collect(self) -> list[Sampled]:
        """One :class:`Sampled` per row."""
        tokens, healthy, *told = (t.tolist() for t in self._download.wait())
        result = [
            Sampled(token) if fine else Sampled(error="the model's logits are not finite")
            for token, fine in zip(tokens, healthy, strict=True)
        ]
        for at, i in enumerate(self._wanted if told else ()):
            if not healthy[i]:
                continue
            chosen, values, ids = (column[at] for column in told)
            count = self._rows[i].params.logprobs or 0
            top = tuple(zip(ids[:count], values[:count], strict=True))
            result[i] = Sampled(tokens[i], TokenLogprob(tokens[i], chosen, top))
        return result


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) the largest entry of each row, and where it is."""
    if logits.device.type == "cpu":
        values, places = logits.max(dim=-1)
        return values, places
    from headway.kernels.portable.argmax import argmax

    return argmax(logits)


def draw(logits: Tensor, rows: Sequence[Row], settle: Settle | None = None) -> Drawn:
    """:func:`sample` without waiting for the result."""
    return Drawn(logits, rows, settle)


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Draw one token per row.

    Args:
        logits: (rows, vocabulary), any float dtype.

    Returns:
        One :class:`Sampled` per row. A row whose logits contain NaN or +inf, or nothing finite, gets an
        error and leaves the others alone.
    """
    return draw(logits, rows).collect()


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a function of both, 53 random bits of it."""
    message = (seed & (1 << 64) - 1).to_bytes(8, "little") + index.to_bytes(8, "little")
    bits = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """(rows,) tokens for rows that all have a temperature; nothing is read back from the device."""
    temperatures = [min(max(row.params.temperature, SMALLEST), 1 / SMALLEST) for row in rows]
    scaled = logits / _column(temperatures, logits)
    uniforms = _column([uniform(row.seed, row.index) for row in rows], logits, torch.float64)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for kind, members in _by_kind(rows, logits.shape[-1]).items():
        params = [rows[i].params for i in members]
        index = None if len(members) == len(rows) else _indices(members, logits)
        subset = scaled if index is None else scaled[index]
        numbers = uniforms if index is None else uniforms[index]
        if kind == NUCLEUS and logits.device.type != "cpu":
            picked = _draw_from_head(subset, params, numbers, logits.shape[-1])
        elif kind == NUCLEUS:
            each = zip(subset, params, numbers, strict=True)
            picked = torch.tensor([_draw_from_nucleus(*one) for one in each], device=logits.device)
        elif kind == WHOLE:
            probs = _keep_min_p(torch.softmax(subset, dim=-1), params)
            picked = _invert(probs, numbers)
        else:
            picked = _draw_from_head(subset, params, numbers, kind)
        if index is None:
            return picked
        tokens.index_copy_(0, index, picked)
    return tokens


def _by_kind(rows: Sequence[Row], vocabulary: int) -> dict[int, list[int]]:
    """Rows grouped by what has to be sorted for them: WHOLE nothing, NUCLEUS, or so many of the best.

    The kind is a function of the row's own parameters, so that ties fall the same way in every batch.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        params = row.params
        kind = WHOLE if params.top_p == 1 else NUCLEUS
        if 0 < params.top_k < vocabulary:
            kind = min(next((n for n in HEAD_SIZES if params.top_k <= n), vocabulary), vocabulary)
        groups.setdefault(kind, []).append(i)
    return groups


def _draw_from_head(
    scaled: Tensor, params: Sequence[SamplingParams], uniforms: Tensor, size: int
) -> Tensor:
    """Draws for rows with a top-k of at most ``size``."""
    values, ids = scaled.topk(size, dim=-1)
    probs = _keep_top_k(torch.exp(values - values[:, :1]), params)
    mass = _column([_share(p) for p in params], scaled) * probs.sum(dim=-1, keepdim=True)
    probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= mass, 0.0)
    picked = _invert(_keep_min_p(probs, params), uniforms)
    return ids.gather(-1, picked[:, None])[:, 0]


def _draw_from_nucleus(scaled: Tensor, params: SamplingParams, uniform: Tensor) -> int:
    """A draw for one row (vocabulary,) with a top-p and no top-k.

    Tokens less likely than (1 - top_p) / vocabulary have less than 1 - top_p together, so none of them
    is in the nucleus; what remains to be sorted is a small part of the vocabulary, unless it is flat.
    """
    probs = torch.softmax(scaled, dim=-1)
    ids = (probs >= (1 - params.top_p) / len(probs)).nonzero()[:, 0]
    values, order = probs[ids].sort(descending=True, stable=True)
    values = values.masked_fill(values.cumsum(dim=-1) - values >= _share(params), 0.0)[None]
    picked = _invert(_keep_min_p(values, [params]), uniform[None])
    return int(ids[order[picked[0]]])


def _share(params: SamplingParams) -> float:
    """top_p, so that float32 tells it from 0: the likeliest token is always left."""
    return max(params.top_p, SMALLEST)


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
    """(rows,) index drawn from each row of unnormalised probabilities by its uniform number (rows, 1).

    A wide row is searched in two steps, first for a block and then within it: a running sum over all of
    it, exact enough to be drawn from, would cost more than all the rest.
    """
    if probs.shape[-1] <= 16 * BLOCK:
        return _search(probs, uniforms)[0]
    blocks = functional.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, rest = _search(blocks.sum(dim=-1), uniforms)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    return block * BLOCK + _search(inside, rest)[0]


def _search(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the entry a uniform number falls on, (rows,), and where within it, (rows, 1) in [0, 1)."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms * cumulative[:, -1:]
    # right=True finds the first entry whose cumulative mass exceeds the target: never one of mass zero.
    index = torch.searchsorted(cumulative, target, right=True)
    mass = probs.gather(-1, index).double()
    rest = (target - (cumulative.gather(-1, index) - mass)) / mass
    return index[:, 0], rest.clamp_(0, 1 - 2.0**-53)


def _logprobs(
    logits: Tensor, rows: Sequence[Row], tokens: Tensor, wanted: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """For the rows that ask: log-probabilities (n,) of their tokens, and (n, most) the most likely
    tokens' with these tokens' ids."""
    index = _indices(wanted, logits)
    logprobs = torch.log_softmax(logits[index].float(), dim=-1)
    most = max(rows[i].params.logprobs or 0 for i in wanted)
    chosen = logprobs.gather(-1, tokens[index][:, None])[:, 0]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return chosen, values, ids


class PromptScores:
    """Log-probabilities of given tokens under rows of logits, on their way to the host.

    Args:
        logits: (rows, vocabulary); tokens: one for each row; most: how many of the likeliest beside it.
    """

    #: Rows that are normalised at a time: a long prompt's float32 logits would fill the memory.
    ROWS = 512

    def __init__(self, logits: Tensor, tokens: Sequence[int], most: int) -> None:
        self._tokens = tokens
        there = upload(tokens, torch.int64, logits.device)
        parts = []
        for first in range(0, len(tokens), self.ROWS):
            rows = slice(first, first + self.ROWS)
            logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
            chosen = logprobs.gather(-1, there[rows, None])[:, 0]
            parts.append((chosen, *logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)))
        self._download = Download([torch.cat(column) for column in zip(*parts, strict=True)])

    def collect(self) -> list[TokenLogprob]:
        """One entry per token."""
        chosen, values, ids = (t.tolist() for t in self._download.wait())
        return [
            TokenLogprob(token, chosen[i], tuple(zip(ids[i], values[i], strict=True)))
            for i, token in enumerate(self._tokens)
        ]


def _indices(places: Sequence[int], like: Tensor) -> Tensor:
    return upload(places, torch.int64, like.device)


def _column(values: Sequence[object], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, 1) tensor on the device of ``like``."""
    return upload(values, dtype, like.device)[:, None]
