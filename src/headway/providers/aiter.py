"""aiter, AMD's kernels for CDNA: prefill in 16 bits, float8 MLA prefill by work lists, absorbed MLA decode.

Float8 prefill (head_dim 192/128, gfx950) executes the schedule of :mod:`headway.persistent`, the list that
aiter's own planner makes. It is planned into pinned memory and copied on the current stream, where
aiter's planner writes device memory from the host without an order, so that a step may overwrite the plan
that the step before it is still reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway import devices, persistent
from headway.errors import UnsupportedError
from headway.persistent import DeviceWork, Granularity, Staging
from headway.problem import FLOAT8_DTYPES, KVLayout, Problem
from headway.providers._packages import Package, addresses, delivered, given, remembered, window
from headway.providers.base import (
    Capabilities,
    DimRange,
    Exclusion,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

PACKAGE = Package("aiter", "amd-aiter", source="ops/mha.py")
_OPS = Package("aiter", "amd-aiter", source="ops/attention.py")
_MLA = Package("aiter.mla", "amd-aiter")

#: How the float8 prefill kernel cuts its work.
TILE = Granularity(qhead=1, qlen=256, kvlen=128)

#: Head counts for which float8 prefill exists: groups of eight, and in the table of aiter's reduction.
PREFILL_HEADS = (8, 16, 32, 40, 64, 128)

#: Head counts of the absorbed decode kernels.
DECODE_HEADS = (16, 128)

_LATENT = DimRange((576, 576), (512, 512))
_NOT_LATENT = DimRange((8, 256), (8, 256))

_ELSEWHERE = "aiter's functions for this have none; Headway's kernels do"
_FEATURES = frozenset(
    {
        Feature.CAUSAL,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.RAGGED_Q,
        Feature.SEQUSED_K,
        Feature.DESCALE,
        Feature.UNEQUAL_HEAD_DIMS,
        Feature.GQA,
        Feature.LSE,
        Feature.OUT,
    }
)


class AiterProvider(Provider):
    name = "aiter"
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "amd":
            return f"runs on AMD's gfx942 and gfx950, this is {what}"
        if what.kind not in ("gfx942", "gfx950"):
            return f"runs on gfx942 and gfx950, this is {what}"
        if not PACKAGE.found():
            return PACKAGE.missing()
        return PACKAGE.broken()

    def package(self) -> tuple[str, str] | None:
        return PACKAGE.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        return _capabilities(devices.of(device).kind, device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        return {"gfx950": _build("cuda", True, True), "gfx942": _build("cuda", True, False)}

    def reasons_against(self, problem: Problem) -> list[str]:
        reasons = super().reasons_against(problem)
        latent = problem.head_dim == 576
        if reasons or not (latent or problem.k.dtype in FLOAT8_DTYPES):
            return reasons
        most = (DECODE_HEADS if latent else PREFILL_HEADS)[-1]
        if problem.num_q_heads > most:
            reasons.append(f"{problem.num_q_heads} query heads: takes up to {most}")
        if latent and problem.num_kv_heads != 1:
            reasons.append(f"{problem.num_kv_heads} latent heads: absorbed decode takes 1")
        if latent and not problem.is_decode and not problem.mask.causal:
            reasons.append("several query tokens without causal: absorbed decode masks the future")
        return reasons

    def load(self) -> None:
        PACKAGE.load()

    def prepare(self, problem: Problem) -> None:
        if problem.plan is not None and problem.k.dtype in FLOAT8_DTYPES:
            _prefill_work(problem)
        elif problem.plan is not None and problem.head_dim == 576:
            _slots(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        if problem.k.dtype in FLOAT8_DTYPES:
            return _run_prefill(problem), None
        if problem.head_dim == 576:
            return _run_decode(problem), None
        result = _run_dense(problem) if not problem.ragged_q else _run_ragged(problem)
        if not problem.return_lse:
            return delivered(problem, result[0] if isinstance(result, tuple) else result), None
        out, lse = result[:2]
        return delivered(problem, out), lse.masked_fill_(lse == float("inf"), float("-inf"))


# --- capabilities -------------------------------------------------------------------------------------


@remembered
def _capabilities(kind: str, device_type: str) -> Capabilities:
    has_sinks = "sink_ptr" in PACKAGE.parameters("flash_attn_varlen_func")
    return _build(device_type, has_sinks, has_float8_prefill(kind))


def _build(device_type: str, has_sinks: bool, has_float8: bool) -> Capabilities:
    features = _FEATURES - (frozenset() if has_sinks else {Feature.SINKS})
    if not has_float8:
        features -= {Feature.DESCALE}
    dtypes = {(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)}
    if has_float8:
        dtypes.add((torch.float8_e4m3fn, torch.float8_e4m3fn))
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=frozenset(dtypes),
        features=features,
        head_dims=HeadDims(pairs=frozenset({(192, 128), (576, 512)}), unequal=()),
        float8_head_dims=HeadDims(only=frozenset(), pairs=frozenset({(192, 128)}), unequal=()),
        paged_head_dims=HeadDims(only=frozenset(), pairs=frozenset({(576, 512)}), unequal=()),
        needs_finite_tails=True,
        exclusions=_EXCLUSIONS,
        lacks={feature: _ELSEWHERE for feature in Feature if feature not in features},
    )


def _with(trait: Trait | KVLayout | Feature, why: str, *others: Any) -> tuple[Exclusion, ...]:
    return tuple(excludes(trait, other, why=why) for other in others)


_EXCLUSIONS = (
    excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
    excludes(Feature.RAGGED_Q, KVLayout.DENSE, why="takes ragged keys with ragged queries"),
    excludes(Feature.SEQUSED_K, KVLayout.RAGGED, why="takes cu_seqlens_k alone"),
    excludes(Feature.SEQUSED_K, KVLayout.DENSE, why="takes whole tensors; pass pages or slices"),
    excludes(Trait.WINDOW_ZERO, why="its kernels for 128 and 192 wide heads read 0 as unbounded"),
    excludes(Feature.SINKS, Feature.LSE, why="whether the LSE includes the sink is not documented"),
    excludes(
        Feature.SOFTCAP, KVLayout.DENSE, why="only flash_attn_varlen_func takes logits_soft_cap"
    ),
    *_with(
        Trait.FLOAT8,
        "float8 runs as MLA prefill: ragged queries and keys, no more than causal",
        KVLayout.DENSE,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.GQA,
    ),
    excludes(
        Trait.FLOAT8,
        Feature.LSE,
        why="its kernel writes no LSE for tiles that were not split; headway.mla.prefill returns one",
    ),
    excludes(Trait.DESCALES_VARY, why="takes one number per tensor; expand() a scalar to (B, Hkv)"),
    *(
        excludes(feature, why="absorbed decode has none", dims=_LATENT)
        for feature in (Feature.WINDOW, Feature.SOFTCAP, Feature.SINKS, Feature.LSE)
    ),
    excludes(KVLayout.DENSE, why="absorbed decode takes pages", dims=_LATENT),
    excludes(KVLayout.RAGGED, why="absorbed decode takes pages", dims=_LATENT),
    excludes(
        Trait.SEPARATE_VALUES, why="v_cache must be the first columns of k_cache", dims=_LATENT
    ),
)


def has_float8_prefill(kind: str) -> bool:
    """Whether this kind of device and the installed package run float8 MLA prefill."""
    return kind == "gfx950" and bool(_OPS.found() and _OPS.parameters("mla_prefill_ps_asm_fwd"))


# --- 16-bit prefill -----------------------------------------------------------------------------------


def _run_dense(p: Problem) -> Any:
    return PACKAGE.load().flash_attn_func(p.q, p.k, p.v, **_common(p))


def _run_ragged(p: Problem) -> Any:
    in_place = p.out is not None and p.out.dtype == p.q.dtype and p.out.is_contiguous()
    return PACKAGE.load().flash_attn_varlen_func(
        p.q,
        p.k,
        p.v,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.max_seqlen_q,
        p.max_seqlen_k,
        logits_soft_cap=p.scores.softcap,
        **given(_common(p), out=p.out if in_place else None),
    )


def _common(p: Problem) -> dict[str, Any]:
    arguments = {
        "softmax_scale": p.scores.softmax_scale,
        "causal": p.mask.causal,
        "window_size": window(p.mask),
        "return_lse": p.return_lse,
    }
    return given(arguments, sink_ptr=p.scores.sinks)


# --- float8 MLA prefill ---------------------------------------------------------------------------------


@dataclass
class _Work:
    """A step's work list on the device, and what the lists of all steps pass through."""

    staging: Staging
    work: DeviceWork
    lengths: tuple[int, ...]
    is_current: bool = True

    def expire(self) -> None:
        self.is_current = False


