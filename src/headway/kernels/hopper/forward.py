"""Attention forward for Hopper: one persistent kernel for dense, ragged and paged keys.

A CTA is one producer warp, helped by three more where keys come in small boxes, and two or three consumer
warpgroups of 64 query rows each. The producer takes tiles off the schedule, fetches Q, K and V with TMA and
tells the consumers what they work on; each consumer
runs QK, softmax and PV over the blocks its rows see, from the last key to the first, and writes its rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headway.errors import UnsupportedError
from headway.kernels._triton import cdiv, gdc_launch_dependents, gl, gluon
from headway.kernels.hopper import pipeline
from headway.kernels.hopper.config import ForwardConfig, box_rows
from headway.kernels.hopper.consumer import consume
from headway.kernels.hopper.direct import Boxes, DirectLaunch
from headway.kernels.hopper.merge import merge
from headway.kernels.hopper.producer import help_produce, produce
from headway.kernels.hopper.schedule import max_tiles, order_tiles
from headway.kernels.hopper.tiles import (
    MIN_BOX_ROWS,
    ForwardTile,
    choose_splits,
    forward_tile,
    padded_dims,
)
from headway.kernels.mods import kind_of

_UNSPECIALISED = [
    "rows_q",
    "rows_k",
    "num_heads",
    "group",
    "tiles_per_head",
    "scheduled_heads",
    "section",
    "splits",
    "page_table_stride",
    "window_left",
    "window_right",
    "chunk",
    "head_dim_v",
    "stride_out_batch",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_batch",
    "stride_lse_head",
    "stride_out_split",
    "stride_lse_split",
]


@gluon.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    q_desc,
    k,
    v,
    out_desc,
    out,
    lse,
    sinks,
    descales,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    page_table,
    schedule,
    key_strides,
    aux,
    rows_q,
    rows_k,
    num_heads,
    group,
    tiles_per_head,
    scheduled_heads,
    section,
    splits,
    page_table_stride,
    window_left,
    window_right,
    chunk,
    head_dim_v,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    stride_out_split,
    stride_lse_split,
    softmax_scale,
    softcap,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    if cfg.split:
        # The merge may get ready; it waits for this kernel's end by itself.
        gdc_launch_dependents()
    buffers = pipeline.allocate(cfg)
    call = pipeline.Call(
        rows_q,
        rows_k,
        num_heads,
        group,
        tiles_per_head,
        scheduled_heads,
        section,
        splits,
        page_table_stride,
        window_left,
        window_right,
        chunk,
        head_dim_v,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        stride_out_split,
        stride_lse_split,
        softmax_scale,
        softcap,
    )
    # fmt: off
    if cfg.gathered:
        gl.warp_specialize([
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 0, cfg,
            )),
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 1, cfg,
            )),
            (produce, (
                q_desc, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
                cache_batch_idx, page_table, key_strides, schedule, buffers, call, cfg,
            )),
        ], cfg.worker_warps, cfg.worker_registers)
    elif cfg.warpgroups == 2:
        gl.warp_specialize([
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 0, cfg,
            )),
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 1, cfg,
            )),
            (produce, (
                q_desc, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
                cache_batch_idx, page_table, key_strides, schedule, buffers, call, cfg,
            )),
            (help_produce, (k, v, page_table, buffers, call, 1, cfg)),
            (help_produce, (k, v, page_table, buffers, call, 2, cfg)),
            (help_produce, (k, v, page_table, buffers, call, 3, cfg)),
        ], cfg.worker_warps, cfg.worker_registers)
    else:
        gl.warp_specialize([
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 0, cfg,
            )),
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 1, cfg,
            )),
            (consume, (
                buffers, out_desc, out, lse, sinks, descales, call, aux, score_mod, mask_mod, 2, cfg,
            )),
            (produce, (
                q_desc, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
                cache_batch_idx, page_table, key_strides, schedule, buffers, call, cfg,
            )),
            (help_produce, (k, v, page_table, buffers, call, 1, cfg)),
            (help_produce, (k, v, page_table, buffers, call, 2, cfg)),
            (help_produce, (k, v, page_table, buffers, call, 3, cfg)),
        ], cfg.worker_warps, cfg.worker_registers)
    # fmt: on


# ---- launcher ----------------------------------------------------------------------------------------

#: Bytes of K and V whose heads may be interleaved: about half of the L2 cache.
_SECTION_BYTES = 32 << 20
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

#: Compiled kernels by everything that they depend on.
_LAUNCHES: dict[Hashable, DirectLaunch] = {}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    descales: Tensor | None = None,
    schedule: Tensor | None = None,
    **options: Any,
) -> None:
    """Attention now: what :func:`prepare` makes of these arguments, called with them."""
    if out.numel() == 0:
        return
    if k.numel() == 0:
        _fill_empty(out, lse, sinks, cu_seqlens_q, seqused_q)
        return
    given = (
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        leftpad_k,
        cache_batch_idx,
        page_table,
        sinks,
        descales,
    )
    prepare(*given, **options)(*given, schedule)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    descales: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    score_mod: Any = None,
    mask_mod: Any = None,
    aux: Any = None,
    num_splits: int = 0,
    tile: ForwardTile | None = None,
) -> Prepared:
    """Attention of ``q`` over ``k`` and ``v`` into ``out`` (and ``lse``), all but where they lie decided.

    The result is called with tensors of the same shapes, strides, dtypes and device, in the same order, and
    with a schedule, if there is one.

    - q, out: (B, Sq, Hq, D | Dv), or (total_q, Hq, D | Dv) with ``cu_seqlens_q``; bfloat16 or float16.
    - k, v: (B, Sk, Hkv, D | Dv); (total_k, Hkv, D | Dv) with ``cu_seqlens_k``; (num_pages, page_size, Hkv,
      D | Dv) with ``page_table`` (B, max_pages). Hkv divides Hq. Pages that are no multiple of eight
      tokens, or that begin with padding, are copied row by row, which takes longer.
    - lse: float32 (B, Hq, Sq) or (Hq, total_q); natural log; -inf where a row sees nothing.
    - cu_seqlens_*: int32 (B + 1,). seqused_*, leftpad_k, cache_batch_idx: int32 (B,). ``seqused_k`` counts
      from the start of the row, padding on the left included. sinks: (Hq,).
    - descales: float32 (B, Hkv, 2), contiguous: factors of keys, 0 or more, and of values.
    - Windows count keys beside the query's own; None is unlimited.
    - score_mod, mask_mod, aux: Gluon functions and what they look into, from headway.kernels.mods.
    - num_splits: pieces that each tile's keys are cut into, at most; 0: as many as fill the card, where
      tiles alone do not. Pieces are merged by a second kernel.
    - schedule: for ragged q an :func:`~.schedule.order_tiles` of the same call, else int32 zeros (2,); it
      spares a launch, and comes back as it was. One call at a time may use it.

    The last dimension of every tensor is contiguous; other strides and the addresses of q, k, v and out
    are multiples of 16 bytes. Nothing is checked on the device and nothing synchronises.

    Raises:
        UnsupportedError: head dims or strides this kernel does not take.
    """
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    plan = _plan(
        q.dtype,
        (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), out.shape, out.stride()),
        None if lse is None else lse.stride(),
        batch_size,
        cu_seqlens_q is not None,
        cu_seqlens_k is not None,
        seqused_q is not None,
        seqused_k is not None,
        None if page_table is None else page_table.stride(0),
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        _tighter(window_right, 0 if causal else None),
        attention_chunk,
        softcap > 0,
        softmax_scale > 0,
        score_mod is not None or mask_mod is not None,
        leftpad_k is not None,
        num_splits,
        tile,
        q.device,
    )
    order = functools.partial(
        order_tiles,
        batch_size=batch_size,
        total_rows=q.shape[0] * plan.cfg.pack,
        block_m=plan.cfg.block_m,
        pack=plan.cfg.pack,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=plan.cfg.has_right,
        window_tokens=plan.window_tokens,
        device=q.device,
    )
    scalars = (softmax_scale, softcap, score_mod, mask_mod)
    return Prepared(plan, order, max_seqlen_q, aux, scalars)


class Prepared:
    """Calls of the forward kernel that differ in where their tensors lie, and in nothing else."""

    def __init__(
        self,
        plan: _Plan,
        order: Callable[..., Tensor],
        max_seqlen_q: int,
        aux: Any,
        scalars: tuple[Any, ...],
    ) -> None:
        self._plan = plan
        self._order = order
        self._max_seqlen_q = max_seqlen_q
        self._aux = aux
        self._scalars = scalars
        self._aligned: DirectLaunch | None = None  # for small tensors at multiples of 16 bytes

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        page_table: Tensor | None = None,
        sinks: Tensor | None = None,
        descales: Tensor | None = None,
        schedule: Tensor | None = None,
    ) -> None:
        plan = self._plan
        if schedule is None and plan.cfg.work_list:
            schedule = self._order(
                cu_seqlens_q=cu_seqlens_q,
                seqused_q=seqused_q,
                cu_seqlens_k=cu_seqlens_k,
                seqused_k=seqused_k,
            )
        elif schedule is None and plan.cfg.dynamic:
            schedule = torch.zeros(2, dtype=torch.int32, device=q.device)
        lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
        rest = *lengths, leftpad_k, cache_batch_idx, page_table, schedule
        if plan.splits == 1:
            self._start(q, k, v, out, (out, lse, sinks, descales, *rest))
            return
        parts = _partials(out, plan.splits)
        self._start(q, k, v, out, (*parts, None, descales, *rest))
        merge(
            *parts,
            out,
            lse,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            seqused_q=seqused_q,
            max_seqlen_q=self._max_seqlen_q,
        )

    def _start(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pointers: tuple[Tensor | None, ...]
    ) -> None:
        plan = self._plan
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        if (q_at | k_at | v_at | out_at) & 15:
            raise UnsupportedError(
                "hopper forward: q, k, v and out need addresses at multiples of 16"
            )
        addresses, together = [], 0
        for t in pointers:
            at = None
            if t is not None:
                at = t.data_ptr()
                together |= at
            addresses.append(at)
        launch = self._aligned
        if launch is None or together & 15:
            launch = self._compiled(q, k, v, out, pointers)
            if not together & 15:
                self._aligned = launch
        args = (
            *plan.q_boxes(launch, q_at),
            *((k_at,) if plan.cfg.gathered else plan.k_boxes(launch, k_at)),
            *((v_at,) if plan.cfg.gathered else plan.v_boxes(launch, v_at)),
            *plan.out_boxes(launch, out_at),
            *addresses,
            plan.key_strides,
            self._aux,
            *plan.numbers,
            *self._scalars,
            None,
            None,
        )
        launch(plan.grid, q.device.index, args)

    def _compiled(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pointers: tuple[Tensor | None, ...]
    ) -> DirectLaunch:
        plan, cfg = self._plan, self._plan.cfg
        kinds = (None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in pointers)
        key = (plan.key, *kinds, *self._scalars[2:], kind_of(self._aux))
        found = _LAUNCHES.get(key)
        if found is None:
            compiled = forward_kernel.warmup(
                plan.q_boxes.described(q),
                k if cfg.gathered else plan.k_boxes.described(k),
                v if cfg.gathered else plan.v_boxes.described(v),
                plan.out_boxes.described(out),
                *pointers,
                plan.key_strides,
                self._aux,
                *plan.numbers,
                *self._scalars,
                cfg,
                num_warps=4,
                grid=plan.grid,
            )
            found = _LAUNCHES[key] = DirectLaunch(compiled)
        return found


@dataclass(frozen=True)
class _Plan:
    """What a call's shapes and options decide, kept from call to call."""

    cfg: ForwardConfig
    grid: tuple[int, int, int]
    key: Hashable  # of the compiled kernel, as far as it is decided here
    numbers: tuple[int, ...]  # the kernel's integers, rows_q to stride_lse_split
    splits: int
    #: page, row and head of k, then of v, where rows are gathered
    key_strides: tuple[int, ...] | None
    q_boxes: Boxes
    k_boxes: Boxes
    v_boxes: Boxes
    out_boxes: Boxes
    window_tokens: int | None  # keys that a tile sees at most, for ordering tiles


