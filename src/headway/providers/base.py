"""What a provider is: capabilities as data, and a way to run a problem.

``reasons_against`` is the one function that compares the two. Nothing else in the package tests for
features: a provider that learns something says so in its Capabilities and nowhere else.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from headway.errors import UnsupportedError
from headway.kernels.tracing import check_mods
from headway.plan import Plan, PlanKey
from headway.problem import FLOAT8_DTYPES, Append, Descales, KVLayout, Problem


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


#: Caps beyond are large: tanh(score / cap) is small and, from one exponential, has lost its last digits.
LARGE_SOFTCAP = 1000


class Trait(enum.Enum):
    """Circumstances of a call that only matter together with others. Values read as reasons do."""

    DENSE_Q = "q of shape (B, Sq, Hq, D)"
    FLOAT8 = "float8 keys and values"
    WINDOW_RIGHT = "a right bound of window_size"
    APPEND_RAGGED = "cu_seqlens_k_new"
    APPEND_QUANTISED = "new k / v of another dtype than the cache"
    ROTARY_SEQLENS = "rotary_seqlens"
    WINDOW_ZERO = "a bound of 0 in window_size"
    DESCALES_VARY = "descales that differ between sequences or heads"
    SEPARATE_VALUES = "values apart from the keys"
    LARGE_SOFTCAP = f"softcap above {LARGE_SOFTCAP}"


_TRAITS: dict[Trait, Callable[[Problem], bool]] = {
    Trait.DENSE_Q: lambda p: not p.ragged_q,
    Trait.FLOAT8: lambda p: p.k.dtype in FLOAT8_DTYPES,
    Trait.WINDOW_RIGHT: lambda p: p.mask.window_right is not None and not p.mask.causal,
    Trait.APPEND_RAGGED: lambda p: p.append is not None and p.append.cu_seqlens is not None,
    Trait.APPEND_QUANTISED: lambda p: p.append is not None and p.append.k.dtype != p.k.dtype,
    Trait.ROTARY_SEQLENS: lambda p: (
        p.append is not None and p.append.rotary is not None and p.append.rotary.seqlens is not None
    ),
    Trait.WINDOW_ZERO: lambda p: (
        p.mask.window_left == 0 or (p.mask.window_right == 0 and not p.mask.causal)
    ),
    Trait.DESCALES_VARY: lambda p: descales_vary(p.descales),
    Trait.SEPARATE_VALUES: lambda p: p.k.data_ptr() != p.v.data_ptr(),
    Trait.LARGE_SOFTCAP: lambda p: p.scores.softcap > LARGE_SOFTCAP,
}


def descales_vary(descales: Descales) -> bool:
    """False where all are None or one number each, expanded: strides tell without reading them."""
    given = (t for t in (descales.q, descales.k, descales.v) if t is not None)
    return any(
        size > 1 and stride for t in given for size, stride in zip(t.shape, t.stride(), strict=True)
    )


Aspect: TypeAlias = Feature | Trait | KVLayout


def aspects_of(problem: Problem) -> frozenset[Aspect]:
    """Everything about a problem that an :class:`Exclusion` may name."""
    traits = {trait for trait, holds in _TRAITS.items() if holds(problem)}
    return frozenset({*features_of(problem), *traits, problem.kv_layout})


@dataclass(frozen=True)
class DimRange:
    """Head dims from ``d`` (lowest, highest) with head dims of v from ``dv``, both inclusive."""

    d: tuple[int, int]
    dv: tuple[int, int]

    def __contains__(self, dims: tuple[int, int]) -> bool:
        return self.d[0] <= dims[0] <= self.d[1] and self.dv[0] <= dims[1] <= self.dv[1]

    def __str__(self) -> str:
        return "/".join(f"{a}" if a == b else f"{a}..{b}" for a, b in (self.d, self.dv))


@dataclass(frozen=True)
class HeadDims:
    """Head dims a provider takes: multiples of ``multiple_of`` up to ``maximum``, or listed pairs.

    ``unequal`` says which head dims of k and v go together where they differ (None: any two).
    """

    maximum: int = 256
    multiple_of: int = 8
    pairs: frozenset[tuple[int, int]] = frozenset()  # further (head_dim, head_dim_v) that work
    unequal: tuple[DimRange, ...] | None = None
    only: frozenset[int] | None = None  # where not every multiple works: the equal ones that do

    def reason_against(self, d: int, dv: int) -> str | None:
        """Why these head dims do not work, and which would; None where they do."""
        if (d, dv) in self.pairs or self._in_range(d, dv):
            return None
        given = f"head_dim={d}" if d == dv else f"head_dim={d}/{dv}"
        return f"{given}: takes {self}"

    def _in_range(self, d: int, dv: int) -> bool:
        if d % self.multiple_of or dv % self.multiple_of:
            return False
        if d != dv and self.unequal is not None:
            return any((d, dv) in dims for dims in self.unequal)
        return max(d, dv) <= self.maximum and (self.only is None or {d, dv} <= self.only)

    def __str__(self) -> str:
        text = f"multiples of {self.multiple_of} up to {self.maximum}"
        if self.only is not None:
            text = ", ".join(str(d) for d in sorted(self.only))
        if text and self.unequal is not None:
            text += ", k and v alike"
        more = [f"{a}/{b}" for a, b in sorted(self.pairs)]
        more += [str(dims) for dims in self.unequal or ()]
        return " or ".join(one for one in (text, *more) if one)


@dataclass(frozen=True)
class Exclusion:
    """Things that work alone and not together: ``aspects`` all hold (within ``dims``, if given)."""

    aspects: frozenset[Aspect]
    why: str
    dims: DimRange | None = None

    def reason_against(self, present: frozenset[Aspect], dims: tuple[int, int]) -> str | None:
        if not self.aspects <= present or (self.dims is not None and dims not in self.dims):
            return None
        return f"{self}: {self.why}"

    def __str__(self) -> str:
        names = sorted(name_of(aspect) for aspect in self.aspects)
        if self.dims is not None:
            names.append(f"head_dim {self.dims}")
        return " with ".join(names)


def excludes(*aspects: Aspect, why: str, dims: DimRange | None = None) -> Exclusion:
    """An :class:`Exclusion` of these aspects together."""
    return Exclusion(frozenset(aspects), why, dims)


_LAYOUT_NAMES = {
    KVLayout.DENSE: "dense keys and values",
    KVLayout.RAGGED: "ragged keys and values (cu_seqlens_k)",
    KVLayout.PAGED: "paged keys and values (page_table)",
}


def name_of(aspect: Aspect) -> str:
    """An aspect of a call in its user's words."""
    return _LAYOUT_NAMES[aspect] if isinstance(aspect, KVLayout) else aspect.value


