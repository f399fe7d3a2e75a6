"""Headway's own kernels for Hopper (SM90), in Gluon: one for prefill, one for decode and absorbed MLA.

What is one query tile per KV head or less is decode: its kernel spreads the keys over the device by a
plan that another kernel makes from the lengths. A Plan keeps that, so that all layers of a step share it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import operator
import os
from collections.abc import Callable, Hashable, Mapping
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from headway import providers
from headway.plan import Plan, PlanKey
from headway.problem import FLOAT8_DTYPES, Append, Descales, KVLayout, Problem
from headway.providers import base
from headway.providers._packages import delivered
from headway.providers.base import (
    ALL_FEATURES,
    Capabilities,
    DimRange,
    Feature,
    HeadDims,
    Provider,
    Runner,
    Runners,
    Trait,
    excludes,
)

if TYPE_CHECKING:
    from headway.kernels.hopper.decode_plan import DecodePlan
    from headway.kernels.mods import ModArguments

#: Packed query rows (tokens times heads that share a KV head) up to which a call is decode: one tile.
DECODE_ROWS = 64

#: Query tokens up to which absorbed MLA is decode: each tile of 64 packed rows reads the cache again.
LATENT_TOKENS = 16

#: Which kernel runs a call: decode with values that are keys too is one of its own.
Work = Literal["prefill", "decode", "absorbed MLA"]

#: Meta tensors are for compiling ahead of time.
_DEVICES = frozenset({"cuda", "meta"})

_FLOAT8 = torch.float8_e4m3fn
_HALF = frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)})
_HALF_OVER_FLOAT8 = frozenset({(q, _FLOAT8) for q in (torch.bfloat16, torch.float16)})
_FLOAT8_CACHES = _HALF_OVER_FLOAT8 | {(_FLOAT8, _FLOAT8)}

_LARGE_SOFTCAP = excludes(
    Trait.LARGE_SOFTCAP,
    why="scores would be off by 1.2e-7 of the cap; the portable kernels keep them",
)

_PREFILL = Capabilities(
    device_types=_DEVICES,
    dtypes=_HALF | _HALF_OVER_FLOAT8,
    features=ALL_FEATURES - {Feature.QV},
    head_dims=HeadDims(maximum=256, multiple_of=8),
    kv_alignment_bytes=16,
    exclusions=(_LARGE_SOFTCAP,),
)

_DECODE = Capabilities(
    device_types=_DEVICES,
    dtypes=_HALF | _FLOAT8_CACHES,
    features=ALL_FEATURES - {Feature.QV},
    head_dims=HeadDims(maximum=256, multiple_of=8),
    float8_head_dims=HeadDims(maximum=256, multiple_of=16),
    kv_layouts=frozenset({KVLayout.DENSE, KVLayout.PAGED}),
    kv_alignment_bytes=16,
    exclusions=(_LARGE_SOFTCAP,),
)

_WHOLE_ROWS = DimRange((576, 576), (512, 512))
_LATENT = Capabilities(
    device_types=_DEVICES,
    dtypes=_HALF | _FLOAT8_CACHES,
    features=ALL_FEATURES,
    head_dims=HeadDims(only=frozenset(), pairs=frozenset({(576, 512)})),
    qv_head_dims=DimRange((8, 64), (264, 512)),
    kv_layouts=frozenset({KVLayout.DENSE, KVLayout.PAGED}),
    max_seqlen_q=LATENT_TOKENS,
    kv_alignment_bytes=16,
    exclusions=(
        _LARGE_SOFTCAP,
        excludes(Trait.SEPARATE_VALUES, why="v must be the first columns of k", dims=_WHOLE_ROWS),
    ),
)

_CAPABILITIES: dict[Work, Capabilities] = {
    "prefill": _PREFILL,
    "decode": _DECODE,
    "absorbed MLA": _LATENT,
}

#: What one of them can do. Which would run a call, and what that one says to it, is in the reasons.
_ANY = dataclasses.replace(
    _PREFILL,
    dtypes=_PREFILL.dtypes | _DECODE.dtypes,
    features=_PREFILL.features | _DECODE.features | _LATENT.features,
    head_dims=HeadDims(maximum=256, multiple_of=8, pairs=_LATENT.head_dims.pairs),
    float8_head_dims=_DECODE.float8_head_dims,
    qv_head_dims=_LATENT.qv_head_dims,
)


def work_of(problem: Problem) -> Work:
    """The kernel for a call, known without looking at lengths."""
    p = problem
    if p.qv is not None or p.head_dim_v > 256:
        return "absorbed MLA"
    if p.kv_layout is KVLayout.RAGGED:
        return "prefill"
    rows = p.max_seqlen_q * (p.num_q_heads // p.num_kv_heads)
    return "decode" if p.max_seqlen_q <= 1 or rows <= DECODE_ROWS else "prefill"


class HopperProvider(Provider):
    name = "hopper"

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type == "meta":  # stands for the target that HEADWAY_TARGET names
            is_hopper = os.environ.get("HEADWAY_TARGET") == "sm90"
            return None if is_hopper else "runs on sm90; no such target is named for meta tensors"
        if device.type != "cuda" or torch.version.hip is not None:
            return "runs on NVIDIA GPUs of compute capability 9.0"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            given = "{}.{}".format(*capability)
            return f"runs on compute capability 9.0; this device has {given}"
        if _triton_version() < (3, 6):
            return "needs triton 3.6 or newer"
        return None

    def capabilities(self, device: torch.device) -> Capabilities:
        return _ANY

    def documented(self) -> Mapping[str, Capabilities]:
        return {f"sm90, {work}": can for work, can in _CAPABILITIES.items()}

    def reasons_against(self, problem: Problem) -> list[str]:
        absent = self.unavailable(problem.device)
        return [absent] if absent is not None else refusals(problem)

    def note(self, problem: Problem) -> str:
        work = work_of(problem)
        if work != "prefill" or problem.k.dtype not in FLOAT8_DTYPES:
            return f"{work} kernel"
        against = _kernels().reason_against_widening(problem)
        if against is None:
            return "prefill kernel, float8 keys and values widened before it"
        return f"portable prefill kernel: {against}"

    def plan(
        self,
        key: PlanKey,
        seqlens_k: Tensor,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
        num_splits: int = 0,
        sm_margin: int = 0,
    ) -> Plan:
        if not _plans(key):
            # What the decode kernel does not take runs on the portable kernels, by a schedule of theirs.
            return providers.get("portable").plan(
                key, seqlens_k, kv_dtype=kv_dtype, num_splits=num_splits, sm_margin=sm_margin
            )
        made = Plan(dataclasses.replace(key, sm_margin=sm_margin), torch.zeros_like(seqlens_k))
        if any(kv == kv_dtype for _, kv in _DECODE.dtypes):
            size = kv_dtype.itemsize
            heads = key.batch_size * key.num_kv_heads
            abreast = _are_narrow(key.head_dim, key.head_dim_v, size, key.page_size, heads)
            _step_of(made, key.max_seqlen_q, size, sm_margin, abreast)
        return made

    def prepare(self, problem: Problem) -> None:
        if problem.plan is not None and work_of(problem) != "prefill":
            lengths = _Lengths(problem)
            lengths.step(problem, problem.plan).fill(problem, lengths)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return _RUNNERS(problem)(problem)

    def _run_any(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Problems in any form, brought into the one that kernels take."""
        if _runs_elsewhere(problem):
            return providers.get("portable").run(problem)
        out = problem.empty_out()
        lse = problem.empty_lse() if problem.return_lse else None
        q = problem.q
        if problem.append is not None:
            q = _kernels().append(problem, problem.append)
        if out.numel() == 0 or problem.max_seqlen_q == 0:
            return out, lse
        if problem.k.numel() == 0:
            problem = _with_a_row_of_no_sequence(problem)
        q, work = _with_aligned_rows(q), work_of(problem)
        if work != "prefill" and problem.scores.softmax_scale <= 0:
            problem, q = _with_a_positive_scale(problem, q)
        to = out
        if problem.out is not None and not _writes(work, out, q.dtype):
            to = torch.empty(out.shape, dtype=q.dtype, device=out.device)
        _SOLVERS[work](problem)(problem, q, to, lse)
        return out if to is out else delivered(problem, to), lse

    def runner(self, problem: Problem) -> Runner:
        work, p = work_of(problem), problem
        if _runs_elsewhere(p):
            return providers.get("portable").runner(p)
        plain = p.max_seqlen_q > 0 and p.scores.softmax_scale > 0
        plain &= p.scores.score_mod is None and p.mask.mask_mod is None
        if not plain or p.q.numel() == 0 or p.k.numel() == 0 or p.head_dim_v == 0:
            return self._run_any
        given = [t for t in (p.q, p.qv, p.out) if t is not None]
        if not all(map(_is_aligned, given)) or not (
            p.out is None or _writes(work, p.out, p.q.dtype)
        ):
            return self._run_any
        fused = work == "decode" and _is_fused(p)
        solve, kernels = _FusedDecode(p) if fused else _SOLVERS[work](p), _kernels()
        make_out = _maker(p.out_shape, p.out_dtype, p.device)
        make_lse = _maker(p.lse_shape, torch.float32, p.device)

        return_lse, appends = p.return_lse, p.append is not None and not fused

        def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
            q, qv, out = problem.q, problem.qv, problem.out
            if out is None:
                out = make_out()
            if (q.data_ptr() | out.data_ptr() | (0 if qv is None else qv.data_ptr())) & 15:
                return self._run_any(problem)
            if fused:
                if not _has_aligned_rows(problem.append):
                    return self._run_any(problem)
            elif appends:
                q = kernels.append(problem, problem.append)
            lse = make_lse() if return_lse else None
            solve(problem, q, out, lse)
            return out, lse

        return run


