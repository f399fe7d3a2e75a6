"""Float8 prefill at 192/128 over a persistent work list, for Hopper: the kernel and its launcher.

The lists are those of :mod:`headway.persistent`, as :mod:`headway.kernels.portable.mla_prefill` runs
them. A CTA is a compute unit: its producer warp walks the list and fetches Q, K and V with TMA, two
consumer warpgroups attend 64 query rows each, from the last key to the first, softmax beside products.

Two things are peculiar to float8. Its wgmma takes only operands whose reduced dimension is contiguous, so
values come transposed, keys in the order of :func:`..portable.quantise.interleaved`: that is the order in
which the scores' registers already are the next product's operand. And tensor cores keep some 14 bits of a
float8 sum, so a block's PV starts from zero and is added to float32 registers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headway.errors import UnsupportedError
from headway.kernels._triton import descriptor, gl, gluon, launch
from headway.kernels.hopper.mla_prefill_consumer import consume
from headway.kernels.hopper.mla_prefill_pipeline import (
    BLOCK_M,
    BLOCK_N,
    HEAD_DIM,
    HEAD_DIM_V,
    PrefillConfig,
    allocate,
)
from headway.kernels.hopper.mla_prefill_producer import produce
from headway.kernels.hopper.quantise_blocks import RECORD
from headway.kernels.hopper.softmax import LOG2E
from headway.kernels.portable.mla_prefill import Scales, mla_reduce
from headway.persistent import DeviceWork

#: What queries may be, as tensors and in the kernel.
QUERY_TYPES: dict[torch.dtype, Any] = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}


_UNSPECIALISED = [
    "heads",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_row",
    "stride_lse_head",
    "stride_q_scale",
    "stride_k_scale",
    "stride_v_scale",
]


#: Pieces of a plan's one allocation: where they begin, and with it their alignment, changes by step.
_LISTS = ["work_indptr", "work_info", "qo_indptr", "kv_indptr", "context_lens", "value_indptr"]


@gluon.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_LISTS)
def mla_prefill_kernel(
    q_wide,
    q_narrow,
    k_wide,
    k_narrow,
    v,
    records,
    out,
    lse,
    partial_out,
    partial_lse,
    work_indptr,
    work_info,
    qo_indptr,
    kv_indptr,
    context_lens,
    value_indptr,
    q_scale,
    k_scale,
    v_scale,
    heads,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    stride_q_scale,
    stride_k_scale,
    stride_v_scale,
    softmax_scale,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Strides of ``out`` count in units of 8 elements: stores are then known to be aligned."""
    buffers = allocate(cfg)
    outputs = (
        out,
        lse,
        partial_out,
        partial_lse,
        heads,
        stride_out_row * 8,
        stride_out_head * 8,
        stride_lse_row,
        stride_lse_head,
    )
    lists = (work_indptr, work_info, qo_indptr, kv_indptr, context_lens, value_indptr)
    scales = (
        q_scale,
        k_scale,
        v_scale,
        stride_q_scale,
        stride_k_scale,
        stride_v_scale,
        softmax_scale,
    )
    gl.warp_specialize(
        [
            (consume, (buffers, outputs, 0, cfg)),
            (consume, (buffers, outputs, 1, cfg)),
            (
                produce,
                (q_wide, q_narrow, k_wide, k_narrow, v, records, lists, scales, buffers, cfg),
            ),
        ],
        [4, 1],
        [cfg.consumer_registers, cfg.producer_registers],
    )


# ---- launcher ----------------------------------------------------------------------------------------


def refusal(work: DeviceWork, q: Tensor, k: Tensor, out: Tensor) -> str | None:
    """Why :func:`mla_prefill` does not take a call, q and k in float8 or about to be; None: it does."""
    dims = (q.shape[-1], out.shape[-1])
    if dims != (HEAD_DIM, HEAD_DIM_V):
        return f"heads {dims[0]}/{dims[1]} wide; takes {HEAD_DIM}/{HEAD_DIM_V}"
    if work.padded_keys == 0:
        return "no keys at all; takes at least one"
    for name, x in (("q", q), ("k", k)):
        if x.element_size() > 1:
            continue
        if x.dtype != torch.float8_e4m3fn:
            return f"{name} in {str(x.dtype).removeprefix('torch.')}; takes float8_e4m3fn"
        if not _takes_rows(x):
            return f"{name} with strides {x.stride()}; takes multiples of 16, and such an address"
    if out.stride(-1) != 1 or any(n % 8 for n in out.stride()[:-1]):
        return f"out with strides {out.stride()}; takes multiples of 8"
    return None


