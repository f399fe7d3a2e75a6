"""MATE, Moore Threads' attention for MUSA devices: FlashAttention 3's interface with differences.

Its scheduler metadata is computed once per step, into a part of the caller's plan, from the arguments of
the call it is for. Nothing is kept anywhere else: two plans never see each other's metadata, whoever owns
them and on whatever device, stream or thread they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.plan import Plan
from headway.problem import KVLayout, Problem
from headway.providers._packages import (
    Package,
    addresses,
    delivered,
    first_of,
    given,
    remembered,
    window,
)
from headway.providers.base import (
    ALL_FEATURES,
    Capabilities,
    DimRange,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

PACKAGE = Package("mate", "mate", source="mha_interface.py", install="mate, from Moore Threads")

#: What absorbed MLA may need for its schedule, whatever the batch.
_WORKSPACE_BYTES = 128 << 20

#: Query rows times group size up to which MATE packs the heads of a group into one tile.
_PACKED_ROWS = 256

_MODS = "MATE has no callables in its kernels"
_LACKS = {
    Feature.SCORE_MOD: _MODS,
    Feature.MASK_MOD: _MODS,
    Feature.DESCALE: "MATE takes 16-bit inputs, and ignores descales beside them",
}
_LATENT = "absorbed MLA ignores it; call without qv"
_EXCLUSIONS = (
    excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
    excludes(Trait.APPEND_QUANTISED, why="caches are of the dtype of q"),
    excludes(Feature.SEQUSED_Q, Feature.APPEND, why="appending calls have no seqused_q"),
    excludes(Feature.SEQUSED_Q, Feature.LEFTPAD, why="calls with cache_leftpad have no seqused_q"),
    excludes(Feature.SEQUSED_Q, Feature.BATCH_IDX, why="calls with cache rows have no seqused_q"),
    excludes(Feature.SINKS, Feature.LSE, why="whether the LSE includes the sink is not documented"),
    excludes(Feature.QV, KVLayout.DENSE, why="absorbed MLA takes paged keys and values"),
    excludes(Feature.QV, KVLayout.RAGGED, why="absorbed MLA takes paged keys and values"),
    *(
        excludes(Feature.QV, feature, why=_LATENT)
        for feature in (
            Feature.WINDOW,
            Feature.CHUNK,
            Feature.SOFTCAP,
            Feature.SINKS,
            Feature.APPEND,
            Feature.LEFTPAD,
            Feature.BATCH_IDX,
            Feature.SEQUSED_Q,
        )
    ),
)


class MateProvider(Provider):
    name = "mate"
    generation = 3
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "moore-threads":
            return f"runs on Moore Threads' MUSA devices, this is {what}"
        if not PACKAGE.found():
            return PACKAGE.missing()
        return PACKAGE.broken()

    def package(self) -> tuple[str, str] | None:
        return PACKAGE.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        return _capabilities(device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        return {"MUSA": _build("musa", True, True)}

    def load(self) -> None:
        _calls()

    def note(self, problem: Problem) -> str:
        if problem.scores.sinks is not None:
            return "no split-KV with sinks: MATE drops its schedule there"
        if problem.plan is None:
            return "no split-KV without a plan"
        return ""

    def prepare(self, problem: Problem) -> None:
        if problem.plan is not None and _is_planned(problem):
            _metadata(_calls(), problem, problem.plan)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        calls, p = _calls(), problem
        cached = (p.append, p.leftpad_k, p.cache_batch_idx, p.qv)
        through_cache = any(part is not None for part in cached)
        if through_cache or (p.page_table is not None and not calls.varlen_pages):
            result = _run_kvcache(calls, p)
        else:
            result = _run_varlen(calls, p)
        if not p.return_lse:
            return delivered(p, result), None
        out, lse, *_ = result
        if p.qv is not None and not p.ragged_q:
            lse = lse.transpose(1, 2).contiguous()  # absorbed MLA returns (B, Sq, Hq)
        return delivered(p, out), lse


@remembered
def _capabilities(device_type: str) -> Capabilities:
    takes = PACKAGE.parameters("flash_attn_varlen_func")
    has_sinks = first_of(takes, "learnable_sink", "sinks", "s_aux") is not None
    return _build(device_type, has_sinks, "attention_chunk" in takes)


def _build(device_type: str, has_sinks: bool, has_chunk: bool) -> Capabilities:
    features = ALL_FEATURES - {Feature.SCORE_MOD, Feature.MASK_MOD, Feature.DESCALE}
    if not has_sinks:
        features -= {Feature.SINKS}
    if not has_chunk:
        features -= {Feature.CHUNK}
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)}),
        features=features,
        head_dims=HeadDims(maximum=512, pairs=frozenset({(192, 128)}), unequal=()),
        qv_head_dims=DimRange((64, 64), (512, 512)),
        sink_dtypes=frozenset({torch.bfloat16}),
        rotary_dim_multiple_of=16,
        rotary_in_dtype_of_q=True,
        needs_finite_tails=True,
        exclusions=_EXCLUSIONS,
        lacks=_LACKS,
    )


# --- calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """MATE's functions, with the names it gives to what its versions name differently."""

    varlen: Callable[..., Any]
    kvcache: Callable[..., Any]
    planner: Callable[..., Tensor]
    varlen_pages: bool
    varlen_out: bool
    varlen_lse: str
    sinks: str
    lengths: str  # of the planner
    margin: str  # likewise