def _maker(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Makes uninitialised tensors: strides given, torch takes two thirds of the time."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def refusals(problem: Problem) -> list[str]:
    """What the kernel that would run a call has against it."""
    work = work_of(problem)
    reasons = base.reasons_against(_CAPABILITIES[work], problem)
    dims = problem.head_dim, problem.head_dim_v
    multiple = 16 // problem.q.element_size()  # rows of queries begin at multiples of 16 bytes
    if problem.qv is not None and any(d % multiple for d in dims):
        reasons.append(f"head_dim={dims[0]}/{dims[1]} with qv: takes multiples of {multiple}")
    if problem.qv is None and dims[1] > 256 and _steps(problem.k) != _steps(problem.v):
        reasons.append("v of other strides than k: must be the first columns of k")
    return [f"{reason} (in {work})" for reason in reasons]


def _runs_elsewhere(problem: Problem) -> bool:
    """Whether the portable kernels run a call: one of float8 keys that are better not widened. That is for
    lengths to decide, and so not a refusal."""
    widened = work_of(problem) == "prefill" and problem.k.dtype in FLOAT8_DTYPES
    return widened and _kernels().reason_against_widening(problem) is not None


def _steps(t: Tensor) -> list[int]:
    """Strides that count: those of dimensions with more than one place."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _plans(key: PlanKey) -> bool:
    """Whether calls of this geometry, of the dtypes it takes, run by plans of the decode kernel."""
    d, dv = key.head_dim, key.head_dim_v
    if dv > 256:
        whole = _LATENT.head_dims.reason_against(d, dv) is None
        assert _LATENT.qv_head_dims is not None
        return key.max_seqlen_q <= LATENT_TOKENS and (whole or (d, dv) in _LATENT.qv_head_dims)
    rows = key.max_seqlen_q * (key.num_q_heads // key.num_kv_heads)
    few = key.max_seqlen_q == 1 or rows <= DECODE_ROWS
    return few and _DECODE.head_dims.reason_against(d, dv) is None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    numbers = metadata.version("triton").split(".")[:2]
    return tuple(int(number) for number in numbers)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The launchers, imported with Triton when the first call runs."""
    from headway.kernels.hopper import decode, decode_plan, forward, widen
    from headway.kernels.portable import append

    return SimpleNamespace(
        append=append.append,
        appends=decode.appends,
        prepare_forward=forward.prepare,
        reason_against_widening=widen.reason_against,
        widen=widen.widen,
        widened_at_once=widen.sequences_at_once,
        make_plan=decode.make_plan,
        plan_decode=decode_plan.plan_decode,
        prepare_decode=decode.prepare,
        are_narrow=decode.are_narrow,
        lie_abreast=decode.lie_abreast,
    )


# --- operands -----------------------------------------------------------------------------------------


def _with_a_positive_scale(p: Problem, q: Tensor) -> tuple[Problem, Tensor]:
    """The same scores with a scale above 0: decode takes the maximum before it scales."""
    scale = p.scores.softmax_scale
    turn = _negated if scale < 0 else torch.zeros_like
    scores = dataclasses.replace(p.scores, softmax_scale=-scale or 1.0)
    qv = None if p.qv is None else turn(p.qv)
    return dataclasses.replace(p, scores=scores, qv=qv), turn(q)


def _negated(q: Tensor) -> Tensor:
    return q.to(torch.bfloat16).neg_().to(q.dtype) if q.dtype in FLOAT8_DTYPES else -q


def _with_aligned_rows(t: Tensor) -> Tensor:
    return t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format)


