"""Decode on Hopper: few queries per sequence against a long cache, at the speed of its memory.

Queries of one KV head, tokens times heads that share it, are packed into the 64 rows of one wgmma tile, so
keys and values are read once. Workers, one or two to a multiprocessor, take equal shares of the step's
blocks off a :class:`~headway.kernels.hopper.decode_plan.DecodePlan`; in each, one producer keeps the copy
engine's stages full and one warpgroup consumes them. A unit that was cut is merged by the worker that
finishes it last. Nothing waits for another worker.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.kernels._triton import (
    TensorDescriptor,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
)
from headway.kernels.hopper.decode_config import DecodeConfig, DecodeTile, tile_for
from headway.kernels.hopper.decode_consumer import Call, Parts, consume
from headway.kernels.hopper.decode_load import allocate, produce_boxes, produce_gathered
from headway.kernels.hopper.decode_plan import DecodePlan, empty_plan
from headway.kernels.hopper.decode_wide import consume_wide
from headway.kernels.hopper.direct import DirectLaunch, TensorMap, misaligned, tensor_map

_UNSPECIALISED = [
    "units",
    "num_rows",
    "num_pages",
    "stride_q_batch",
    "stride_q_row",
    "stride_q_head",
    "stride_qv_batch",
    "stride_qv_row",
    "stride_qv_head",
    "stride_k_page",
    "stride_k_row",
    "stride_k_head",
    "stride_v_page",
    "stride_v_row",
    "stride_v_head",
    "stride_out_batch",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_batch",
    "stride_lse_head",
    "stride_table",
    "stride_q_descale_batch",
    "stride_q_descale_head",
    "stride_k_descale_batch",
    "stride_k_descale_head",
    "stride_v_descale_batch",
    "stride_v_descale_head",
    "window_left",
    "window_right",
    "chunk",
]


@gluon.jit(do_not_specialize=_UNSPECIALISED)
def decode_kernel(
    k_desc,
    v_desc,
    q_ptr,
    qv_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks,
    q_descale,
    k_descale,
    v_descale,
    page_table,
    spans,
    works,
    share_ptr,
    arrivals,
    parts,
    part_sums,
    units,
    num_rows,
    num_pages,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_qv_batch,
    stride_qv_row,
    stride_qv_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    stride_table,
    stride_q_descale_batch,
    stride_q_descale_head,
    stride_k_descale_batch,
    stride_k_descale_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    scale,
    softcap,
    window_left,
    window_right,
    chunk,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program per worker of the plan and tile of packed rows; see :func:`decode`. Keys and values come
    through descriptors, or through pointers where ``cfg.gathered``."""
    buffers = allocate(cfg)
    # Up to here the kernel before may still run; the one behind may come up as workers finish.
    gdc_wait()
    gdc_launch_dependents()
    call = Call(
        units,
        num_rows,
        stride_q_batch,
        stride_q_row,
        stride_q_head,
        stride_qv_batch,
        stride_qv_row,
        stride_qv_head,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        scale,
        softcap,
        window_left,
        window_right,
        chunk,
    )
    merging = Parts(arrivals, parts, part_sums)
    descales = (
        (q_descale, stride_q_descale_batch, stride_q_descale_head),
        (k_descale, stride_k_descale_batch, stride_k_descale_head),
        (v_descale, stride_v_descale_batch, stride_v_descale_head),
    )
    tensors = q_ptr, qv_ptr, out_ptr, lse_ptr, sinks, descales, spans, works, share_ptr
    k_strides = stride_k_page, stride_k_row, stride_k_head
    v_strides = stride_v_page, stride_v_row, stride_v_head
    work = buffers, page_table, spans, works, units, stride_table
    # Partitions can only be named where they are started.
    if cfg.wide and cfg.gathered:
        gl.warp_specialize(
            [
                (consume_wide, (tensors, buffers, merging, call, 0, cfg)),
                (consume_wide, (tensors, buffers, merging, call, 1, cfg)),
                (produce_gathered, (k_ptr, v_ptr, k_strides, v_strides, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.wide:
        gl.warp_specialize(
            [
                (consume_wide, (tensors, buffers, merging, call, 0, cfg)),
                (consume_wide, (tensors, buffers, merging, call, 1, cfg)),
                (produce_boxes, (k_desc, v_desc, num_pages, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.consumers == 2 and cfg.gathered:
        gl.warp_specialize(
            [
                (consume, (tensors, buffers, merging, call, 0, cfg)),
                (consume, (tensors, buffers, merging, call, 1, cfg)),
                (produce_gathered, (k_ptr, v_ptr, k_strides, v_strides, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, buffers, merging, call, 0, cfg)),
                (consume, (tensors, buffers, merging, call, 1, cfg)),
                (produce_boxes, (k_desc, v_desc, num_pages, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.gathered:
        gl.warp_specialize(
            [
                (consume, (tensors, buffers, merging, call, 0, cfg)),
                (produce_gathered, (k_ptr, v_ptr, k_strides, v_strides, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, buffers, merging, call, 0, cfg)),
                (produce_boxes, (k_desc, v_desc, num_pages, work, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )


_NO_STRIDES = (0,) * 6
_GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def make_plan(
    *,
    batch_size: int,
    num_kv_heads: int,
    group: int,
    max_seqlen_q: int,
    head_dim: int,
    head_dim_v: int,
    device: torch.device,
    itemsize: int = 2,
    page_size: int = 0,
    sm_margin: int = 0,
    tile: DecodeTile | None = None,
) -> DecodePlan:
    """Buffers for decode steps of this geometry; :func:`plan_decode` fills them, once per step.

    Args:
        group: query heads per KV head.
        itemsize: bytes per element of keys and values.
        page_size: rows of a page, 0 where keys are not paged.
        sm_margin: multiprocessors to leave to others.
        tile: how workers are built; default: the measured one for these head dims.
    """
    rows = max_seqlen_q * group
    m_tiles = cdiv(rows, 64)
    tile = tile or tile_for(head_dim, head_dim_v, itemsize, rows, page_size)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return empty_plan(
        tile=tile,
        batch_size=batch_size,
        units=num_kv_heads,
        m_tiles=m_tiles,
        rows=min(rows, 64),
        head_dim_v=head_dim_v,
        workers=max((count - sm_margin) * tile.per_multiprocessor // m_tiles, 1),
        device=device,
    )


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: DecodePlan,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    page_table: Tensor | None = None,
    max_seqlen_q: int = 1,
    leftpad: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Attention of a planned step, written to ``out`` and ``lse``.

    Lengths, positions and masks are those that ``plan`` was filled with; the mask's numbers are given
    again because rows need them.

    Args:
        q: (B, Sq, Hq, D), or (total_q, Hq, D) where the plan was filled with ``cu_seqlens_q``.
        k, v: (B, S, Hkv, D or Dv), or (num_pages, page_size, Hkv, D or Dv) with ``page_table``
            (B, max_pages) int32. bfloat16 or float16, as q, or float8_e4m3fn beside a q of any of the
            three; last stride 1, other strides multiples of 16 bytes. Beside float8 keys, q keeps
            eight significant bits: all that bfloat16 has.
        out: as q, with Dv, any float dtype. Rows of no query stay as they are.
        lse: (B, Hq, Sq) or (Hq, total_q) float32, last stride 1, natural log; None: not wanted.
        max_seqlen_q: queries of the longest sequence, where q is ragged.
        leftpad: whether the plan was filled with ``leftpad_k``.
        sinks: (Hq,), any float dtype.
        qv: as q, with Dv; given, scores are scale · (q · k + qv · v), for 16-bit k and v.
        q_descale, k_descale, v_descale: (B, Hkv) float32 factors of float8 tensors, any strides.

    Raises:
        InvalidInputError: rows of q, k, v or out do not start at multiples of 16 bytes.
    """
    if plan.spans.shape[0] == 0:
        return
    ragged = q.dim() == 3
    rows = (max_seqlen_q if ragged else q.shape[1]) * (q.shape[-2] // k.shape[2])
    launch = _launch_for(
        q.device.index,
        q.dtype,
        k.dtype,
        out.dtype,
        plan.tile,
        q.shape[-1],
        v.shape[-1],
        q.shape[-2] // k.shape[2],
        rows,
        0 if page_table is None else k.shape[1],
        window_left is not None,
        window_right is not None,
        chunk > 0,
        leftpad,
        softcap > 0,
        lse is not None,
        None if sinks is None else sinks.dtype,
        qv is not None,
        q_descale is not None,
        k_descale is not None,
        v_descale is not None,
    )
    launch(
        plan,
        q,
        qv,
        k,
        v,
        out,
        lse,
        sinks,
        (q_descale, k_descale, v_descale),
        page_table,
        rows,
        softmax_scale,
        softcap,
        window_left or 0,
        window_right or 0,
        chunk or 1,
    )


class _Launch:
    """One compiled decode kernel, and the arguments it is started with."""

    def __init__(self, cfg: DecodeConfig) -> None:
        self.cfg = cfg
        self._direct: DirectLaunch | None = None

    def __call__(
        self,
        plan: DecodePlan,
        q: Tensor,
        qv: Tensor | None,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None,
        descales: tuple[Tensor | None, Tensor | None, Tensor | None],
        page_table: Tensor | None,
        rows: int,
        softmax_scale: float,
        softcap: float,
        window_left: int,
        window_right: int,
        chunk: int,
    ) -> None:
        if not (_is_aligned(q) and _is_aligned(out)):
            raise _misaligned(("out", out) if _is_aligned(q) else ("q", q))
        if qv is not None and not _is_aligned(qv):
            raise _misaligned(("qv", qv))
        if self.cfg.gathered and not (_is_aligned(k) and _is_aligned(v)):
            raise _misaligned(("v", v) if _is_aligned(k) else ("k", k))
        numbers = (
            plan.units,
            rows,
            k.shape[0],
            *_row_strides(q),
            *((0, 0, 0) if qv is None else _row_strides(qv)),
            *(_NO_STRIDES if not self.cfg.gathered else (*k.stride()[:3], *v.stride()[:3])),
            *_row_strides(out),
            *_lse_strides(lse),
            0 if page_table is None else page_table.stride(0),
            *_descale_strides(descales),
            softmax_scale,
            softcap,
            window_left,
            window_right,
            chunk,
        )
        plan_tensors = (
            plan.spans,
            plan.works,
            plan.share,
            plan.arrivals,
            plan.parts,
            plan.part_sums,
        )
        if self.cfg.gathered:
            keys: tuple[Any, ...] = (None, None)
        else:
            keys = (*self._map(k, self.cfg.k_width), *self._map(v, self.cfg.v_box_width))
        if self._direct is None:
            self._direct = self._compile(
                (q, qv, k, v, out, lse, sinks, *descales, page_table), plan_tensors, numbers
            )
        self._direct(
            plan.workers * plan.m_tiles,
            q.device.index,
            *keys,
            q.data_ptr(),
            None if qv is None else qv.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            *(None if descale is None else descale.data_ptr() for descale in descales),
            None if page_table is None else page_table.data_ptr(),
            *plan.addresses,
            *numbers,
            None,
            None,
        )

    def _map(self, cache: Tensor, width: int) -> TensorMap:
        pages, rows, heads, columns = cache.shape
        page, row, head, column = cache.stride()
        return tensor_map(
            cache.data_ptr(),
            cache.dtype,
            (pages, heads, rows, columns),
            (page, head, row, column),
            (1, 1, self.cfg.box_rows, width),
        )

    def _compile(
        self,
        tensors: tuple[Tensor | None, ...],
        plan_tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
    ) -> DirectLaunch:
        cfg = self.cfg
        q, qv, k, v, out, *others = tensors
        assert k is not None
        assert v is not None
        descriptors: tuple[Any, Any] = (None, None)
        if not cfg.gathered:
            descriptors = (
                _descriptor(k, [1, 1, cfg.box_rows, cfg.k_width], cfg.k_boxes),
                _descriptor(v, [1, 1, cfg.box_rows, cfg.v_box_width], cfg.v_boxes),
            )
            k = v = None
        compiled = decode_kernel.warmup(
            *descriptors,
            q,
            qv,
            k,
            v,
            out,
            *others,
            *plan_tensors,
            *numbers,
            cfg,
            num_warps=4,
            maxnreg=cfg.maxnreg,
            launch_pdl=True,
            grid=(1,),
        )
        return DirectLaunch(compiled)


@functools.lru_cache(maxsize=1024)
def _launch_for(
    device_index: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    out_dtype: torch.dtype,
    tile: DecodeTile,
    head_dim: int,
    head_dim_v: int,
    group: int,
    rows: int,
    page_size: int,
    has_left: bool,
    has_right: bool,
    has_chunk: bool,
    has_pad: bool,
    has_soft_cap: bool,
    has_lse: bool,
    sinks_dtype: torch.dtype | None,
    has_qv: bool,
    has_q_descale: bool,
    has_k_descale: bool,
    has_v_descale: bool,
) -> _Launch:
    """Compiled kernels by everything they depend on, dtypes and presence of every tensor included."""
    return _Launch(
        DecodeConfig(
            q_dtype=_GLUON_DTYPES[q_dtype],
            kv_dtype=_GLUON_DTYPES[kv_dtype],
            tile=tile,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            group=group,
            m_tiles=cdiv(rows, 64),
            rows=min(rows, 64),
            page_size=page_size,
            gathered=page_size % 8 != 0,
            latent=has_qv,
            has_left=has_left,
            has_right=has_right,
            has_chunk=has_chunk,
            has_pad=has_pad,
            has_soft_cap=has_soft_cap,
        )
    )


def _row_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of (batch, row, head); a ragged tensor's batches start at their first rows."""
    return t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])


def _lse_strides(lse: Tensor | None) -> tuple[int, ...]:
    if lse is None:
        return 0, 0
    return lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))


def _descale_strides(descales: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    if descales == (None, None, None):
        return _NO_STRIDES
    return tuple(n for d in descales for n in (d.stride() if d is not None else (0, 0)))


def _descriptor(cache: Tensor, box: list[int], layout: Any) -> TensorDescriptor:
    pages, rows, heads, columns = cache.shape
    page, row, head, _ = cache.stride()
    shape, strides = [pages, heads, rows, columns], [page, head, row, 1]
    return TensorDescriptor(cache, shape, strides, box, layout)


def _is_aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and is contiguous."""
    *strides, last = t.stride()
    together = functools.reduce(operator.or_, strides)
    return last == 1 and not (t.data_ptr() | together * t.element_size()) & 15


def _misaligned(named: tuple[str, Tensor]) -> InvalidInputError:
    name, t = named
    return misaligned(name, t.data_ptr(), t.stride(), t.element_size())