@remembered
def _calls() -> _Calls:
    mate = PACKAGE.load()
    varlen = PACKAGE.parameters("flash_attn_varlen_func")
    planner = PACKAGE.parameters("get_scheduler_metadata")
    return _Calls(
        varlen=mate.flash_attn_varlen_func,
        kvcache=mate.flash_attn_with_kvcache,
        planner=mate.get_scheduler_metadata,
        varlen_pages="page_table" in varlen,
        varlen_out="out" in varlen,
        varlen_lse=first_of(varlen, "return_softmax_lse", "return_attn_probs") or "",
        sinks=first_of(varlen, "learnable_sink", "sinks", "s_aux") or "",
        lengths=first_of(planner, "seqused_k", "cache_seqlens") or "",
        margin=first_of(planner, "mp_margin", "sm_margin") or "",
    )


def _run_kvcache(calls: _Calls, p: Problem) -> Any:
    arguments = _common(calls, p)
    arguments["return_softmax_lse"] = p.return_lse
    given(
        arguments,
        qv=p.qv,
        cache_seqlens=p.seqlens_k,
        cache_batch_idx=p.cache_batch_idx,
        cache_leftpad=p.leftpad_k,
        page_table=p.page_table,
        cu_seqlens_q=p.cu_seqlens_q,
        max_seqlen_q=p.max_seqlen_q if p.ragged_q else None,
    )
    if p.qv is not None:
        workspace = _workspace(p)
        arguments["scheduler_metadata"] = (workspace.memory, workspace.initialised)
        workspace.initialised = True
    if p.append is not None:
        # cu_seqlens_k_new goes with new keys only: MATE adds whatever it says to the lengths.
        given(arguments, k=p.append.k, v=p.append.v, cu_seqlens_k_new=p.append.cu_seqlens)
        rotary = p.append.rotary
        if rotary is not None:
            arguments |= {"rotary_cos": rotary.cos, "rotary_sin": rotary.sin}
            arguments["rotary_interleaved"] = rotary.interleaved
            given(arguments, rotary_seqlens=rotary.seqlens)
    return calls.kvcache(p.q, p.k, p.v, **arguments)


def _run_varlen(calls: _Calls, p: Problem) -> Any:
    arguments = _common(calls, p)
    arguments[calls.varlen_lse] = p.return_lse
    if p.scores.softcap or p.mask.attention_chunk:
        # Left to itself, MATE 0.2.0 and 0.2.1 pick prebuilt kernels that know neither.
        arguments["backend"] = "mutlass"
    in_place = p.out is not None and p.out.dtype == p.q.dtype and calls.varlen_out
    given(
        arguments,
        cu_seqlens_q=p.cu_seqlens_q,
        cu_seqlens_k=p.cu_seqlens_k,
        seqused_q=p.seqused_q,
        seqused_k=p.seqlens_k,
        page_table=p.page_table,
        out=p.out if in_place else None,
    )
    return calls.varlen(
        p.q, p.k, p.v, max_seqlen_q=p.max_seqlen_q, max_seqlen_k=_key_capacity(p), **arguments
    )


