"""Persistent schedules of prefill attention: a list of work for each compute unit, made on the host.

The layout of the lists is that of aiter's persistent-schedule (PS) prefill, so plans can be exchanged
with it. A *tile* is up to ``qlen_granularity`` query tokens of one request. The KV range that a tile sees
is cut into *units* of ``kvlen_granularity`` keys; the units of all tiles, laid end to end, are dealt out
evenly to the compute units. A tile that falls to several of them is attended in parts, which land in
partial buffers and are merged by :func:`reduce`.

This file holds the planner and, in plain torch, what the lists mean. Kernels that execute them:
``mla_prefill`` of ``headway.kernels.portable`` and ``headway.kernels.hopper``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from headway import devices, reference
from headway.errors import InvalidInputError

Ints: TypeAlias = "np.ndarray"


class Item(NamedTuple):
    """The eight int32 fields of one row of ``work_info``."""

    request: int
    #: first row in the partial buffers; -1: the tile is whole, written to the output
    partial_row: int
    q_start: int  # token rows, over the whole batch
    q_end: int
    kv_start: int  # entries of kv_page_indices
    kv_end: int
    kv_offset: int  # keys of the request behind this part of a tile that goes on, else 0
    heads: int  # query heads [low 16 bits, high 16 bits)


@dataclass(frozen=True)
class WorkList:
    """The lists of one plan, int32 arrays of exact length.

    work_indptr (num_cu + 1): unit c has items ``work_info[work_indptr[c] : work_indptr[c + 1]]``.
    work_info (items, 8): see :class:`Item`. reduce_indptr (groups + 1): ranges of reduce_partial_map
    (parts), first rows in the partial buffers, that make up the token rows reduce_final_map (groups, 2).
    """

    work_indptr: Ints
    work_info: Ints
    reduce_indptr: Ints
    reduce_final_map: Ints
    reduce_partial_map: Ints
    partial_rows: int  # rows that the partial buffers need


@dataclass(frozen=True)
class Granularity:
    """How finely work is cut: query heads per item, query tokens per tile, keys per unit."""

    qhead: int = 1
    qlen: int = 256
    kvlen: int = 16

    def check(self, block_size: int) -> None:
        for name in ("qhead", "qlen", "kvlen"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}_granularity", getattr(self, name), "at least 1")
        if block_size < 1 or self.kvlen % block_size:
            given = f"{self.kvlen} with block_size={block_size}"
            raise InvalidInputError("kvlen_granularity", given, "a multiple of block_size")


def clusters(num_heads_k: int, num_cu: int) -> tuple[int, int]:
    """Compute units form clusters, each for its share of the KV heads: (clusters, units per cluster)."""
    count = math.gcd(num_heads_k, num_cu)
    return count, num_cu // count


def plan(
    qo_indptr: Sequence[int] | Ints,
    kv_indptr: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    *,
    num_heads_k: int,
    num_cu: int,
    granularity: Granularity,
    block_size: int = 1,
    is_causal: bool = True,
    with_lse: bool = False,
) -> WorkList:
    """Deal the work of a batch out to ``num_cu`` compute units.

    Args:
        qo_indptr: (B + 1) first query token of each request, and the total.
        kv_indptr: (B + 1) first entry of each request in kv_page_indices, pages of ``block_size`` keys.
        context_lens: (B) keys of each request, those of the query tokens included.
        with_lse: every tile goes through the partial buffers, whole ones too: for kernels that write an
            LSE there alone, so that :func:`reduce` knows the LSE of every row.

    Raises:
        InvalidInputError: lengths that do not fit together, or a causal request with more query tokens
            than keys: its first tokens would see nothing and no item could be made for them.
    """
    granularity.check(block_size)
    qo, kv = np.asarray(qo_indptr, np.int64), np.asarray(kv_indptr, np.int64)
    lens = np.asarray(context_lens, np.int64)
    _check_lengths(qo, kv, lens, block_size, is_causal)
    tiles = _tiles(qo, lens, granularity, is_causal)
    num_clusters, per_cluster = clusters(num_heads_k, num_cu)
    parts = _deal(tiles, per_cluster)
    base = _items(parts, tiles, kv, lens, granularity, block_size, with_lse)
    info, indptr = _for_all_heads(
        base, parts.worker, num_heads_k, num_clusters, per_cluster, granularity.qhead
    )
    reduce_indptr, final_map, partial_map = _reduce_lists(base)
    partial_rows = int(np.count_nonzero(base[:, 1] >= 0)) * granularity.qlen
    return WorkList(indptr, info, reduce_indptr, final_map, partial_map, partial_rows)


#: Costs in units of the schedule (readings: docs/notes/mla.md): a tile of one head, beside its units; a
#: part, whose rows go to the partial buffers and come back; the launch of a merge.
_TILE_UNITS, _PART_UNITS, _MERGE_UNITS = 0.7, 3, 6
#: Keys, times heads, whose tiles are interleaved: in float8 at 192/128 they take most of an L2 cache.
_SECTION_KEYS = 1 << 17
#: Items for each compute unit, at least, before heads share one.
_ITEMS_EACH = 16


def plan_whole_tiles(
    qo_indptr: Sequence[int] | Ints,
    kv_indptr: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    *,
    num_heads_k: int,
    num_cu: int,
    granularity: Granularity,
    block_size: int = 1,
    is_causal: bool = True,
) -> WorkList | None:
    """:func:`plan` without parts, so without a merge; None where that would take longer.

    Within sections of heads whose keys a cache holds, tiles are dealt out longest first, to the compute
    units that have least to do.
    """
    granularity.check(block_size)
    qo, kv = np.asarray(qo_indptr, np.int64), np.asarray(kv_indptr, np.int64)
    lens = np.asarray(context_lens, np.int64)
    _check_lengths(qo, kv, lens, block_size, is_causal)
    tiles = _tiles(qo, lens, granularity, is_causal)
    count = len(tiles.units)
    share = _heads_per_item(count, num_heads_k, num_cu)
    section = max(min(_SECTION_KEYS // max(int(lens.sum()), 1), num_heads_k) // share, 1) * share
    tile = np.tile(np.arange(count), num_heads_k // share)
    head = np.repeat(np.arange(0, num_heads_k, share), count)
    order = np.lexsort((head, -tiles.units[tile], head // section))
    tile, head = tile[order], head[order]
    worker, load = _evened((tiles.units[tile] + _TILE_UNITS) * share, num_cu)
    parts_each = 2 * num_heads_k // clusters(num_heads_k, num_cu)[0]
    if load.max(initial=0) > load.mean() + parts_each * _PART_UNITS + _MERGE_UNITS:
        return None
    whole = _Parts(np.arange(count), np.zeros(count, np.int64), 0 * tiles.units, tiles.units)
    base = _items(whole, tiles, kv, lens, granularity, block_size, False)
    packed = head * granularity.qhead | (head + share) * granularity.qhead << 16
    mine = np.argsort(worker, kind="stable")
    info = np.concatenate((base[tile], packed[:, None]), axis=1)[mine].astype(np.int32)
    indptr = np.concatenate(([0], np.cumsum(np.bincount(worker, minlength=num_cu))))
    return WorkList(indptr.astype(np.int32), info, *_reduce_lists(base), 0)


def _evened(costs: np.ndarray, workers: int) -> tuple[Ints, np.ndarray]:
    """(a worker for each cost, what each has to do): by handfuls in order, to those who have least."""
    worker, load = np.empty(len(costs), np.int64), np.zeros(workers)
    handful = -(-workers // 4)
    for first in range(0, len(costs), handful):
        dearest = first + np.argsort(-costs[first : first + handful], kind="stable")
        idlest = np.argsort(load, kind="stable")[: len(dearest)]
        worker[dearest] = idlest
        load[idlest] += costs[dearest]
    return worker, load


def _heads_per_item(tiles: int, num_heads_k: int, num_cu: int) -> int:
    """Heads that share an item, so that lists stay short where there are many tiles: a power of two."""
    share = 1
    while (
        num_heads_k % (2 * share) == 0 and tiles * num_heads_k >= 2 * share * _ITEMS_EACH * num_cu
    ):
        share *= 2
    return share


def _check_lengths(qo: Ints, kv: Ints, lens: Ints, block_size: int, is_causal: bool) -> None:
    if qo.shape != kv.shape or qo.shape != (lens.shape[0] + 1,):
        shapes = f"lengths {qo.shape[0]}, {kv.shape[0]}, {lens.shape[0]}"
        raise InvalidInputError("seqlens_qo_indptr", shapes, "B + 1, B + 1 and B (context_lens)")
    q_lens, pages = np.diff(qo), np.diff(kv)
    for name, bad in (("seqlens_qo_indptr", q_lens < 0), ("pages_kv_indptr", pages < 0)):
        if bad.any():
            raise InvalidInputError(
                name, f"a fall at entry {int(bad.argmax())}", "ascending values"
            )
    short = pages * block_size < lens
    if short.any():
        b = int(short.argmax())
        given = f"{pages[b]} pages of {block_size} for the {lens[b]} keys of request {b}"
        raise InvalidInputError("pages_kv_indptr", given, "enough pages for context_lens")
    blind = (q_lens > lens) if is_causal else np.zeros_like(short)
    if blind.any():
        b = int(blind.argmax())
        given = f"{q_lens[b]} query tokens and {lens[b]} keys in request {b}"
        wanted = "context_lens that count the query tokens too, or is_causal=False"
        raise InvalidInputError("context_lens", given, wanted)


@dataclass(frozen=True)
class _Tiles:
    """All tiles of a batch in the order of the walk."""

    request: Ints
    q_start: Ints
    q_end: Ints
    units: Ints


def _tiles(qo: Ints, lens: Ints, granularity: Granularity, is_causal: bool) -> _Tiles:
    """Tiles of each request from both ends inwards, first, last, second..: long beside short."""
    counts = -(-np.diff(qo) // granularity.qlen)
    request = np.repeat(np.arange(len(lens)), counts)
    step = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.where(step % 2 == 0, step // 2, counts[request] - 1 - step // 2)
    start = place * granularity.qlen
    end = np.minimum(start + granularity.qlen, np.diff(qo)[request])
    seen = lens[request]
    if is_causal:
        seen = np.minimum(seen - np.diff(qo)[request] + end, seen)
    return _Tiles(request, qo[request] + start, qo[request] + end, -(-seen // granularity.kvlen))


@dataclass(frozen=True)
class _Parts:
    """The walk of one KV head: parts of tiles in order, and which worker of the cluster has each."""

    tile: Ints
    worker: Ints
    begin: Ints  # units, from the tile's first
    end: Ints


def _deal(tiles: _Tiles, workers: int) -> _Parts:
    """Cut the line of all units at worker boundaries: equal shares, the first ones a unit more."""
    first = np.concatenate(([0], np.cumsum(tiles.units)))
    share, extra = divmod(int(first[-1]), workers)
    bounds = np.concatenate(([0], np.cumsum(share + (np.arange(workers) < extra))))
    cuts = np.unique(np.concatenate((first, bounds)))
    begin, end = cuts[:-1], cuts[1:]
    tile = np.searchsorted(first, begin, side="right") - 1
    # A tile without keys has no units, but its rows of the output still need an item.
    empty = np.flatnonzero(tiles.units == 0)
    begin, end = np.concatenate((begin, first[empty])), np.concatenate((end, first[empty]))
    tile = np.concatenate((tile, empty))
    last = max(int(np.searchsorted(bounds, first[-1])) - 1, 0)
    worker = np.minimum(np.searchsorted(bounds, begin, side="right") - 1, last)
    order = np.lexsort((tile, worker))
    begin, end, tile, worker = begin[order], end[order], tile[order], worker[order]
    return _Parts(tile, worker, begin - first[tile], end - first[tile])


def _items(
    parts: _Parts,
    tiles: _Tiles,
    kv: Ints,
    lens: Ints,
    granularity: Granularity,
    block_size: int,
    with_lse: bool,
) -> Ints:
    """Items of one KV head, (parts, 7): all fields but the heads."""
    blocks_per_unit = granularity.kvlen // block_size
    request = tiles.request[parts.tile]
    kv_start = kv[request] + parts.begin * blocks_per_unit
    kv_end = np.minimum(kv[request] + parts.end * blocks_per_unit, kv[request + 1])
    goes_on = parts.end < tiles.units[parts.tile]
    behind = lens[request] - (kv_end - kv[request]) * block_size
    is_part = goes_on | (parts.begin > 0) | with_lse
    partial_row = np.where(is_part, (np.cumsum(is_part) - 1) * granularity.qlen, -1)
    fields = (
        request,
        partial_row,
        tiles.q_start[parts.tile],
        tiles.q_end[parts.tile],
        kv_start,
        kv_end,
        np.where(goes_on, behind, 0),
    )
    return np.stack(fields, axis=1).astype(np.int32)


def _for_all_heads(
    base: Ints,
    worker: Ints,
    num_heads_k: int,
    num_clusters: int,
    per_cluster: int,
    qhead_granularity: int,
) -> tuple[Ints, Ints]:
    """Repeat one head's items for every KV head: by cluster, then worker, then head, then part."""
    heads_each = num_heads_k // num_clusters
    head = np.repeat(np.arange(num_heads_k), len(base))
    part = np.tile(np.arange(len(base)), num_heads_k)
    order = np.lexsort((part, head, worker[part], head // heads_each))
    head, part = head[order], part[order]
    packed = head * qhead_granularity | (head + 1) * qhead_granularity << 16
    info = np.concatenate((base[part], packed[:, None]), axis=1).astype(np.int32)
    counts = np.bincount(worker, minlength=per_cluster) * heads_each
    indptr = np.concatenate(([0], np.cumsum(np.tile(counts, num_clusters))))
    return info, indptr.astype(np.int32)


def _reduce_lists(base: Ints) -> tuple[Ints, Ints, Ints]:
    """Parts grouped by the tile they belong to; clusters share these lists, each in its own heads."""
    parts = base[base[:, 1] >= 0]
    parts = parts[np.lexsort((parts[:, 1], parts[:, 3], parts[:, 2]))]
    final_map, counts = np.unique(parts[:, 2:4], axis=0, return_counts=True)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    return indptr.astype(np.int32), final_map.astype(np.int32), parts[:, 1].astype(np.int32)


# --- on the device --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceWork:
    """A plan where kernels can read it: int32 tensors that share one allocation, and what launches need.

    ``with_lse``: as for :func:`plan`.

    ``value_indptr`` (B + 1) says where each request's keys start when they are padded to whole units.
    """

    work_indptr: Tensor
    work_info: Tensor
    reduce_indptr: Tensor
    reduce_final_map: Tensor
    reduce_partial_map: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    context_lens: Tensor
    value_indptr: Tensor
    num_heads_k: int
    granularity: Granularity
    block_size: int
    is_causal: bool
    partial_rows: int
    total_q: int
    total_k: int
    max_seqlen_k: int
    padded_keys: int
    max_seqlen_q: int
    with_lse: bool = False

    @cached_property
    def kv_page_indices(self) -> Tensor:
        """(total_k,) int32: keys in order, each a page of one token. For kernels that want such a list."""
        return torch.arange(self.total_k, dtype=torch.int32, device=self.work_info.device)

    @property
    def num_cu(self) -> int:
        return self.work_indptr.shape[0] - 1

    @property
    def num_groups(self) -> int:
        return self.reduce_final_map.shape[0]

    def partial_buffers(self, num_heads: int, head_dim_v: int) -> tuple[Tensor, Tensor]:
        """Uninitialised partial_out (rows, Hq, Dv) and partial_lse (rows, Hq), at least one row."""
        rows, device = max(self.partial_rows, 1), self.work_info.device
        out = torch.empty(rows, num_heads, head_dim_v, dtype=torch.float32, device=device)
        return out, torch.empty(rows, num_heads, dtype=torch.float32, device=device)


#: Each list begins at a multiple of 16 bytes: kernels are compiled for such addresses, and for others.
ALIGNMENT = 4


class Event(Protocol):
    """A point in a stream, as ``torch.cuda.Event`` is."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Staging:
    """Two slots of pinned memory that the plans of one backend pass through by turns.

    A copy to the device reads its slot when the stream gets there, which may be long after it was asked
    for. So a slot is written again only when the event behind its copy has passed: two steps later, when
    waiting for it costs nothing. Planners that write a device's memory from the host, as aiter's does,
    overwrite the plan that the step before is still reading.
    """

    def __init__(self, device: torch.device, event: Callable[[], Event] | None = None) -> None:
        self.device = device
        self._make_event = event or (torch.cuda.Event if device.type == "cuda" else None)
        self._slots: list[tuple[Tensor, Event | None]] = []
        self._next = 0

    def copied(self, lists: Sequence[Ints]) -> list[Tensor]:
        """Arrays as int32 tensors on the device, in memory of their own, in order with its stream."""
        sizes = [-(-values.size // ALIGNMENT) * ALIGNMENT for values in lists]
        host, event = self._slot(sum(sizes))
        arrays, start = host.numpy(), 0
        for values, size in zip(lists, sizes, strict=True):
            arrays[start : start + values.size] = values.ravel()
            start += size
        # A copy even where host and device share memory: the slot is written again.
        there = host[: sum(sizes)].to(self.device, non_blocking=True, copy=True)
        if event is not None:
            with devices.use(self.device):  # on the stream of the copy, not of another device
                event.record()
        pieces = zip(there.split(sizes), lists, strict=True)
        return [piece[: values.size].view(values.shape) for piece, values in pieces]

    def _slot(self, size: int) -> tuple[Tensor, Event | None]:
        """The slot whose turn it is, free to be written and large enough."""
        at, self._next = self._next, 1 - self._next
        if at == len(self._slots):
            self._slots.append(self._new_slot(size))
        host, event = self._slots[at]
        if event is not None:
            event.synchronize()
        if host.numel() < size:
            self._slots[at] = self._new_slot(size)
        return self._slots[at]

    def _new_slot(self, size: int) -> tuple[Tensor, Event | None]:
        room = 1 << max(size - 1, 0).bit_length()
        host = torch.empty(
            room, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda"
        )
        return host, None if self._make_event is None else self._make_event()


def plan_on_device(
    qo_indptr: Sequence[int] | Ints,
    kv_indptr: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    device: torch.device,
    *,
    num_heads_k: int,
    num_cu: int,
    granularity: Granularity,
    block_size: int = 1,
    is_causal: bool = True,
    with_lse: bool = False,
    whole_tiles: bool = False,
    staging: Staging | None = None,
) -> DeviceWork:
    """:func:`plan`, copied to a device in one piece, on its current stream and without waiting for it.

    ``whole_tiles``: as :func:`plan_whole_tiles` where that is faster, for kernels that run any list.
    ``staging``: what the steps of one backend are copied through; default: memory of this call's own.
    """
    lengths = qo_indptr, kv_indptr, context_lens
    how: dict[str, Any] = {
        "num_heads_k": num_heads_k,
        "num_cu": num_cu,
        "granularity": granularity,
        "block_size": block_size,
        "is_causal": is_causal,
    }
    work = plan_whole_tiles(*lengths, **how) if whole_tiles and not with_lse else None
    if work is None:
        work = plan(*lengths, **how, with_lse=with_lse)
    lens = np.asarray(context_lens, np.int64)
    values = np.concatenate(([0], np.cumsum(-(-lens // granularity.kvlen) * granularity.kvlen)))
    lists = (
        work.work_info,  # first: rows of 32 bytes, on an address aligned to them
        work.work_indptr,
        work.reduce_indptr,
        work.reduce_final_map,
        work.reduce_partial_map,
        np.asarray(qo_indptr),
        np.asarray(kv_indptr),
        lens,
        values,
    )
    staging = Staging(device) if staging is None else staging
    info, indptr, reduce_indptr, final_map, partial_map, qo, kv, context, padded = staging.copied(
        lists
    )
    return DeviceWork(
        indptr,
        info,
        reduce_indptr,
        final_map,
        partial_map,
        qo,
        kv,
        context,
        padded,
        num_heads_k,
        granularity,
        block_size,
        is_causal,
        work.partial_rows,
        int(qo_indptr[-1]),
        int(kv_indptr[-1]) * block_size,
        int(lens.max(initial=0)),
        int(values[-1]),
        int(np.diff(qo_indptr).max(initial=0)),
        with_lse,
    )


# --- what the lists mean --------------------------------------------------------------------------------


def execute(
    work: WorkList,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qo_indptr: Sequence[int] | Ints,
    kv_indptr: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    kv_page_indices: Tensor,
    softmax_scale: float,
    is_causal: bool,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
) -> None:
    """Execute every item of a schedule, in float64: the definition that kernels are tested against.

    Args:
        q: (total_q, Hq, D). k: (pages, block_size, Hkv, D). v: (pages, block_size, Hkv, Dv).
        out: (total_q, Hq, Dv) and lse: (total_q, Hq), written for whole tiles.
        partial_out: (rows, Hq, Dv) and partial_lse: (rows, Hq), written for parts of tiles.
    """
    block_size, group = k.shape[1], q.shape[1] // k.shape[2]
    for row in work.work_info:
        item = Item(*row.tolist())
        first = int(kv_indptr[item.request])
        pages = kv_page_indices[item.kv_start : item.kv_end].long()
        heads = slice(item.heads & 0xFFFF, item.heads >> 16)
        length = int(context_lens[item.request])
        k_pos = torch.arange(len(pages) * block_size) + (item.kv_start - first) * block_size
        offset = int(qo_indptr[item.request])
        q_lens = int(qo_indptr[item.request + 1]) - offset
        q_pos = torch.arange(item.q_start, item.q_end) - offset + length - q_lens
        visible = (k_pos < length)[None, :] & torch.ones(len(q_pos), 1, dtype=torch.bool)
        if is_causal:
            visible &= k_pos[None, :] <= q_pos[:, None]
        for h in range(heads.start, heads.stop):
            rows_k = k[pages, :, h // group].flatten(0, 1).double()
            rows_v = v[pages, :, h // group].flatten(0, 1).double()
            scores = q[item.q_start : item.q_end, h].double() @ rows_k.T * softmax_scale
            scores = scores.masked_fill(~visible, float("-inf"))
            weights, row_lse = reference.softmax_with_sinks(scores[None], None)
            rows_v = rows_v.masked_fill(
                ~visible.any(0)[:, None], 0.0
            )  # tails of pages hold anything
            to_out, to_lse, at = out, lse, item.q_start
            if item.partial_row >= 0:
                to_out, to_lse, at = partial_out, partial_lse, item.partial_row
            rows = slice(at, at + item.q_end - item.q_start)
            to_out[rows, h] = (weights[0] @ rows_v).to(to_out.dtype)
            to_lse[rows, h] = row_lse[0].to(to_lse.dtype)


def reduce(
    work: WorkList, partial_out: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Merge the parts of every tile that was split; reads only rows that :func:`execute` wrote."""
    for group, (start, end) in enumerate(work.reduce_final_map.tolist()):
        part = work.reduce_partial_map[slice(*work.reduce_indptr[group : group + 2])]
        rows = [slice(row, row + end - start) for row in part.tolist()]
        merged, merged_lse = reference.combine(
            torch.stack([partial_out[r] for r in rows]), torch.stack([partial_lse[r] for r in rows])
        )
        out[start:end] = merged.to(out.dtype)
        lse[start:end] = merged_lse.to(lse.dtype)
