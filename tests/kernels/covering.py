"""Attention calls that cover features in pairs, chosen from many random ones.

Every two values of two factors that some cheap call brings together are brought together by a chosen one.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from hypothesis.strategies import SearchStrategy

from headway.problem import Problem, query_lengths
from tests.calls import Call

Pair = tuple[Hashable, Hashable]


def factors(problem: Problem) -> dict[str, Hashable]:
    """What a call is like, factor by factor."""
    p, new = problem, problem.append
    rotary = None if new is None else new.rotary
    lengths = query_lengths(p).tolist()
    return {
        "layout": p.kv_layout,
        "page size": p.page_size,
        "q": p.q.dtype,
        "k": p.k.dtype,
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "group": p.num_q_heads // p.num_kv_heads,
        "ragged": p.ragged_q,
        "seqused_q": p.seqused_q is not None,
        "seqlens_k": p.seqlens_k is not None,
        "empty query": 0 in lengths,
        "longer than a tile": max(lengths) > 32,
        "causal": p.mask.causal,
        "left": p.mask.window_left is not None,
        "right": p.mask.window_right is not None and not p.mask.causal,
        "chunk": p.mask.attention_chunk > 0,
        "softcap": p.scores.softcap > 0,
        "sinks": p.scores.sinks is not None,
        "score_mod": p.scores.score_mod is not None,
        "mask_mod": p.mask.mask_mod is not None,
        "qv": p.qv is not None,
        "leftpad": p.leftpad_k is not None,
        "batch_idx": p.cache_batch_idx is not None,
        "append": None if new is None else new.cu_seqlens is not None,
        "rotary": None if rotary is None else (rotary.interleaved, rotary.seqlens is not None),
    }


def pairs(problem: Problem) -> frozenset[Pair]:
    """All pairs of (factor, value) that a call brings together."""
    return frozenset(itertools.combinations(sorted(factors(problem).items(), key=str), 2))


def cost(problem: Problem) -> int:
    """About how many steps an interpreter takes: programs times tiles of keys."""
    p = problem
    tiles_q, tiles_k = (-(-max(n, 1) // 32) for n in (p.max_seqlen_q, p.max_seqlen_k))
    return p.batch_size * p.num_q_heads * tiles_q * tiles_k


def covering(candidates: Iterable[Call], most_cost: int) -> list[Call]:
    """A small selection with every pair that the candidates up to a cost have; greedy."""
    found = [(call, call.copy().problem()) for call in candidates]
    open_ = [(call, cost(p), pairs(p)) for call, p in found if cost(p) <= most_cost]
    missing = set().union(*(covered for _, _, covered in open_))
    chosen = []
    while missing:
        best = max(open_, key=lambda one: len(one[2] & missing) / (4 + one[1]))
        chosen.append(best[0])
        missing -= best[2]
    return chosen


def drawn(strategy: SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """The same ``count`` examples every time; Hypothesis' engine, made for shrinking, takes far longer."""
    generator = random.Random(seed)
    return [_example(strategy, generator) for _ in range(count)]


def _example(strategy: Any, generator: random.Random) -> Any:
    """One example of a strategy of the kinds that :mod:`tests.calls` is made of."""
    strategy = getattr(strategy, "wrapped_strategy", strategy)
    if hasattr(strategy, "definition"):  # composite
        draw = functools.partial(_example, generator=generator)
        return strategy.definition(draw, *strategy.args, **strategy.kwargs)
    if hasattr(strategy, "original_strategies"):  # one_of
        return _example(generator.choice(strategy.original_strategies), generator)
    if hasattr(strategy, "elements"):  # sampled_from and just
        return generator.choice(strategy.elements)
    if hasattr(strategy, "start"):  # integers
        return generator.randint(strategy.start, strategy.end)
    return generator.random() < 0.5  # booleans


@functools.cache
def covering_calls(
    strategy: Callable[[], SearchStrategy[Call]], count: int, seed: int, most_cost: int
) -> tuple[Call, ...]:
    """:func:`covering` of :func:`drawn` calls, once per process."""
    return tuple(covering(drawn(strategy(), count, seed), most_cost))