def takes_queries(q: Tensor) -> bool:
    """Whether the kernel takes queries as they are; where not, they must be made float8 and contiguous."""
    return q.dtype in QUERY_TYPES and _takes_rows(q)


def _takes_rows(x: Tensor) -> bool:
    """Whether TMA reads rows of (tokens, heads, width)."""
    steps = (*(n * x.element_size() for n in x.stride()[:-1]), x.data_ptr())
    return x.stride(-1) == 1 and not any(n % 16 for n in steps)


def mla_prefill(
    work: DeviceWork,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float,
    scales: Scales,
    records: Tensor | None = None,
    **options: Any,
) -> None:
    """Execute a work list and merge what was split; ``out`` and ``lse`` are filled.

    Args:
        q: (total_q, Hq, 192), float8_e4m3fn, or bfloat16 or float16: then it is divided by its scale, or
            each row by its own, and rounded to float8 here. k: (total_k, Hkv, 192) float8_e4m3fn.
        values: (Hkv, 128, padded keys) float8_e4m3fn, as :func:`..portable.quantise.transpose_values` makes
            them, at ``work.value_indptr``.
        records: (Hkv, padded keys / 128, 4) float32, scales of every block of keys, in place of k's and v's
            in ``scales``; from :func:`.quantise_blocks.quantise_blocks`.
        out: (total_q, Hq, 128), bfloat16, float16 or float32. lse: (total_q, Hq) with any strides, or None.
        options: fields of :class:`PrefillConfig`.

    Raises:
        UnsupportedError: head dims, dtypes or strides this kernel does not take.
    """
    reason = refusal(work, q, k, out)
    if reason is not None:
        raise UnsupportedError(f"hopper MLA prefill: {reason}")
    if out.numel() == 0:
        return
    chosen = {
        "q_type": QUERY_TYPES[q.dtype],
        "scale_rows": q.element_size() > 1 and scales.q is None,
        "scale_blocks": records is not None,
        **options,
    }
    cfg = _config(work.is_causal, q.shape[1] // work.num_heads_k, tuple(chosen.items()))
    partial_out, partial_lse = work.partial_buffers(q.shape[1], HEAD_DIM_V)
    factors = scales.arguments()
    pointers = (
        out,
        lse,
        partial_out,
        partial_lse,
        work.work_indptr,
        work.work_info,
        work.qo_indptr,
        work.kv_indptr,
        work.context_lens,
        work.value_indptr,
        *(factors[f"{name}_scale"] for name in "qkv"),
    )
    args = (
        *_descriptors(q, k, values, records, cfg),
        *pointers,
        q.shape[1],
        out.stride(0) // 8,
        out.stride(1) // 8,
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        *(factors[f"stride_{name}_scale"] for name in "qkv"),
        softmax_scale * LOG2E.value,
        cfg,
        4,
    )
    aligned = (out, lse, partial_out, partial_lse, scales.q, scales.k, scales.v)
    kind = [None if p is None else p.data_ptr() % 16 == 0 for p in aligned]
    launch(mla_prefill_kernel, (work.num_cu, 1, 1), (cfg, out.dtype, q.device, *kind), args)
    if work.num_groups > 0:
        mla_reduce(work, partial_out, partial_lse, out, lse)


@functools.lru_cache(maxsize=64)
def _config(causal: bool, group: int, options: tuple[tuple[str, Any], ...]) -> PrefillConfig:
    return PrefillConfig(causal, group, **dict(options))


def _descriptors(
    q: Tensor, k: Tensor, values: Tensor, records: Tensor | None, cfg: PrefillConfig
) -> tuple[Any, ...]:
    """What the kernel loads by TMA: q and k in two pieces each, values, records."""
    rows = 64 if cfg.casts_q else BLOCK_M
    return (
        descriptor(*_rows(q), [1, rows, 128], cfg.q_wide_box),
        descriptor(*_rows(q), [1, rows, 64], cfg.q_narrow_box),
        descriptor(*_rows(k), [1, BLOCK_N, 128], cfg.wide_box),
        descriptor(*_rows(k), [1, BLOCK_N, 64], cfg.narrow_box),
        descriptor(values, values.shape, values.stride(), [1, 128, BLOCK_N], cfg.wide_box),
        None
        if records is None
        else descriptor(records, records.shape, records.stride(), [1, 1, RECORD.value], cfg.record),
    )


def _rows(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """(tokens, heads, width) for a descriptor: (heads, tokens, width)."""
    tokens, heads, width = x.shape
    return x, [heads, tokens, width], [x.stride(1), x.stride(0), 1]