def _run_prefill(p: Problem) -> Tensor:
    part = _prefill_work(p)
    out = p.out
    padded = part.work.num_heads_k != p.num_q_heads  # those are copied, padding rows too
    if padded or out is None or out.dtype != torch.bfloat16 or not out.is_contiguous():
        out = torch.empty(p.out_shape, dtype=torch.bfloat16, device=p.device)
    d = p.descales
    scales = tuple(None if t is None else t.flatten()[:1] for t in (d.q, d.k, d.v))
    prefill(part.work, p.q, p.k, p.v, out, p.scores.softmax_scale, scales)
    return delivered(p, out)


def _prefill_work(p: Problem) -> _Work:
    if p.plan is None:
        return _planned(p, Staging(p.device))
    part = p.plan.part("aiter", p.plan_key, lambda: _planned(p, Staging(p.device)))
    if not part.is_current or part.lengths != addresses(p.cu_seqlens_q, p.cu_seqlens_k):
        fresh = _planned(p, part.staging)
        part.work, part.lengths = fresh.work, fresh.lengths
        part.is_current = True
    return part


def _planned(p: Problem, staging: Staging) -> _Work:
    """The work list, from lengths read on the host: once per step where the call has a plan."""
    assert p.cu_seqlens_q is not None
    assert p.cu_seqlens_k is not None
    queries, keys = (t.cpu().numpy() for t in (p.cu_seqlens_q, p.cu_seqlens_k))
    work = persistent.plan_on_device(
        queries,
        keys,
        keys[1:] - keys[:-1],
        p.device,
        num_heads_k=padded_heads(p.num_kv_heads, PREFILL_HEADS),
        num_cu=_compute_units(p.device),
        granularity=TILE,
        is_causal=p.mask.causal,
        staging=staging,
    )
    return _Work(staging, work, addresses(p.cu_seqlens_q, p.cu_seqlens_k))