def _common(calls: _Calls, p: Problem) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "softmax_scale": p.scores.softmax_scale,
        "causal": p.mask.causal,
        "window_size": window(p.mask),
        "attention_chunk": p.mask.attention_chunk,
        "softcap": p.scores.softcap,
        "num_splits": p.hints.num_splits,
        "pack_gqa": _packs(p),
        "sm_margin": p.hints.sm_margin,
    }
    if p.scores.sinks is not None:
        arguments[calls.sinks] = p.scores.sinks
    if p.plan is not None and _is_planned(p):
        arguments["scheduler_metadata"] = _metadata(calls, p, p.plan)
    return arguments


def _packs(p: Problem) -> bool:
    """Said to planner and kernel alike, so that both cut queries into the same tiles."""
    if p.hints.pack_gqa is not None:
        return p.hints.pack_gqa
    return p.max_seqlen_q * (p.num_q_heads // p.num_kv_heads) <= _PACKED_ROWS


def _key_capacity(p: Problem) -> int:
    """The longest sequence that the kernel itself reckons with when it resolves windows."""
    if p.page_table is not None:
        return p.page_table.shape[1] * p.k.shape[1]
    return p.k.shape[1] if p.kv_layout is KVLayout.DENSE else p.max_seqlen_k


# --- what is kept in a plan -----------------------------------------------------------------------------


class _Schedule:
    """Scheduler metadata of one step: int32 (4 * B) at an address that stays, for captured graphs."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.buffer = torch.empty(4 * batch_size, dtype=torch.int32, device=device)
        self.lengths: tuple[int, ...] = ()
        self.is_current = False

    def expire(self) -> None:
        self.is_current = False


class _Workspace:
    """Memory for absorbed MLA's schedule, and whether this step's first layer has filled it."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.initialised = False

    def expire(self) -> None:
        self.initialised = False


def _is_planned(p: Problem) -> bool:
    """Whether the kernel of this call reads scheduler metadata. With sinks MATE drops it."""
    return p.scores.sinks is None and p.qv is None


def _metadata(calls: _Calls, p: Problem, plan: Plan) -> Tensor:
    """The step's metadata for calls of this key: computed by its first layer, then only handed over."""
    part = plan.part("mate", p.plan_key, lambda: _Schedule(p.batch_size, p.device))
    append = p.append
    lengths = addresses(
        p.seqlens_k,
        p.seqused_q,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.leftpad_k,
        None if append is None else append.cu_seqlens,
    )
    if not part.is_current or part.lengths != lengths:
        with devices.use(p.device):  # MATE allocates on the current device, not on the tensors'
            part.buffer.copy_(calls.planner(**_planner_arguments(calls, p)))
        part.lengths, part.is_current = lengths, True
    return part.buffer


def _planner_arguments(calls: _Calls, p: Problem) -> dict[str, Any]:
    append = p.append
    arguments: dict[str, Any] = {
        "batch_size": p.batch_size,
        "max_seqlen_q": p.max_seqlen_q,
        "max_seqlen_k": _key_capacity(p),
        "num_heads_q": p.num_q_heads,
        "num_heads_kv": p.num_kv_heads,
        "headdim": p.head_dim,
        "headdim_v": p.head_dim_v,
        "qkv_dtype": p.q.dtype,
        "page_size": p.page_size,
        "causal": p.mask.causal,
        "window_size": window(p.mask),
        "attention_chunk": p.mask.attention_chunk,
        "has_softcap": p.scores.softcap > 0,
        "num_splits": p.hints.num_splits,
        "pack_gqa": _packs(p),
        calls.margin: p.hints.sm_margin,
    }
    if append is not None and append.cu_seqlens is None:
        arguments["max_seqlen_k_new"] = append.k.shape[1]
    lengths = p.seqlens_k
    if lengths is None and p.cu_seqlens_k is None:
        lengths = torch.full((p.batch_size,), _key_capacity(p), dtype=torch.int32, device=p.device)
    return given(
        arguments,
        seqused_q=p.seqused_q,
        cu_seqlens_q=p.cu_seqlens_q,
        cu_seqlens_k=p.cu_seqlens_k,
        cu_seqlens_k_new=None if append is None else append.cu_seqlens,
        cache_leftpad=p.leftpad_k,
        **{calls.lengths: lengths},
    )


def _workspace(p: Problem) -> _Workspace:
    if p.plan is None:
        return _Workspace(p.device)
    return p.plan.part("mate", p.plan_key, lambda: _Workspace(p.device))


PROVIDER = MateProvider()