@functools.lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    layouts: tuple[tuple[int, ...], ...],
    lse_stride: tuple[int, ...] | None,
    batch_size: int,
    ragged_q: bool,
    ragged_k: bool,
    seqused_q: bool,
    seqused_k: bool,
    page_table_stride: int | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int | None,
    window_right: int | None,
    chunk: int,
    has_soft_cap: bool,
    positive_scale: bool,
    has_mods: bool,
    has_pad: bool,
    num_splits: int,
    tile: ForwardTile | None,
    device: torch.device,
) -> _Plan:
    q_shape, q_stride, k_shape, k_stride, v_shape, v_stride, out_shape, out_stride = layouts
    num_heads, num_heads_k = q_shape[-2], k_shape[-2]
    # Bounds that no row reaches cost nothing.
    left = None if window_left is None or window_left >= max_seqlen_k - 1 else window_left
    right = None if window_right is None or window_right >= max_seqlen_q - 1 else window_right
    pack = _heads_to_pack(max_seqlen_q, num_heads // num_heads_k)
    paged = page_table_stride is not None
    cfg = _config(
        dtype,
        q_shape[-1],
        v_shape[-1],
        page_size=k_shape[1] if paged else 0,
        tile=tile,
        has_mods=has_mods,
        max_seqlen_q=max_seqlen_q,
        pack=pack,
        ragged_q=ragged_q,
        exact_q=not ragged_q and not seqused_q,
        exact_k=not (ragged_k or paged or seqused_k),
        has_left=left is not None,
        has_right=right is not None,
        has_chunk=chunk > 0,
        has_soft_cap=has_soft_cap,
        prescaled=not positive_scale and not has_soft_cap,
        # Boxes lie within pages, from multiples of their rows on; padding on the left would shift them.
        gathered=paged and (box_rows(k_shape[1], MIN_BOX_ROWS) < MIN_BOX_ROWS or has_pad),
    )
    heads = num_heads // pack
    group = heads // num_heads_k
    if cfg.work_list:
        tiles_per_head, scheduled_heads = 0, heads
        tiles = max_tiles(batch_size, q_shape[0] * pack, cfg.block_m) * heads
    else:
        tiles_per_head, scheduled_heads = cdiv(max_seqlen_q * pack, cfg.block_m), heads * batch_size
        tiles = tiles_per_head * scheduled_heads
    window_tokens = left + cfg.block_m if left is not None and right is not None else None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    longest = max_seqlen_k if window_tokens is None else min(max_seqlen_k, window_tokens)
    splits = num_splits or choose_splits(tiles, cdiv(longest, cfg.block_n), processors)
    if splits > 1:
        cfg = replace(cfg, split=True)
        out_stride, lse_stride = _packed(out_shape), _packed(_lse_shape(out_shape))
    numbers = (
        max_seqlen_q,
        max_seqlen_k,
        heads,
        group,
        tiles_per_head,
        scheduled_heads * splits,
        section_of(scheduled_heads, max_seqlen_k, q_shape[-1] + v_shape[-1], group, cfg.dynamic)
        * splits,
        splits,
        page_table_stride or 0,
        left or 0,
        right or 0,
        chunk,
        v_shape[-1],
        0 if ragged_q else out_stride[0],
        out_stride[-3],
        out_stride[-2],
        0 if ragged_q or lse_stride is None else lse_stride[0],
        0 if lse_stride is None else lse_stride[-2],
        math.prod(out_shape) if splits > 1 else 0,
        math.prod(out_shape[:-1]) if splits > 1 else 0,
    )
    key_strides = None
    if cfg.gathered:
        key_strides = (*k_stride[:-1], *v_stride[:-1])
    return _Plan(
        cfg=cfg,
        grid=(min(tiles * splits, processors), 1, 1),
        key=(cfg, tuple(n >= 2**31 for n in numbers), kind_of(key_strides), device),
        numbers=numbers,
        splits=splits,
        key_strides=key_strides,
        q_boxes=_query_boxes("q", dtype, q_shape, q_stride, cfg),
        k_boxes=_key_boxes("k", dtype, k_shape, k_stride, ragged_k, cfg),
        v_boxes=_key_boxes("v", dtype, v_shape, v_stride, ragged_k, cfg),
        out_boxes=_query_boxes("out", dtype, out_shape, out_stride, cfg),
        window_tokens=window_tokens,
    )


def _config(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    *,
    page_size: int,
    tile: ForwardTile | None,
    has_mods: bool,
    max_seqlen_q: int,
    gathered: bool,
    **features: Any,
) -> ForwardConfig:
    padded = padded_dims(head_dim, head_dim_v)
    if dtype not in _DTYPES:
        raise UnsupportedError(f"hopper forward: dtype {dtype}; takes bfloat16 and float16")
    if padded is None or head_dim % 8 or head_dim_v % 8:
        raise UnsupportedError(
            f"hopper forward: head dims {head_dim}/{head_dim_v}; takes multiples of 8 up to 256"
        )
    tile = tile or forward_tile(*padded, features["has_right"], max_seqlen_q, page_size > 0)
    if has_mods:
        # Their arithmetic needs the registers that larger tiles and an overlapped PV would hold.
        tile = replace(tile, block_m=128, block_n=64, overlap=False, q_in_registers=0)
    if gathered:
        # So do the addresses of rows, of which the producer's warps hold many.
        tile = replace(tile, block_m=128, q_in_registers=0)
        features["exact_k"] = True
    limited = features["has_left"] or features["has_right"] or features["has_chunk"]
    return ForwardConfig(
        dtype=_DTYPES[dtype],
        tile=tile,
        head_dim=padded[0],
        head_dim_v=padded[1],
        page_size=page_size,
        gathered_dims=(head_dim, head_dim_v) if gathered else None,
        work_list=features["ragged_q"],
        # Where all tiles take the same time, round robin needs no counter.
        dynamic=limited or not (features["exact_q"] and features["exact_k"]),
        **features,
    )


def _tighter(a: int | None, b: int | None) -> int | None:
    """The smaller of two bounds, of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _lse_shape(out_shape: tuple[int, ...]) -> tuple[int, ...]:
    *batch, rows, heads, _ = out_shape
    return (*batch, heads, rows)


def _partials(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Room for ``splits`` partial results."""
    shape = tuple(out.shape)
    parts = torch.empty((splits, *shape), dtype=torch.float32, device=out.device)
    lses = torch.empty((splits, *_lse_shape(shape)), dtype=torch.float32, device=out.device)
    return parts, lses


def _fill_empty(
    out: Tensor,
    lse: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    seqused_q: Tensor | None,
) -> None:
    """The result where there is no key at all, in the rows that are queries."""
    rows = torch.arange(out.shape[-3], device=out.device)
    mine = torch.ones_like(rows, dtype=torch.bool)
    if cu_seqlens_q is not None:
        sequence = torch.searchsorted(cu_seqlens_q, rows, right=True, out_int32=True) - 1
        mine = rows < cu_seqlens_q[-1]
        if seqused_q is not None:
            sequence = sequence.clamp(max=seqused_q.shape[0] - 1)
            mine = mine & (rows - cu_seqlens_q[sequence] < seqused_q[sequence])
    elif seqused_q is not None:
        mine = rows < seqused_q[:, None]
    out.masked_fill_(mine[..., None, None], 0.0)
    if lse is not None:
        seen = torch.full((1, 1), float("-inf"), device=lse.device)
        if sinks is not None:
            seen = sinks.float()[:, None]
        lse.copy_(torch.where(mine.unsqueeze(-2), seen, lse))


def _heads_to_pack(seqlen_q: int, group: int) -> int:
    """Query heads of a KV head to pack into the rows of a tile: all, where they fill tiles clearly better
    and divide the 64 rows of a warpgroup; otherwise 1."""
    if group == 1 or 64 % group:
        return 1
    filled = seqlen_q / (cdiv(seqlen_q, 128) * 128)
    filled_packed = seqlen_q * group / (cdiv(seqlen_q * group, 128) * 128)
    return group if filled < 0.9 * filled_packed else 1


def section_of(
    heads: int, seqlen_k: int, bytes_per_key: int, group: int, longest_first: bool
) -> int:
    """Heads, of ``heads`` in all, whose tiles are interleaved. Tiles of equal length need no interleaving
    beyond the heads that share keys; longest first does, as far as L2 holds the keys. The last section must
    not be much smaller than the others: its longest tiles would start when there is little else to do."""
    if not longest_first:
        return group
    groups = cdiv(heads, group)
    most = max(_SECTION_BYTES // max(2 * seqlen_k * bytes_per_key, 1), 1)
    if most >= groups:
        return heads
    fullest = max(range(most // 2 + 1, most + 1), key=lambda n: (((groups - 1) % n + 1) / n, n))
    return fullest * group


def _check_strides(name: str, strides: tuple[int, ...]) -> None:
    if strides[-1] != 1 or any(s % 8 for s in strides[:-1]):
        raise UnsupportedError(
            f"hopper forward: {name} with strides {tuple(strides)}; takes a contiguous last dimension "
            "and multiples of 8 elsewhere"
        )


def _query_boxes(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    cfg: ForwardConfig,
) -> Boxes:
    """q or out as (batch, head, row, column), or (batch, KV head, row, head in group, column)."""
    _check_strides(name, strides)
    rows, heads, dim = shape[-3:]
    row, head, _ = strides[-3:]
    batch, batch_stride = (1, rows * row) if len(shape) == 3 else (shape[0], strides[0])
    if cfg.pack == 1:
        dims, steps = [batch, heads, rows, dim], [batch_stride, head, row, 1]
    else:
        dims = [batch, heads // cfg.pack, rows, cfg.pack, dim]
        steps = [batch_stride, head * cfg.pack, row, head, 1]
    return Boxes(dtype, tuple(dims), tuple(steps), tuple(cfg.q_box), cfg.q_box_smem)


def _key_boxes(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    ragged: bool,
    cfg: ForwardConfig,
) -> Boxes:
    """k or v as (batch entry or page, head, row, column)."""
    _check_strides(name, strides)
    rows, heads, dim = shape[-3:]
    row, head, _ = strides[-3:]
    batch, batch_stride = (1, rows * row) if ragged else (shape[0], strides[0])
    dims, steps = (batch, heads, rows, dim), (batch_stride, head, row, 1)
    return Boxes(dtype, dims, steps, tuple(cfg.k_box), cfg.k_box_smem)
