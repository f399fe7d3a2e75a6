"""FlashInfer: wrappers that are planned on the host once per step, then run by every layer.

What a wrapper planned lives in a part of the caller's plan; without a plan each call is planned for itself.
Planning needs lengths on the host: where the plan does not know them, it waits for the device. A plan that
is made for replays has a wrapper whose buffers stay where they are: planning fills them, the kernels in
the graph read them. LSEs come in base 2 and are returned in base e.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway import devices
from headway.errors import UnsupportedError
from headway.plan import HostLengths, Scratch
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

_NAME = "flashinfer"
PACKAGE = Package(_NAME, "flashinfer-python", source="prefill.py")

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
    name = _NAME
    is_package = True
    plans_on_host = True

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
        in_place = p.out is not None and p.out.dtype == p.q.dtype and p.out.is_contiguous()
        if in_place:
            assert p.out is not None
            out = (p.out if p.ragged_q else p.out.flatten(0, 1))[:n]
        elif planned.fixed is not None:  # it would fill its own with zeros first
            out = q.new_empty(*q.shape[:-1], p.head_dim_v)
        keys = (p.k, p.v) if planned.ragged else ((p.k, p.v),)
        if planned.ragged and p.kv_layout is KVLayout.DENSE:
            keys = (p.k.flatten(0, 1), p.v.flatten(0, 1))
        result = planned.wrapper.run(q, *keys, out=out, return_lse=p.return_lse)
        attended, lse2 = result if p.return_lse else (result, None)
        lse = None if lse2 is None else _natural(p, lse2)
        if in_place:
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


# --- wrappers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fixed:
    """Where the kernels in a captured graph find what was planned."""

    qo_indptr: Tensor
    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor

    @staticmethod
    def of(p: Problem) -> _Fixed:
        def int32(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=p.device)

        assert p.page_table is not None
        b = p.batch_size
        return _Fixed(int32(b + 1), int32(b + 1), int32(p.page_table.numel() + 1), int32(b))


@dataclass
class _Workspace:
    """Scratch of wrappers that run one after another, and those that still copy from the host.

    Wrappers plan into pinned memory of their own and copy it to the device. Memory of a wrapper that is
    gone would be the next one's before it is read.
    """

    floats: Tensor
    copying: list[tuple[Any, torch.cuda.Event]] = field(default_factory=list)

    @staticmethod
    def of(device: torch.device) -> _Workspace:
        return _Workspace(torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device))

    def keep(self, wrapper: Any, copied: torch.cuda.Event) -> None:
        """Hold a wrapper until its copies are done."""
        self.copying = [one for one in self.copying if not one[1].query()]
        self.copying.append((wrapper, copied))


@dataclass
class _Planned:
    """A wrapper, what it was planned for, and whether that still holds."""

    wrapper: Any
    workspace: _Workspace
    ragged: bool
    fixed: _Fixed | None
    num_queries: int = 0
    tables: tuple[int, ...] = ()
    is_current: bool = False
    copied: torch.cuda.Event | None = None

    def expire(self) -> None:
        self.is_current = False


def _planned(p: Problem) -> _Planned:
    """The wrapper for a problem: planned by the first layer of a step, then only handed over."""
    part = _wrapper(p) if p.plan is None else p.plan.part(_NAME, p.plan_key, lambda: _wrapper(p))
    # Layer groups of one step may have page tables of their own.
    tables = addresses(p.page_table, p.seqlens_k, p.cu_seqlens_k, p.cu_seqlens_q, p.cache_batch_idx)
    if not part.is_current or part.tables != tables:
        if part.copied is not None:  # what it planned before is read from the same memory
            part.copied.synchronize()
        _plan(part, p)
        _note_copies(part, p)
        part.tables, part.is_current = tables, True
    return part


def _note_copies(part: _Planned, p: Problem) -> None:
    if p.device.type != "cuda":
        return
    part.copied = torch.cuda.Event()
    part.copied.record(torch.cuda.current_stream(p.device))
    if p.plan is None:
        part.copied.synchronize()
    elif not p.plan.replayed:
        part.workspace.keep(part.wrapper, part.copied)


def _wrapper(p: Problem) -> _Planned:
    scratch = Scratch() if p.plan is None else p.plan.scratch
    workspace = scratch.held(_NAME, p.device, lambda: _Workspace.of(p.device))
    replayed = p.plan is not None and p.plan.replayed
    if replayed and p.page_table is None:
        raise UnsupportedError("FlashInfer: captured calls read pages; give them a page_table")
    plain = p.kv_layout is KVLayout.DENSE and p.seqlens_k is None and p.cache_batch_idx is None
    ragged = p.kv_layout is KVLayout.RAGGED or (
        plain and p.k.is_contiguous() and p.v.is_contiguous()
    )
    kind = "Ragged" if ragged else "Paged"
    options: dict[str, Any] = {}
    if not ragged and (replayed or p.is_decode):
        # These pack the few queries of a group of heads; its Hopper kernels do not.
        options["backend"] = "fa2"
    fixed = _Fixed.of(p) if replayed else None
    if fixed is not None:
        options |= {
            "use_cuda_graph": True,
            "qo_indptr_buf": fixed.qo_indptr,
            "paged_kv_indptr_buf": fixed.indptr,
            "paged_kv_indices_buf": fixed.indices,
            "paged_kv_last_page_len_buf": fixed.last_page_len,
        }
    make = getattr(PACKAGE.load(), f"BatchPrefillWith{kind}KVCacheWrapper")
    return _Planned(make(workspace.floats, "NHD", **options), workspace, ragged, fixed)


# --- planning -----------------------------------------------------------------------------------------


def _plan(part: _Planned, p: Problem) -> None:
    known = _lengths(p)
    part.num_queries = int(known.cu_seqlens_q[-1])
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
        queries, keys = _on_host(p, known.cu_seqlens_q, _cumulated(known.seqlens_k))
        part.wrapper.plan(qo_indptr=queries, kv_indptr=keys, **common)
        return
    common |= _options(part, p)
    counts, last = _counted(known.seqlens_k, p.k.shape[1])
    ends = _cumulated(counts)
    queries, lengths, last_page, indptr, used = _on_host(
        p, known.cu_seqlens_q, known.seqlens_k, last, ends, counts
    )
    # Without them it copies lengths of its own, from memory that is not pinned.
    if _takes(type(part.wrapper).plan, "seq_lens"):
        common["seq_lens"] = lengths
    part.wrapper.plan(
        qo_indptr=queries,
        paged_kv_indptr=indptr,
        paged_kv_indices=_pages(part, p, indptr, used),
        paged_kv_last_page_len=last_page,
        page_size=p.k.shape[1],
        **common,
    )


def _options(part: _Planned, p: Problem) -> dict[str, Any]:
    """What else the plan of a captured call is told."""
    if part.fixed is None:
        return {}
    options: dict[str, Any] = {"disable_split_kv": _fills_device(p)}
    if not p.is_decode and _takes(type(part.wrapper).plan, "uniform_q_len"):
        options["uniform_q_len"] = p.max_seqlen_q
    return options


def _fills_device(p: Problem) -> bool:
    """Whether there are so many sequences that the planner cuts none: two blocks of threads a processor.

    Captured kernels write parts and merge them all the same, unless they are told that there are none.
    """
    if p.device.type != "cuda":
        return False
    blocks = 2 * torch.cuda.get_device_properties(p.device).multi_processor_count
    return p.batch_size >= blocks // p.num_kv_heads


@remembered
def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _on_host(p: Problem, *values: np.ndarray) -> tuple[Tensor, ...]:
    """Where FlashInfer's planner reads them, and where a copy to the device waits for nothing."""
    packed = torch.from_numpy(np.concatenate(values).astype(np.int32, copy=False))
    if p.device.type == "cuda":
        packed = packed.pin_memory()
    return packed.split([len(one) for one in values])