def _compute_units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded_heads(heads: int, supported: tuple[int, ...]) -> int:
    """The next head count that kernels exist for."""
    found = next((n for n in supported if n >= heads), None)
    if found is None:
        takes = f"up to {supported[-1]}"
        raise UnsupportedError(f"aiter: {heads} heads: its kernels take {takes}")
    return found


def _tiled(x: Tensor, heads: int) -> Tensor:
    """(tokens, heads, width) with its heads repeated in turn until there are enough."""
    if x.shape[1] == heads:
        return x
    turns = -(-heads // x.shape[1])
    return x.repeat(1, turns, 1)[:, :heads].contiguous()


def prefill(
    work: DeviceWork,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_scale: float,
    scales: tuple[Tensor | None, ...],
    lse: Tensor | None = None,
) -> None:
    """Execute a work list of granularity :data:`TILE` with aiter's kernels; ``out`` is filled.

    Args:
        work: planned for the padded head count; with_lse where an LSE is asked for.
        q, k, v: float8 (tokens, H, 192 / 192 / 128), as many heads each.
        out: bfloat16 (total_q, H, 128), contiguous.
        scales: float32 of one element each, or None: what a stored 1 of q, k and v means.
        lse: float32 (total_q, H) to be filled. Headway's kernel merges then: aiter's passes over tiles
            of one part, and writes +inf for rows that see no key.
    """
    assert lse is None or (work.with_lse and lse.shape[1] == work.num_heads_k)
    aiter, heads = PACKAGE.load(), work.num_heads_k
    whole = out if heads == out.shape[1] else out.new_empty(out.shape[0], heads, out.shape[2])
    partial_out, partial_lse = work.partial_buffers(heads, out.shape[2])
    if work.with_lse:
        partial_lse.fill_(float("-inf"))  # whatever the kernel does for requests without keys
    aiter.mla_prefill_ps_asm_fwd(
        _tiled(q, heads),
        _tiled(k, heads),
        _tiled(v, heads),
        work.qo_indptr,
        work.kv_indptr,
        work.kv_page_indices,
        work.work_indptr,
        work.work_info,
        work.max_seqlen_q,
        softmax_scale,  # always said: without it, aiter divides by the root of the wrong width
        work.is_causal,
        partial_out,
        partial_lse,
        whole,
        *scales,
    )
    if work.num_groups and work.with_lse:
        from headway.kernels.portable.mla_prefill import mla_reduce

        mla_reduce(work, partial_out, partial_lse, whole, lse)
    elif work.num_groups:
        _reduce(aiter, work, partial_out, partial_lse, whole)
    if whole is not out:
        out.copy_(whole[:, : out.shape[1]])


def _reduce(
    aiter: Any, work: DeviceWork, partial_out: Tensor, partial_lse: Tensor, out: Tensor
) -> None:
    arguments: dict[str, Any] = {}
    if "num_kv_splits" in _OPS.parameters("mla_reduce_v1"):
        arguments["num_kv_splits"] = 0
    aiter.mla_reduce_v1(
        partial_output=partial_out,
        partial_lse=partial_lse,
        reduce_indptr=work.reduce_indptr,
        reduce_final_map=work.reduce_final_map,
        reduce_partial_map=work.reduce_partial_map,
        max_seqlen_q=TILE.qlen,
        final_output=out,
        **arguments,
    )


# --- absorbed MLA decode ----------------------------------------------------------------------------------


@dataclass
class _Slots:
    """Where the keys of each sequence lie: cache rows ``indices[indptr[b] : indptr[b + 1]]``."""

    indptr: Tensor
    indices: Tensor
    queries: Tensor
    last: Tensor
    tables: tuple[int, ...]
    is_current: bool = True

    def expire(self) -> None:
        self.is_current = False


def _slots(p: Problem) -> _Slots:
    if p.plan is None:
        return _found_slots(p)
    part = p.plan.part("aiter", p.plan_key, lambda: _found_slots(p))
    tables = addresses(p.page_table, p.seqlens_k, p.cu_seqlens_q)
    if not part.is_current or part.tables != tables:
        fresh = _found_slots(p)
        for name in ("indptr", "indices", "queries", "last"):
            getattr(part, name).copy_(getattr(fresh, name))
        part.tables, part.is_current = tables, True
    return part


def _found_slots(p: Problem) -> _Slots:
    """Rectangular page tables as lists of slots, on the device and without waiting for it."""
    assert p.page_table is not None
    size, device = p.k.shape[1], p.device
    capacity = p.page_table.shape[1] * size
    lengths = p.seqlens_k
    if lengths is None:
        lengths = torch.full((p.batch_size,), capacity, dtype=torch.int32, device=device)
    indptr = torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    row = torch.arange(capacity, device=device)
    slot = p.page_table[:, row // size] * size + (row % size).to(torch.int32)
    # Rows behind a sequence's end go to one place behind all lists.
    to = torch.where(row < lengths[:, None], indptr[:-1, None] + row, p.batch_size * capacity)
    indices = torch.zeros(p.batch_size * capacity + 1, dtype=torch.int32, device=device)
    indices.scatter_(0, to.flatten(), slot.flatten())
    queries = p.cu_seqlens_q
    if queries is None:
        rows = torch.arange(p.batch_size + 1, dtype=torch.int32, device=device)
        queries = rows * p.q.shape[1]
    last = torch.ones(p.batch_size, dtype=torch.int32, device=device)
    tables = addresses(p.page_table, p.seqlens_k, p.cu_seqlens_q)
    return _Slots(indptr, indices[:-1], queries, last, tables)


def _run_decode(p: Problem) -> Tensor:
    if p.k.stride(0) != p.k.shape[1] * p.k.stride(1):
        raise UnsupportedError(
            f"aiter: k_cache with strides {p.k.stride()} would be copied; want pages without gaps"
        )
    slots, heads = _slots(p), padded_heads(p.num_q_heads, DECODE_HEADS)
    cache = p.k.as_strided(
        (p.k.shape[0] * p.k.shape[1], 1, 1, p.head_dim), (p.k.stride(1), 1, 1, 1)
    )
    q = _tiled(p.q if p.ragged_q else p.q.flatten(0, 1), heads)
    out = q.new_empty(q.shape[0], heads, p.head_dim_v)
    _MLA.load().mla_decode_fwd(
        q,
        cache,
        out,
        slots.queries,
        slots.indptr,
        slots.indices,
        slots.last,
        p.max_seqlen_q,
        sm_scale=p.scores.softmax_scale,
    )
    return delivered(p, out[:, : p.num_q_heads].reshape(p.out_shape))


PROVIDER = AiterProvider()