def _writes(work: Work, out: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can write the caller's tensor itself: prefill writes the dtype of q alone."""
    return _is_aligned(out) and (work != "prefill" or out.dtype == dtype)


def _is_aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    strides = 0
    for stride in t.stride()[:-1]:
        strides |= stride
    return (t.data_ptr() | strides * t.element_size()) % 16 == 0


def _with_a_row_of_no_sequence(p: Problem) -> Problem:
    """A problem without any key, over memory that exists: the copy engine takes no empty tensors."""
    none = torch.zeros(p.batch_size, dtype=torch.int32, device=p.device)
    length = p.k.shape[1] if p.kv_layout is KVLayout.PAGED else 8
    rows = (length,) if p.kv_layout is KVLayout.RAGGED else (1, length)
    k, v = (t.new_zeros(*rows, p.num_kv_heads, t.shape[-1]) for t in (p.k, p.v))
    index = none if p.kv_layout is KVLayout.DENSE else p.cache_batch_idx
    return dataclasses.replace(p, k=k, v=v, seqlens_k=none, cache_batch_idx=index, append=None)


def _capacity(p: Problem) -> int:
    """Rows of keys that a sequence has room for."""
    if p.kv_layout is KVLayout.PAGED:
        assert p.page_table is not None
        return p.page_table.shape[1] * p.k.shape[1]
    return p.max_seqlen_k if p.kv_layout is KVLayout.RAGGED else p.k.shape[1]


def _ends(p: Problem) -> Tensor | None:
    """(B,) end of each sequence's keys, appended ones included; None: all rows are keys."""
    if p.append is None or p.seqlens_k is None:
        return p.seqlens_k
    cu = p.append.cu_seqlens
    if cu is None:
        return p.seqlens_k + p.append.k.shape[1]
    return p.seqlens_k + (cu[1:] - cu[:-1])


def _right(p: Problem) -> int | None:
    return 0 if p.mask.causal else p.mask.window_right


#: Solves problems of one signature: the problem, its queries, where to put the output and the LSE.
Solver: TypeAlias = Callable[[Problem, Tensor, Tensor, Tensor | None], None]


# --- prefill ------------------------------------------------------------------------------------------


class _Prefill:
    """Solves problems of one signature with the forward kernel."""

    def __init__(self, _: Problem) -> None:
        self._prepared: Callable[..., None] | None = None

    def __call__(
        self,
        p: Problem,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
        descales: Tensor | None = None,
    ) -> None:
        given = (
            q,
            p.k,
            p.v,
            out,
            lse,
            p.cu_seqlens_q,
            p.cu_seqlens_k,
            p.seqused_q,
            _ends(p),
            p.leftpad_k,
            p.cache_batch_idx,
            p.page_table,
            p.scores.sinks,
            descales,
        )
        prepared = self._prepared
        if prepared is None:
            prepared = self._prepared = self._prepare(p, given)
        prepared(*given)

    def _prepare(self, p: Problem, given: tuple[Tensor | None, ...]) -> Callable[..., None]:
        mods = _mods(p)
        prepared: Callable[..., None] = _kernels().prepare_forward(
            *given,
            max_seqlen_q=p.max_seqlen_q if p.ragged_q else p.q.shape[1],
            max_seqlen_k=_capacity(p) if p.seqlens_k is None else p.max_seqlen_k,
            softmax_scale=p.scores.softmax_scale,
            causal=p.mask.causal,
            window_left=p.mask.window_left,
            window_right=_right(p),
            attention_chunk=p.mask.attention_chunk,
            softcap=p.scores.softcap,
            score_mod=None if mods is None else mods.score_mod,
            mask_mod=None if mods is None else mods.mask_mod,
            aux=None if mods is None else mods.aux,
            num_splits=p.hints.num_splits,
        )
        return prepared


class _WidenedPrefill:
    """The same over 16-bit copies of float8 keys and values, of some sequences after the other where there
    is no room for those of all."""

    def __init__(self, p: Problem) -> None:
        size = max(_kernels().widened_at_once(p), 1)
        parts = [slice(i, min(i + size, p.batch_size)) for i in range(0, p.batch_size, size)]
        self._parts = [(part, _Prefill(p)) for part in parts]

    def __call__(self, p: Problem, q: Tensor, out: Tensor, lse: Tensor | None) -> None:
        if len(self._parts) == 1:
            _widened(self._parts[0][1], p, q, out, lse)
            return
        p = dataclasses.replace(p, seqlens_k=_ends(p), append=None)
        for part, attend in self._parts:
            rows = slice(None) if p.ragged_q else part
            of_part = None if lse is None else lse[rows]
            _widened(attend, _sequences(p, part), q[rows], out[rows], of_part)


def _widened(attend: _Prefill, p: Problem, q: Tensor, out: Tensor, lse: Tensor | None) -> None:
    wide = _kernels().widen(p, q.dtype)
    layout = KVLayout.RAGGED if p.kv_layout is KVLayout.RAGGED else KVLayout.DENSE
    p = dataclasses.replace(
        p, k=wide.k, v=wide.v, kv_layout=layout, page_table=None, cache_batch_idx=None
    )
    attend(p, q, out, lse, wide.descales)


def _sequences(p: Problem, some: slice) -> Problem:
    """Some of a problem's sequences. What is ready is for tensors at multiples of 16 bytes."""
    part = p.of_sequences(some)
    return dataclasses.replace(
        part,
        cu_seqlens_q=_aligned(part.cu_seqlens_q),
        seqused_q=_aligned(part.seqused_q),
        seqlens_k=_aligned(part.seqlens_k),
        leftpad_k=_aligned(part.leftpad_k),
        cache_batch_idx=_aligned(part.cache_batch_idx),
        page_table=_aligned(part.page_table),
        descales=Descales(None, _aligned(part.descales.k), _aligned(part.descales.v)),
    )


def _aligned(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def _prefill(p: Problem) -> Solver:
    return _WidenedPrefill(p) if p.k.dtype in FLOAT8_DTYPES else _Prefill(p)


def _mods(p: Problem) -> ModArguments | None:
    score_mod, mask_mod = p.scores.score_mod, p.mask.mask_mod
    if score_mod is None and mask_mod is None:
        return None
    from headway.kernels.mods import trace_mods

    return trace_mods(score_mod, mask_mod, p.aux_tensors, p.device, "gluon")


# --- decode -------------------------------------------------------------------------------------------


class _Step:
    """The decode kernel's plan of a step: device buffers, and what they were last filled from."""

    def __init__(self, plan: DecodePlan) -> None:
        self.plan = plan
        self._source: Hashable = None
        #: counters start at zero; while a graph is captured, nothing is written yet
        self._is_clear = not torch.cuda.is_current_stream_capturing()

    def expire(self) -> None:
        self._source = None

    def fill(self, p: Problem, lengths: _Lengths) -> None:
        """Plan for the problem's lengths unless that was done in this step.

        What is done while a CUDA graph is captured becomes part of the graph, and so every replay
        plans anew; it is not done for calls outside the graph. (Two graphs captured one right after
        the other need a ``new_step`` between them, or else the second counts on the first.)
        """
        capturing = torch.cuda.is_current_stream_capturing()
        if lengths.only is None:
            at: Hashable = tuple([length(p).data_ptr() for length in lengths.given])
        else:
            at = lengths.only(p).data_ptr()
        source = capturing, lengths.kind, at
        if source == self._source:
            return
        if not (self._is_clear or capturing):
            self.plan.arrivals.zero_()
            self._is_clear = True
        _fill(self.plan, p, lengths)
        self._source = source


class _Lengths:
    """What the schedules of problems of one signature are made from."""

    def __init__(self, p: Problem) -> None:
        self.capacity = _capacity(p)
        self.rows_q = p.max_seqlen_q if p.ragged_q else p.q.shape[1]
        self.itemsize = p.k.element_size()
        heads = p.batch_size * p.num_kv_heads
        self.abreast = (
            p.append is None
            and _are_narrow(p.head_dim, p.head_dim_v, self.itemsize, p.page_size, heads)
            and all(map(_kernels().lie_abreast, (p.k, p.v)))
        )
        names = ["seqlens_k", "leftpad_k", "cache_batch_idx", "cu_seqlens_q", "seqused_q"]
        self.new_tokens = 0
        if p.append is not None:
            names.append("append.cu_seqlens")
            if p.append.cu_seqlens is None:
                self.new_tokens = p.append.k.shape[1]
        reads = {name: operator.attrgetter(name) for name in names}
        given = [name for name, read in reads.items() if read(p) is not None]
        #: how to find the tensors, where there are any
        self.given = tuple(reads[name] for name in given)
        self.only = self.given[0] if len(given) == 1 else None
        self.kind = (self.capacity, self.new_tokens, *given)

    def step(self, p: Problem, plan: Plan) -> _Step:
        """The plan's part for calls of this kind."""
        margin, of_plan = p.hints.sm_margin, plan.key.sm_margin
        if margin < of_plan:
            margin = of_plan
        kind = self.rows_q, self.itemsize, margin, self.abreast
        found: _Step | None = plan.found("hopper", kind)
        return found or _step_of(plan, *kind)


def _are_narrow(d: int, dv: int, itemsize: int, page_size: int | None, heads: int) -> bool:
    """Whether the kernel would read two heads as one, where they lie so that it can."""
    narrow: bool = _kernels().are_narrow(d, dv, itemsize, page_size or 0, heads)
    return narrow


def _step_of(plan: Plan, rows_q: int, itemsize: int, sm_margin: int, abreast: bool) -> _Step:
    """The plan's part for calls of this kind, made when it is first asked for."""
    key = plan.key
    kind = (rows_q, itemsize, max(sm_margin, key.sm_margin), abreast)
    return plan.part("hopper", kind, functools.partial(_make_step, key, *kind))


def _make_step(key: PlanKey, rows_q: int, itemsize: int, sm_margin: int, abreast: bool) -> _Step:
    return _Step(
        _buffers(
            key.batch_size,
            (key.num_q_heads, key.num_kv_heads),
            rows_q,
            (key.head_dim, key.head_dim_v),
            itemsize,
            key.page_size,
            sm_margin,
            key.device,
            abreast,
        )
    )


def _buffers(
    batch_size: int,
    heads: tuple[int, int],
    rows_q: int,
    dims: tuple[int, int],
    itemsize: int,
    page_size: int | None,
    sm_margin: int,
    device: torch.device,
    abreast: bool,
) -> DecodePlan:
    d, dv = dims
    if dv > 256 and d > dv:  # rows of a whole latent cache: rope behind the latent part
        d -= dv
    made: DecodePlan = _kernels().make_plan(
        batch_size=batch_size,
        num_kv_heads=heads[1],
        group=heads[0] // heads[1],
        max_seqlen_q=rows_q,
        head_dim=d,
        head_dim_v=dv,
        device=device,
        itemsize=itemsize,
        page_size=page_size or 0,
        sm_margin=sm_margin,
        abreast=abreast,
    )
    return made


def _fill(plan: DecodePlan, p: Problem, lengths: _Lengths) -> None:
    _kernels().plan_decode(
        plan,
        seqlens_k=p.seqlens_k,
        capacity=lengths.capacity,
        rows_q=lengths.rows_q,
        leftpad_k=p.leftpad_k,
        cache_batch_idx=p.cache_batch_idx,
        cu_seqlens_q=p.cu_seqlens_q,
        seqused_q=p.seqused_q,
        new_tokens=lengths.new_tokens,
        cu_seqlens_new=None if p.append is None else p.append.cu_seqlens,
        window_left=p.mask.window_left,
        window_right=_right(p),
        chunk=p.mask.attention_chunk,
    )


def _plan_for(p: Problem, lengths: _Lengths) -> DecodePlan:
    """The step's plan, from the caller's or for this call alone."""
    if p.plan is not None:
        step = lengths.step(p, p.plan)
        step.fill(p, lengths)
        return step.plan
    made = _buffers(
        p.batch_size,
        (p.num_q_heads, p.num_kv_heads),
        lengths.rows_q,
        (p.head_dim, p.head_dim_v),
        lengths.itemsize,
        p.page_size,
        p.hints.sm_margin,
        p.device,
        lengths.abreast,
    )
    _fill(made, p, lengths)
    return made


class _Decode:
    """Solves problems of one signature with the decode kernel."""

    is_fused = False

    def __init__(self, p: Problem) -> None:
        self._lengths = _Lengths(p)
        self._prepared: Callable[..., None] | None = None

    def __call__(self, p: Problem, q: Tensor, out: Tensor, lse: Tensor | None) -> None:
        self.launch(p, q, p.k, p.v, out, lse)

    def launch(
        self,
        p: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        qv: Tensor | None = None,
        *,
        whole_rows: bool = False,
    ) -> None:
        plan, scales = _plan_for(p, self._lengths), p.descales
        table, sinks = p.page_table, p.scores.sinks
        prepared = self._prepared
        if prepared is None:
            mods = _mods(p)
            prepared = self._prepared = _kernels().prepare_decode(
                q,
                k,
                v,
                out,
                plan,
                lse,
                table,
                sinks,
                qv,
                scales.q,
                scales.k,
                scales.v,
                softmax_scale=p.scores.softmax_scale,
                max_seqlen_q=p.max_seqlen_q,
                leftpad=p.leftpad_k is not None,
                window_left=p.mask.window_left,
                window_right=_right(p),
                chunk=p.mask.attention_chunk,
                softcap=p.scores.softcap,
                score_mod=None if mods is None else mods.score_mod,
                mask_mod=None if mods is None else mods.mask_mod,
                aux=None if mods is None else mods.aux,
                append=p.append if self.is_fused else None,
                longest_new=_longest_new(p) if self.is_fused else 0,
                whole_rows=whole_rows,
            )
        new = p.append if self.is_fused else None
        # Not by a tuple that is unpacked: that takes longer than the call.
        prepared(
            plan, q, k, v, out, lse, table, sinks, qv, scales.q, scales.k, scales.v, new
        )  # fmt: skip


class _FusedDecode(_Decode):
    """The same where that kernel also writes the new tokens, and rotates them and the queries."""

    is_fused = True


def _is_fused(p: Problem) -> bool:
    """Whether the decode kernel itself appends."""
    return p.append is not None and _kernels().appends(p.append, p.q, p.k, _longest_new(p))


def _longest_new(p: Problem) -> int:
    """New tokens of a sequence, at most."""
    new = p.append
    assert new is not None
    if new.cu_seqlens is None:
        return new.k.shape[1]
    total = new.k.shape[0]
    return min(total, p.max_seqlen_q) if new.cu_seqlens is p.cu_seqlens_q else total


def _has_aligned_rows(new: Append | None) -> bool:
    """Whether rows of new tokens, and of cos and sin, lie where the decode kernel can take them. Their
    strides are known to be multiples of 16 bytes."""
    assert new is not None
    together = new.k.data_ptr() | new.v.data_ptr()
    if new.rotary is not None:
        together |= new.rotary.cos.data_ptr() | new.rotary.sin.data_ptr()
    return together % 16 == 0


class _DecodeLatent(_Decode):
    """The same for absorbed MLA: rope and latent parts apart, however the call came."""

    def __call__(self, p: Problem, q: Tensor, out: Tensor, lse: Tensor | None) -> None:
        if p.qv is None:
            at = p.head_dim_v
            k, rope, latent = p.k[..., at:], q[..., at:], q[..., :at]
            self.launch(p, rope, k, p.v, out, lse, latent, whole_rows=True)
        else:
            self.launch(p, q, p.k, p.v, out, lse, _with_aligned_rows(p.qv))


#: What makes ready to solve problems like one.
_SOLVERS: dict[Work, Callable[[Problem], Solver]] = {
    "prefill": _prefill,
    "decode": _Decode,
    "absorbed MLA": _DecodeLatent,
}

PROVIDER = HopperProvider()
_RUNNERS = Runners(PROVIDER.runner)
