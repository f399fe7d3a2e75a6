"""What a provider is: capabilities as data, and a way to run a problem.

``reasons_against`` is the one function that compares the two. Nothing else in the package tests for
features: a provider that learns something says so in its Capabilities and nowhere else.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headway.plan import Plan
from headway.problem import KVLayout, Problem


class Feature(enum.Enum):
    """What a call may ask for beyond plain attention. Values are the argument names users know."""

    CAUSAL = "causal"
    WINDOW = "window_size"
    CHUNK = "attention_chunk"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    SCORE_MOD = "score_mod"
    MASK_MOD = "mask_mod"
    QV = "qv"
    APPEND = "k / v (append to the cache)"
    ROTARY = "rotary_cos / rotary_sin"
    LEFTPAD = "cache_leftpad"
    BATCH_IDX = "cache_batch_idx"
    RAGGED_Q = "cu_seqlens_q"
    SEQUSED_Q = "seqused_q"
    SEQUSED_K = "seqused_k / cache_seqlens"
    DESCALE = "q_descale / k_descale / v_descale"
    UNEQUAL_HEAD_DIMS = "v with another head_dim than k"
    GQA = "fewer key/value heads than query heads"
    LSE = "return of the LSE"
    OUT = "out"


_USES: dict[Feature, Callable[[Problem], bool]] = {
    Feature.CAUSAL: lambda p: p.mask.causal,
    Feature.WINDOW: lambda p: (
        p.mask.window_left is not None or (p.mask.window_right is not None and not p.mask.causal)
    ),
    Feature.CHUNK: lambda p: p.mask.attention_chunk > 0,
    Feature.SOFTCAP: lambda p: p.scores.softcap > 0,
    Feature.SINKS: lambda p: p.scores.sinks is not None,
    Feature.SCORE_MOD: lambda p: p.scores.score_mod is not None,
    Feature.MASK_MOD: lambda p: p.mask.mask_mod is not None,
    Feature.QV: lambda p: p.qv is not None,
    Feature.APPEND: lambda p: p.append is not None,
    Feature.ROTARY: lambda p: p.append is not None and p.append.rotary is not None,
    Feature.LEFTPAD: lambda p: p.leftpad_k is not None,
    Feature.BATCH_IDX: lambda p: p.cache_batch_idx is not None,
    Feature.RAGGED_Q: lambda p: p.ragged_q,
    Feature.SEQUSED_Q: lambda p: p.seqused_q is not None,
    Feature.SEQUSED_K: lambda p: p.seqlens_k is not None,
    Feature.DESCALE: lambda p: any(
        t is not None for t in (p.descales.q, p.descales.k, p.descales.v)
    ),
    Feature.UNEQUAL_HEAD_DIMS: lambda p: p.head_dim != p.head_dim_v,
    Feature.GQA: lambda p: p.num_kv_heads != p.num_q_heads,
    Feature.LSE: lambda p: p.return_lse,
    Feature.OUT: lambda p: p.out is not None,
}

ALL_FEATURES = frozenset(Feature)


def features_of(problem: Problem) -> frozenset[Feature]:
    """The features a problem uses."""
    return frozenset(feature for feature, uses in _USES.items() if uses(problem))


@dataclass(frozen=True)
class HeadDims:
    """Head dims a provider takes: multiples of ``multiple_of`` up to ``maximum``, or listed pairs."""

    maximum: int = 256
    multiple_of: int = 8
    pairs: frozenset[tuple[int, int]] = frozenset()  # further (head_dim, head_dim_v) that work

    def reason_against(self, d: int, dv: int) -> str | None:
        if (d, dv) in self.pairs:
            return None
        if max(d, dv) <= self.maximum and d % self.multiple_of == 0 and dv % self.multiple_of == 0:
            return None
        given = f"head_dim={d}" if d == dv else f"head_dim={d}/{dv}"
        extra = "".join(f" or {a}/{b}" for a, b in sorted(self.pairs))
        return f"{given}: takes multiples of {self.multiple_of} up to {self.maximum}{extra}"


@dataclass(frozen=True)
class Capabilities:
    """What a provider can do on one device. Plain data: it is compared, printed and documented."""

    device_types: frozenset[str]
    #: (dtype of q, dtype of k and v) pairs
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]]
    features: frozenset[Feature]
    head_dims: HeadDims = field(default_factory=HeadDims)
    kv_layouts: frozenset[KVLayout] = frozenset(KVLayout)
    page_size_multiple_of: int = 1
    max_seqlen_q: int | None = None


def reasons_against(capabilities: Capabilities, problem: Problem) -> list[str]:
    """Why a provider with these capabilities cannot run the problem; empty: it can."""
    reasons: list[str] = []
    if problem.device.type not in capabilities.device_types:
        reasons.append(
            f"device {problem.device.type}: runs on {', '.join(sorted(capabilities.device_types))}"
        )
    if (problem.q.dtype, problem.k.dtype) not in capabilities.dtypes:
        reasons.append(f"q {_short(problem.q.dtype)} with k/v {_short(problem.k.dtype)}")
    if (
        why := capabilities.head_dims.reason_against(problem.head_dim, problem.head_dim_v)
    ) is not None:
        reasons.append(why)
    if problem.kv_layout not in capabilities.kv_layouts:
        reasons.append(f"{problem.kv_layout.value} keys and values")
    multiple = capabilities.page_size_multiple_of
    if problem.page_size is not None and problem.page_size % multiple:
        reasons.append(f"page_size={problem.page_size}: takes multiples of {multiple}")
    longest = capabilities.max_seqlen_q
    if longest is not None and problem.max_seqlen_q > longest:
        reasons.append(f"max_seqlen_q={problem.max_seqlen_q}: takes up to {longest}")
    missing = features_of(problem) - capabilities.features
    reasons += [feature.value for feature in Feature if feature in missing]
    return reasons


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Provider(ABC):
    """Something that solves problems on a device. Stateless: all state of a call is in its arguments."""

    name: str

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this provider cannot be used here at all (package missing, device too old), or None."""

    @abstractmethod
    def capabilities(self, device: torch.device) -> Capabilities:
        """What it can do on a device where it is available."""

    @abstractmethod
    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Compute ``(out, lse)``; ``lse`` is None unless the problem asks for it."""

    def plan(self, key: object, seqlens_k: Tensor) -> Plan:
        """A schedule for a step whose KV lengths, (B,) int32 on the device, are these."""
        raise NotImplementedError(f"{self.name} takes no plan")

    def reasons_against(self, problem: Problem) -> list[str]:
        """Why this provider would not run the problem; empty: it would."""
        absent = self.unavailable(problem.device)
        if absent is not None:
            return [absent]
        return reasons_against(self.capabilities(problem.device), problem)