#: Bounds on max_seqlen_q that capabilities may set; longer queries are all alike to a provider's answer.
LONGEST_SHORT_QUERY = 128


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
    max_seqlen_q: int | None = None  # at most LONGEST_SHORT_QUERY
    float8_head_dims: HeadDims | None = None  # where they differ from head_dims
    paged_head_dims: HeadDims | None = None  # likewise
    qv_head_dims: DimRange | None = None  # None: as without qv
    sink_dtypes: frozenset[torch.dtype] | None = None  # None: any
    rotary_dim_multiple_of: int = 2
    rotary_in_dtype_of_q: bool = False
    #: score_mod and mask_mod become part of a kernel; without, they may be any callables
    traces_mods: bool = True
    #: strides and addresses of k and v must be multiples of this
    kv_alignment_bytes: int = 1
    #: rows behind a sequence's last key are multiplied by zero: they must be finite numbers
    needs_finite_tails: bool = False
    exclusions: tuple[Exclusion, ...] = ()
    #: why a feature is missing, and what would work instead
    lacks: Mapping[Feature, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_seqlen_q is not None and self.max_seqlen_q > LONGEST_SHORT_QUERY:
            raise ValueError(f"max_seqlen_q: at most {LONGEST_SHORT_QUERY}, or None")

    def head_dims_for(self, problem: Problem) -> HeadDims:
        """The head dims that go with the problem's dtype and layout."""
        if self.float8_head_dims is not None and problem.k.dtype in FLOAT8_DTYPES:
            return self.float8_head_dims
        if self.paged_head_dims is not None and problem.kv_layout is KVLayout.PAGED:
            return self.paged_head_dims
        return self.head_dims


def reasons_against(capabilities: Capabilities, problem: Problem) -> list[str]:
    """Why a provider with these capabilities cannot run the problem; empty: it can."""
    reasons = [
        *_dtype_reasons(capabilities, problem),
        *_shape_reasons(capabilities, problem),
        *_operand_reasons(capabilities, problem),
    ]
    present = aspects_of(problem)
    for feature in Feature:
        if feature in present and feature not in capabilities.features:
            why = capabilities.lacks.get(feature)
            reasons.append(f"{feature.value}: {why}" if why else feature.value)
    dims = problem.head_dim, problem.head_dim_v
    found = (e.reason_against(present, dims) for e in capabilities.exclusions)
    reasons += [reason for reason in found if reason is not None]
    return reasons or (_mod_reasons(problem) if capabilities.traces_mods else [])


def _mod_reasons(p: Problem) -> list[str]:
    try:
        check_mods(p.scores.score_mod, p.mask.mask_mod, p.aux_tensors, p.device)
    except UnsupportedError as error:
        return [str(error)]
    return []


def _dtype_reasons(can: Capabilities, p: Problem) -> list[str]:
    reasons = []
    if p.device.type not in can.device_types:
        reasons.append(f"device {p.device.type}: runs on {', '.join(sorted(can.device_types))}")
    if (p.q.dtype, p.k.dtype) not in can.dtypes:
        pairs = sorted({_pair(*pair) for pair in can.dtypes})
        reasons.append(f"dtype {_pair(p.q.dtype, p.k.dtype)}: takes {', '.join(pairs)}")
    sinks = p.scores.sinks
    if sinks is not None and can.sink_dtypes is not None and sinks.dtype not in can.sink_dtypes:
        takes = ", ".join(sorted(_short(dtype) for dtype in can.sink_dtypes))
        reasons.append(f"sinks of {_short(sinks.dtype)}: takes {takes}")
    return reasons


def _shape_reasons(can: Capabilities, p: Problem) -> list[str]:
    reasons = []
    dims = p.head_dim, p.head_dim_v
    if p.qv is not None and can.qv_head_dims is not None:
        if dims not in can.qv_head_dims:
            reasons.append(f"head_dim={dims[0]}/{dims[1]} with qv: takes {can.qv_head_dims}")
    else:
        why = can.head_dims_for(p).reason_against(*dims)
        reasons += [] if why is None else [why]
    if p.kv_layout not in can.kv_layouts:
        takes = ", ".join(name_of(one) for one in KVLayout if one in can.kv_layouts)
        reasons.append(f"{name_of(p.kv_layout)}: takes {takes}")
    multiple = can.page_size_multiple_of
    if p.page_size is not None and p.page_size % multiple:
        reasons.append(f"page_size={p.page_size}: takes multiples of {multiple}")
    if can.max_seqlen_q is not None and p.max_seqlen_q > can.max_seqlen_q:
        reasons.append(f"max_seqlen_q={p.max_seqlen_q}: takes up to {can.max_seqlen_q}")
    return reasons


def _operand_reasons(can: Capabilities, p: Problem) -> list[str]:
    reasons = []
    if p.append is not None and p.append.rotary is not None:
        dim, multiple = 2 * p.append.rotary.cos.shape[1], can.rotary_dim_multiple_of
        if dim % multiple:
            reasons.append(f"rotary_cos of rotary_dim {dim}: takes multiples of {multiple}")
        if can.rotary_in_dtype_of_q and p.append.rotary.cos.dtype != p.q.dtype:
            given = _short(p.append.rotary.cos.dtype)
            reasons.append(f"rotary_cos of {given}: takes the dtype of q, {_short(p.q.dtype)}")
    if lowest_bit_of_kv(p) % can.kv_alignment_bytes:
        strides = f"strides {tuple(p.k.stride())} and {tuple(p.v.stride())}"
        bytes_ = can.kv_alignment_bytes
        reasons.append(
            f"k / v at {strides}: they would be copied; takes addresses and strides of {bytes_} bytes"
        )
    return reasons


def lowest_bit_of_kv(problem: Problem) -> int:
    """The largest power of two, up to 16, that divides all addresses of rows of k and v, in bytes."""
    k, v = problem.k, problem.v
    return _alignment(k, v, k.data_ptr() | v.data_ptr())


def _alignment(k: Tensor, v: Tensor, bits: int) -> int:
    strides = 0
    for stride in k.stride()[:-1]:
        strides |= stride
    for stride in v.stride()[:-1]:
        strides |= stride
    bits |= strides * k.itemsize | 16
    return bits & -bits


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pair(q: torch.dtype, kv: torch.dtype) -> str:
    return _short(q) if q == kv else f"{_short(q)} with {_short(kv)} k / v"


def kind_of(problem: Problem) -> Hashable | None:
    """All that a provider's answer to ``reasons_against`` may depend on; None: not to be remembered.

    Two problems of one kind get the same answers, so a choice made for one serves the other. Lengths and
    batch sizes are not in it: they may not decide whether a provider runs a call.
    """
    p, mask, scores, append = problem, problem.mask, problem.scores, problem.append
    q, k, v, layout, sinks, descales = p.q, p.k, p.v, p.kv_layout, scores.sinks, p.descales
    left, right, longest = mask.window_left, mask.window_right, p.max_seqlen_q
    q_shape, k_shape, k_at, v_at = q.shape, k.shape, k.data_ptr(), v.data_ptr()
    mods = None
    if scores.score_mod is not None or mask.mask_mod is not None:
        mods = _kind_of_mods(p)
        if mods is None:
            return None
    return (
        q.device,
        q.dtype,
        k.dtype,
        q_shape[-1],
        q_shape[-2],
        k_shape[-2],
        v.shape[-1],
        layout,
        k_shape[1] if layout is KVLayout.PAGED else None,
        _alignment(k, v, k_at | v_at),
        k_at == v_at,
        longest if longest <= LONGEST_SHORT_QUERY else LONGEST_SHORT_QUERY + 1,
        mask.causal,
        left if left is None or left == 0 else 1,
        right if right is None or right == 0 else 1,
        mask.attention_chunk > 0,
        scores.softcap > 0,
        scores.softcap > LARGE_SOFTCAP,
        None if sinks is None else sinks.dtype,
        mods,
        p.cu_seqlens_q is None,
        p.seqused_q is None,
        p.seqlens_k is None,
        p.leftpad_k is None,
        p.cache_batch_idx is None,
        p.qv is None,
        _kind_of_descales(descales),
        None if append is None else _kind_of_append(append),
        None if p.out is None else p.out.dtype,
        p.return_lse,
    )


def _kind_of_descales(d: Descales) -> Hashable:
    if d.q is None and d.k is None and d.v is None:
        return None
    return descales_vary(d)


def _kind_of_append(append: Append) -> Hashable:
    rotary = append.rotary
    turned = None
    if rotary is not None:
        turned = rotary.cos.shape[1], rotary.cos.dtype, rotary.interleaved, rotary.seqlens is None
    return append.k.dtype, append.cu_seqlens is None, turned


def _kind_of_mods(p: Problem) -> Hashable | None:
    """The mods themselves, but not kept alive; None for callables that cannot be referred to weakly."""
    score_mod, mask_mod = p.scores.score_mod, p.mask.mask_mod
    try:
        return (
            None if score_mod is None else weakref.ref(score_mod),
            None if mask_mod is None else weakref.ref(mask_mod),
            tuple((t.dtype, t.dim()) for t in p.aux_tensors),
        )
    except TypeError:
        return None


#: Runs a problem: ``(out, lse)``, the latter None unless the problem asks for it.
Runner: TypeAlias = Callable[[Problem], tuple[Tensor, Tensor | None]]


class Runners:
    """What a provider made ready, by the signature of the problems that it is for; see ``runner``."""

    def __init__(self, make: Callable[[Problem], Runner]) -> None:
        self._make = make
        self._made: dict[Hashable, Runner] = {}
        _ALL_RUNNERS.append(self)

    def __call__(self, problem: Problem) -> Runner:
        """The runner for a problem, made when one of its signature comes first."""
        key = signature_of(problem)
        if key is None:
            return self._make(problem)
        found = self._made.get(key)
        if found is None:
            if len(self._made) >= _MOST_RUNNERS:
                self._made.clear()
            found = self._made[key] = self._make(problem)
        return found

    def forget(self) -> None:
        self._made.clear()


_MOST_RUNNERS = 4096
_ALL_RUNNERS: list[Runners] = []


def forget() -> None:
    """Make everything ready anew."""
    for runners in _ALL_RUNNERS:
        runners.forget()


#: What of a problem's tensors, and what else of it, a runner may depend on. Layouts follow from both.
_TENSORS_OF = operator.attrgetter(
    *("q", "k", "v", "qv", "out", "cu_seqlens_q", "seqused_q", "cu_seqlens_k", "seqlens_k"),
    *("leftpad_k", "cache_batch_idx", "page_table", "scores.sinks"),
    *("descales.q", "descales.k", "descales.v"),
)
_VALUES_OF = operator.attrgetter(
    *("batch_size", "max_seqlen_q", "max_seqlen_k", "return_lse"),
    *("mask.causal", "mask.window_left", "mask.window_right", "mask.attention_chunk"),
    *("scores.softmax_scale", "scores.softcap"),
    *("hints.num_splits", "hints.pack_gqa", "hints.sm_margin", "hints.deterministic"),
)


def signature_of(problem: Problem) -> Hashable | None:
    """Equal for problems that one runner runs; None for those with mods, and where nothing runs."""
    p = problem
    if p.scores.score_mod is not None or p.mask.mask_mod is not None or p.q.is_meta:
        return None
    k_at, v_at = p.k.data_ptr(), p.v.data_ptr()
    tensors: tuple[Tensor | None, ...] = _TENSORS_OF(p)
    new: Hashable = None
    if p.append is not None:
        new, rotary = p.append.cu_seqlens is p.cu_seqlens_q, p.append.rotary
        tensors = (*tensors, p.append.k, p.append.v, p.append.cu_seqlens)
        if rotary is not None:
            new = new, rotary.interleaved
            tensors = (*tensors, rotary.cos, rotary.sin, rotary.seqlens)
    return (
        (k_at | v_at) & 15,
        k_at == v_at,
        _VALUES_OF(p),
        None if p.plan is None else p.plan.key.geometry,
        new,
        *[None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in tensors],
    )


class Repeat(Protocol):
    """A layer's tensors in, (like q, with head dim Dv) out; see :meth:`Provider.repeat`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new_k: Tensor,
        new_v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor: ...


class Provider(ABC):
    """Something that solves problems on a device. Stateless: all state of a call is in its arguments."""

    name: str
    #: the package's interface generation; Headway's own kernels, which are no package, answer to every one
    generation: int | None = None
    is_package: bool = False
    #: ``prepare`` computes on the host: it comes before each replay of a graph instead of being captured
    plans_on_host: bool = False

    def answers_to(self, version: int | None) -> bool:
        """Whether a call that asks for this interface generation (None: any) may run here."""
        return version is None or not self.is_package or self.generation == version

    def package(self) -> tuple[str, str] | None:
        """Name and version of the package that is installed for it; None where none is (needed)."""
        return None

    def documented(self) -> Mapping[str, Capabilities]:
        """Its capabilities by kind of device, with the newest package that it was written against.

        What documentation says; ``capabilities`` says what holds here.
        """
        return {}

    def load(self) -> None:  # noqa: B027 - most have nothing to do
        """Import what a call needs. Afterwards ``unavailable`` knows if that failed.

        Called when the provider has been chosen, and not before: packages are slow to import.
        """

    def note(self, problem: Problem) -> str:
        """What a user of this provider should know about such a call; empty: nothing."""
        return ""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this provider cannot be used here at all (package missing, device too old), or None."""

    @abstractmethod
    def capabilities(self, device: torch.device) -> Capabilities:
        """What it can do on a device where it is available."""

    def prepare(self, problem: Problem) -> None:  # noqa: B027 - as above
        """Fill this provider's part of the problem's plan now.

        Its first call of a step does so by itself; under a captured graph there is no such call, so
        whoever replays one prepares first. Where ``plans_on_host``, that takes a plan made for replays
        (``Plan.replayed``), and the lengths if they are known (``Plan.new_step``).
        """

    @abstractmethod
    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Compute ``(out, lse)``; ``lse`` is None unless the problem asks for it."""

    def runner(self, problem: Problem) -> Runner:
        """What runs this problem, and every other one that a later call of the same signature makes.

        Between them only the tensors differ, neither their shapes, strides, dtypes and devices, nor
        which of them there are, nor any plain value. Where tensors lie, and what is in them, may differ,
        but for ``k`` and ``v`` being aligned alike and being one. A provider that can make more ready
        for such calls than ``run`` does overrides this; several threads may run what it returns.
        """
        return self.run

    def repeat(self, problem: Problem) -> Repeat:
        """The problem's call for the other layers of a step, which differ from it in tensors alone.

        The problem appends to a cache and has been checked. A provider that can keep more than the
        Problem between layers overrides this.
        """

        def again(
            q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, sinks: Tensor | None
        ) -> Tensor:
            assert problem.append is not None
            layer = dataclasses.replace(
                problem,
                q=q,
                k=k,
                v=v,
                scores=dataclasses.replace(problem.scores, sinks=sinks),
                append=dataclasses.replace(problem.append, k=new_k, v=new_v),
            )
            return self.run(layer)[0]

        return again

    def plan(
        self,
        key: PlanKey,
        seqlens_k: Tensor,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
        num_splits: int = 0,
        sm_margin: int = 0,
    ) -> Plan:
        """A schedule for a step whose KV lengths, (B,) int32 on the device, are these.

        ``kv_dtype`` is that of the caches; ``num_splits`` bounds the pieces of a sequence (0: automatic);
        ``sm_margin`` processors are kept free.
        """
        raise NotImplementedError(f"{self.name} takes no plan")

    def reasons_against(self, problem: Problem) -> list[str]:
        """Why this provider would not run the problem; empty: it would.

        The answer may depend on what :func:`kind_of` holds, and on nothing else of the problem.
        """
        absent = self.unavailable(problem.device)
        if absent is not None:
            return [absent]
        return reasons_against(self.capabilities(problem.device), problem)