def _counted(lengths: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sequence the number of pages, and of keys in the last."""
    counts = -(-lengths // page_size)
    return counts, lengths - np.maximum(counts - 1, 0) * page_size


def _cumulated(counts: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)))


def _lengths(p: Problem) -> HostLengths:
    """Of queries and keys; waits for the device unless the plan knows them."""
    known = None if p.plan is None else p.plan.host_lengths
    if known is not None:
        return known
    b = p.batch_size
    queries = _given(p.cu_seqlens_q)
    if queries is None:
        queries = np.arange(b + 1, dtype=np.int32) * p.q.shape[1]
    ends = _given(p.cu_seqlens_k)
    if ends is not None:
        return HostLengths(queries, np.diff(ends))
    keys = _given(p.seqlens_k)
    if keys is None:
        columns = 1 if p.page_table is None else p.page_table.shape[1]
        keys = np.full(b, columns * p.k.shape[1], np.int32)
    return HostLengths(queries, keys)


def _given(lengths: Tensor | None) -> np.ndarray | None:
    return None if lengths is None else lengths.cpu().numpy()


def _pages(part: _Planned, p: Problem, indptr: Tensor, used: Tensor) -> Tensor:
    """The pages of each sequence, one sequence behind the other. A dense row is one long page.

    ``indptr`` (B + 1,) and ``used`` (B,), on the host, say where each goes: nothing waits for the device.
    """
    if p.page_table is not None:
        table = p.page_table
        if p.cache_batch_idx is not None:
            table = table.index_select(0, p.cache_batch_idx)
    elif p.cache_batch_idx is not None:
        table = p.cache_batch_idx[:, None]
    else:
        table = torch.arange(p.batch_size, dtype=torch.int32, device=p.device)[:, None]
    total = int(indptr[-1])
    if part.fixed is not None:
        pages = part.fixed.indices
    else:
        pages = torch.empty(total + 1, dtype=torch.int32, device=p.device)
    table = table[:, : int(used.max())].to(torch.int32)
    starts = indptr[:-1].to(p.device, non_blocking=True)[:, None]
    columns = torch.arange(table.shape[1], device=p.device)
    is_page = columns < used.to(p.device, non_blocking=True)[:, None]
    last = pages.shape[0] - 1  # takes the entries of the table that are no pages
    places = torch.where(is_page, starts + columns, last)
    pages.scatter_(0, places.flatten(), table.flatten())
    return pages[:total]


PROVIDER = FlashInferProvider()
