"""FlashInfer: wrappers that are planned on the host once per step, then run by every layer.

What a wrapper planned lives in a part of the caller's plan, with its workspace; without a plan each call is
planned for itself. Planning reads lengths and page tables on the host, which waits for the device. LSEs
come in base 2 and are returned in base e.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.problem import KVLayout, Problem
from headway.providers._packages import Package, addresses, delivered, remembered
from headway.providers.base import (
    Capabilities,
    Exclusion,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

PACKAGE = Package("flashinfer", "flashinfer-python", source="prefill.py")

#: Scratch of a wrapper; what FlashInfer's documentation recommends.
_WORKSPACE_BYTES = 128 << 20

#: FlashInfer's kernels write -5e4 for minus infinity; scores never get near it.
_EMPTY_BELOW = -4e4

_LACKS = {
    Feature.APPEND: "its prefill wrappers read caches only; write first, or use Headway's kernels",
    Feature.ROTARY: "its prefill wrappers read caches only; rotate first, or use Headway's kernels",
    Feature.SINKS: "only a wrapper compiled for them has sinks; Headway's kernels do",
    Feature.SCORE_MOD: "its variants are C++ text; Headway's kernels take Python functions",
    Feature.MASK_MOD: "its variants are C++ text; Headway's kernels take Python functions",
    Feature.CHUNK: "its kernels have no attention_chunk; Headway's do",
    Feature.LEFTPAD: "its page lists start at row 0; Headway's kernels take cache_leftpad",
    Feature.SEQUSED_Q: "its queries are packed; pass cu_seqlens_q of the rows in use",
    Feature.QV: "absorbed MLA has a wrapper of another shape; Headway's kernels run qv",
    Feature.DESCALE: "it takes one factor per call, not one per sequence and head",
}
_FEATURES = frozenset(Feature) - frozenset(_LACKS)

_EXCLUSIONS: tuple[Exclusion, ...] = (
    excludes(Trait.WINDOW_RIGHT, why="its windows are bounded to the left alone"),
    excludes(Feature.SEQUSED_K, KVLayout.RAGGED, why="takes cu_seqlens_k alone"),
    excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
)


class FlashInferProvider(Provider):
    name = "flashinfer"
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "nvidia":
            return f"runs on NVIDIA GPUs from sm80 on, this is {what}"
        if what.capability < (8, 0):
            return f"runs on sm80 and newer, this is {what}"
        if not PACKAGE.found():
            return PACKAGE.missing()
        return PACKAGE.broken()

    def package(self) -> tuple[str, str] | None:
        return PACKAGE.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        return _CAPABILITIES if device.type == "cuda" else _on(device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        return {"sm80 and newer": _CAPABILITIES}

    def load(self) -> None:
        PACKAGE.load()

    def note(self, problem: Problem) -> str:
        return (
            "" if problem.plan is not None else "planned on the host for every call: give it a plan"
        )

    def prepare(self, problem: Problem) -> None:
        if problem.plan is not None:
            _planned(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        p, planned = problem, _planned(problem)
        n = planned.num_queries
        q = (p.q if p.ragged_q else p.q.flatten(0, 1))[:n]
        out = None
        if p.out is not None and p.out.dtype == p.q.dtype and p.out.is_contiguous():
            out = (p.out if p.ragged_q else p.out.flatten(0, 1))[:n]
        keys = (p.k, p.v) if planned.ragged else ((p.k, p.v),)
        if planned.ragged and p.kv_layout is KVLayout.DENSE:
            keys = (p.k.flatten(0, 1), p.v.flatten(0, 1))
        result = planned.wrapper.run(q, *keys, out=out, return_lse=p.return_lse)
        attended, lse2 = result if p.return_lse else (result, None)
        lse = None if lse2 is None else _natural(p, lse2)
        if out is not None:
            assert p.out is not None
            return p.out, lse
        if n == p.q.shape[0] or not p.ragged_q:
            return delivered(p, attended.view(p.out_shape)), lse
        whole = p.empty_out()
        whole[:n] = attended
        return whole, lse


@remembered
def _on(device_type: str) -> Capabilities:
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)}),
        features=_FEATURES,
        head_dims=HeadDims(
            only=frozenset({64, 128, 256}), pairs=frozenset({(192, 128)}), unequal=()
        ),
        paged_head_dims=HeadDims(only=frozenset({64, 128, 256}), unequal=()),
        needs_finite_tails=True,
        exclusions=_EXCLUSIONS,
        lacks=_LACKS,
    )


_CAPABILITIES = _on("cuda")


def _natural(p: Problem, lse2: Tensor) -> Tensor:
    """(tokens, Hq) in base 2 as the interface returns LSEs: heads first, base e, -inf for empty rows."""
    lse2 = lse2.masked_fill(lse2 < _EMPTY_BELOW, float("-inf")) * math.log(2)
    if not p.ragged_q:
        return lse2.view(p.batch_size, -1, p.num_q_heads).transpose(1, 2).contiguous()
    lse = p.empty_lse()
    lse[:, : lse2.shape[0]] = lse2.T
    return lse


# --- planning -----------------------------------------------------------------------------------------


@dataclass
class _Planned:
    """A wrapper, what it was planned for, and whether that still holds."""

    wrapper: Any
    ragged: bool
    num_queries: int = 0
    tables: tuple[int, ...] = ()
    is_current: bool = False

    def expire(self) -> None:
        self.is_current = False


def _planned(p: Problem) -> _Planned:
    """The wrapper for a problem: planned by the first layer of a step, then only handed over."""
    if p.plan is None:
        part = _wrapper(p)
    else:
        part = p.plan.part("flashinfer", p.plan_key, lambda: _wrapper(p))
    # Layer groups of one step may have page tables of their own.
    tables = addresses(p.page_table, p.seqlens_k, p.cu_seqlens_k, p.cu_seqlens_q, p.cache_batch_idx)
    if not part.is_current or part.tables != tables:
        _plan(part, p)
        part.tables, part.is_current = tables, True
    return part


def _wrapper(p: Problem) -> _Planned:
    module = PACKAGE.load()
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=p.device)
    plain = p.kv_layout is KVLayout.DENSE and p.seqlens_k is None and p.cache_batch_idx is None
    ragged = p.kv_layout is KVLayout.RAGGED or (
        plain and p.k.is_contiguous() and p.v.is_contiguous()
    )
    kind = "Ragged" if ragged else "Paged"
    make = getattr(module, f"BatchPrefillWith{kind}KVCacheWrapper")
    return _Planned(make(workspace, "NHD"), ragged)


def _plan(part: _Planned, p: Problem) -> None:
    queries = _query_offsets(p)
    part.num_queries = queries[-1]
    common: dict[str, Any] = {
        "num_qo_heads": p.num_q_heads,
        "num_kv_heads": p.num_kv_heads,
        "head_dim_qk": p.head_dim,
        "head_dim_vo": p.head_dim_v,
        "causal": p.mask.causal,
        "sm_scale": p.scores.softmax_scale,
        "window_left": -1 if p.mask.window_left is None else p.mask.window_left,
        "logits_soft_cap": p.scores.softcap,
        "q_data_type": p.q.dtype,
        "kv_data_type": p.k.dtype,
    }
    if part.ragged:
        part.wrapper.plan(qo_indptr=_int32(queries), kv_indptr=_int32(_key_offsets(p)), **common)
        return
    lengths, indptr, indices = _pages(p)
    size = p.k.shape[1]
    part.wrapper.plan(
        qo_indptr=_int32(queries),
        paged_kv_indptr=_int32(indptr),
        paged_kv_indices=indices,
        paged_kv_last_page_len=_int32([(n - 1) % size + 1 if n else 0 for n in lengths]),
        page_size=size,
        **common,
    )


def _int32(values: list[int]) -> Tensor:
    """On the host, where FlashInfer's planner reads them."""
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _query_offsets(p: Problem) -> list[int]:
    if p.cu_seqlens_q is not None:
        return p.cu_seqlens_q.tolist()
    return [b * p.q.shape[1] for b in range(p.batch_size + 1)]


def _key_offsets(p: Problem) -> list[int]:
    if p.cu_seqlens_k is not None:
        return p.cu_seqlens_k.tolist()
    return [b * p.k.shape[1] for b in range(p.batch_size + 1)]


def _pages(p: Problem) -> tuple[list[int], list[int], Tensor]:
    """Lengths, and the pages of each sequence as (indptr, indices). A dense row is one long page."""
    size = p.k.shape[1]
    if p.page_table is not None:
        table = p.page_table
        if p.cache_batch_idx is not None:
            table = table.index_select(0, p.cache_batch_idx)
    elif p.cache_batch_idx is not None:
        table = p.cache_batch_idx[:, None]
    else:
        table = torch.arange(p.batch_size, dtype=torch.int32, device=p.device)[:, None]
    full = [table.shape[1] * size] * p.batch_size
    lengths = full if p.seqlens_k is None else p.seqlens_k.tolist()
    counts = torch.tensor([-(-n // size) for n in lengths], device=table.device)
    used = torch.arange(table.shape[1], device=table.device) < counts[:, None]
    indptr = [0, *torch.cumsum(counts, 0).tolist()]
    return lengths, indptr, table[used]


PROVIDER = FlashInferProvider()
