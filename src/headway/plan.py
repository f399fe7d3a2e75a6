"""Plan: how the work of one step is spread over the device. It says *how*, never *what*.

A plan is made once per step from the lengths of the batch, owned by the caller, and handed to every
layer of the step. It changes speed, never results. It carries the geometry it was made for, and a call
of another geometry is refused rather than run on the wrong schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from headway.errors import InvalidInputError

#: Keys of one block of work in the host planner; splits are whole blocks.
BLOCK_K = 128

#: No sequence is cut into more pieces than this, whatever the device.
MAX_SPLITS = 128


@dataclass(frozen=True)
class PlanKey:
    """Everything a schedule depends on, lengths aside.

    The fields from ``q_dtype`` on bind the parts that providers keep in a plan: each part belongs to one
    full key. Headway's own schedules do not depend on them, so they are no ground to refuse a plan.
    """

    device: torch.device
    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int | None
    causal: bool
    window_left: int | None
    window_right: int | None
    attention_chunk: int
    q_dtype: torch.dtype | None = None
    kv_dtype: torch.dtype | None = None
    ragged_q: bool = False
    new_keys: int = 0  # keys per sequence that the call appends; -1: as cu_seqlens_k_new says
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    softcap: float = 0.0
    softmax_scale: float = 0.0
    has_sinks: bool = False
    has_qv: bool = False

    @cached_property
    def geometry(self) -> tuple[Any, ...]:
        """The values that a plan and its calls must share, in the order of the fields."""
        return tuple(getattr(self, name) for name in _GEOMETRY)

    def differences(self, other: PlanKey) -> list[str]:
        """The names of the fields of the geometry that differ, with both values."""
        pairs = zip(_GEOMETRY, self.geometry, other.geometry, strict=True)
        return [
            f"{name} {mine} (plan) / {theirs} (call)"
            for name, mine, theirs in pairs
            if mine != theirs
        ]


_GEOMETRY = tuple(itertools.takewhile(lambda name: name != "q_dtype", PlanKey.__dataclass_fields__))


@dataclass(frozen=True)
class Schedule:
    """The work list of a step, in device memory: one item per (sequence, piece of its keys)."""

    num_splits: Tensor  # (B,) int32
    split_start: Tensor  # (B + 1,) int32: first item of each sequence
    work: Tensor  # (W,) int32: sequence of each item, -1 behind the last

    @property
    def batch_size(self) -> int:
        return self.num_splits.shape[0]


class HostLengths(NamedTuple):
    """Lengths of a step, where the host knows them: a provider that plans there waits for no device."""

    cu_seqlens_q: np.ndarray  # (B + 1,) int32
    seqlens_k: np.ndarray  # (B,) int32: each sequence's keys, with those that the step has written


class Part(Protocol):
    """What a provider keeps in a plan: a schedule of its own, buffers, workspaces."""

    def expire(self) -> None:
        """A new step begins: what was computed is stale, the memory it lies in stays."""


P = TypeVar("P", bound=Part)
S = TypeVar("S")


class Scratch:
    """What plans whose calls run one after another may share: memory that no call leaves anything in."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Any] = {}

    def held(self, owner: str, key: Hashable, make: Callable[[], S]) -> S:
        """What belongs to this provider under a key, made when it is first asked for."""
        found: S | None = self._held.get((owner, key))
        if found is None:
            found = self._held.setdefault((owner, key), make())
        return found


@dataclass(frozen=True)
class Plan:
    """A schedule: ``num_splits`` (B,) int32 on the device says into how many pieces each KV is cut.

    Providers keep what they compute once per step, and the memory for it, in the plan's parts. One plan
    serves one stream of work: whoever runs two at once (a draft model beside its target, two CUDA graphs)
    makes a plan for each, and nothing is shared between them but a ``scratch`` that both were given.

    ``replayed``, for providers that plan on the host: the calls are captured in a CUDA graph. What they
    read stays where it is, and sequences may become as long as the page table is wide.
    """

    key: PlanKey
    num_splits: Tensor
    schedule: Schedule | None = None  # for providers that take work off a list
    replayed: bool = False
    scratch: Scratch = field(default_factory=Scratch, compare=False, repr=False)
    _parts: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    _known: list[HostLengths] = field(default_factory=list, compare=False, repr=False)

    @property
    def host_lengths(self) -> HostLengths | None:
        """The step's lengths, if whoever began it knew them."""
        return self._known[0] if self._known else None

    def found(self, owner: str, key: Hashable) -> Any:
        """The part that belongs to this provider and these calls, None where none was made."""
        return self._parts.get((owner, key))

    def part(self, owner: str, key: Hashable, make: Callable[[], P]) -> P:
        """The part that belongs to this provider and these calls, made when it is first asked for.

        ``key`` tells apart what the provider cannot share between calls that the plan fits.
        """
        found: P | None = self._parts.get((owner, key))
        if found is None:
            found = self._parts.setdefault((owner, key), make())
        return found

    def new_step(self, lengths: HostLengths | None = None) -> None:
        """Lengths or page tables have changed in place: parts are computed anew when next used.

        ``lengths``: what they are now, where the host knows it.
        """
        self._known[:] = () if lengths is None else (lengths,)
        for part in tuple(self._parts.values()):
            part.expire()

    def copy_(self, other: Plan) -> None:
        """Take over another step's schedule in place, so that captured CUDA graphs replay with it."""
        differences = self.key.differences(other.key)
        mine, theirs = self.schedule, other.schedule
        if differences or (mine is None) != (theirs is None):
            given = ", ".join(differences) or "a plan of another provider"
            raise InvalidInputError("other", given, "a plan made with the same arguments")
        self.num_splits.copy_(other.num_splits)
        if mine is not None and theirs is not None:
            mine.split_start.copy_(theirs.split_start)
            mine.work.copy_(theirs.work)
        self.new_step()


def plan_splits(
    seqlens_k: Tensor,
    *,
    num_kv_heads: int,
    num_workers: int,
    max_splits: int = MAX_SPLITS,
    block_k: int = BLOCK_K,
) -> Tensor:
    """Into how many pieces to cut each sequence's keys so that every worker gets about the same.

    The rule is FA3's dynamic split: a worker's share is the total number of blocks over all heads, with
    10% slack, divided by the workers; a sequence gets as many pieces as it has shares.

    Args:
        seqlens_k: (B,) int32 lengths, on any device.
        num_workers: processors that work at once (multiprocessors, threads).

    Returns:
        (B,) int32 on the device of ``seqlens_k``; at least 1 each. No copy to the host is made.
    """
    blocks = (seqlens_k.to(torch.int32) + (block_k - 1)) // block_k
    share = torch.ceil(blocks.sum() * 1.1 * num_kv_heads / num_workers).clamp_(min=1)
    return torch.ceil(blocks / share).clamp_(1, max_splits).to(torch.int32)
