"""What the layers of one step of an engine share: choices and plans, made by the first layer of a kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from headway import dispatch
from headway.plan import Plan
from headway.problem import Problem, check
from headway.providers.base import Provider


@dataclass
class Step:
    """The calls of one step over one page table and one set of lengths.

    Layers whose calls differ in nothing but their tensors are of one kind: the first of a kind has its
    problem checked, a provider chosen and a plan made, the others only hand over their tensors.

    Plans are made when they are first needed. Under the capture of a CUDA graph that work is recorded with
    the layer, so a replay plans anew for the lengths it finds and nothing is refreshed from outside.
    """

    _calls: dict[Hashable, tuple[Provider, Plan | None]] = field(default_factory=dict)

    def run(self, kind: Hashable, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Solve a problem that only reads the cache. ``kind`` names what layers need not share."""
        call = self._calls.get(kind)
        if call is None:
            provider = dispatch.choose(check(problem))
            call = self._calls[kind] = provider, _plan(provider, problem)
        provider, plan = call
        return provider.run(problem if plan is None else dataclasses.replace(problem, plan=plan))


def _plan(provider: Provider, problem: Problem) -> Plan | None:
    """The provider's schedule for the step's decodes; else a place for what it plans by itself."""
    lengths = problem.seqlens_k
    if lengths is None:
        return None
    if not problem.is_decode or type(provider).plan is Provider.plan:
        return Plan(problem.plan_key, lengths)
    if problem.mask.window_left is not None:
        lengths = lengths.clamp(max=problem.mask.window_left + problem.max_seqlen_q)
    return provider.plan(problem.plan_key, lengths, kv_dtype=problem.k.dtype)
