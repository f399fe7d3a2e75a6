"""Multi-head latent attention: prefill at 192/128, in bfloat16 or float8, and persistent schedules for it.

Absorbed decode (576/512 against one latent cache) is an ordinary attention call: pass the latent part as
``qv`` to :func:`headway.flash_attn_with_kvcache`, or let ``v_cache`` be the first columns of ``k_cache``.
"""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from headway import persistent
from headway.errors import InvalidInputError
from headway.persistent import Granularity

__all__ = ["get_ps_metadata_info_v1", "get_ps_metadata_v1"]

#: Shape, as an int where there is one dimension, and dtype of one buffer.
BufferInfo: TypeAlias = "tuple[int | tuple[int, int], torch.dtype]"


def get_ps_metadata_info_v1(
    batch_size: int,
    num_head_k: int,
    max_qlen: int,
    qlen_granularity: int = 256,
    *,
    total_qlen: int | None = None,
    num_cu: int | None = None,
) -> tuple[BufferInfo, BufferInfo, BufferInfo, BufferInfo, BufferInfo, BufferInfo]:
    """Sizes of the buffers that :func:`get_ps_metadata_v1` fills, for the worst batch.

    The same sizes as aiter's function of this name. They multiply worst cases that cannot meet; with
    ``total_qlen`` they are close to what plans of such batches really need.

    Args:
        batch_size, max_qlen: most requests of a batch, most query tokens of a request.
        num_head_k: KV heads. Buffers of a smaller number may need more, not less.
        qlen_granularity: query tokens of a tile.
        total_qlen: most query tokens of a batch.
        num_cu: compute units that share the work; default: the multiprocessors of the current GPU, or
            without one the CPUs of the machine.

    Returns:
        (shape, dtype) of work_metadata_ptrs, work_indptr, work_info, reduce_indptr, reduce_final_map and
        reduce_partial_map. The partial buffers hold ``reduce_partial_map * qlen_granularity`` rows.
    """
    num_cu = _compute_units(None) if num_cu is None else num_cu
    _, per = persistent.clusters(num_head_k, num_cu)
    tiles_each = -(-max_qlen // qlen_granularity)
    tiles = batch_size * tiles_each
    items = (batch_size + per - 1) * tiles_each * num_head_k
    groups = tiles
    parts = min(batch_size + per - 1, 2 * (per - 1)) * tiles_each
    if total_qlen is not None:
        tiles = min(tiles, total_qlen // qlen_granularity + batch_size)
        items = min(items, (tiles + per - 1) * num_head_k)
        groups = min(tiles, max(per - 1, 1))
        parts = min(parts, 2 * (per - 1))
        parts = max(parts, 1)
    return (
        (2, torch.uint64),
        (num_cu + 1, torch.int32),
        ((items, 8), torch.int32),
        (groups + 1, torch.int32),
        ((groups, 2), torch.int32),
        (parts, torch.int32),
    )


def get_ps_metadata_v1(
    seqlens_qo_indptr: Tensor,
    pages_kv_indptr: Tensor,
    context_lens: Tensor,
    gqa_ratio: int,
    num_heads_k: int,
    work_metadata_ptrs: Tensor,
    work_indptr: Tensor,
    work_info: Tensor,
    reduce_indptr: Tensor,
    reduce_final_map: Tensor,
    reduce_partial_map: Tensor,
    qhead_granularity: int = 1,
    qlen_granularity: int = 256,
    kvlen_granularity: int = 16,
    block_size: int = 16,
    is_causal: bool = True,
    *,
    num_cu: int | None = None,
) -> None:
    """Plan persistent prefill attention: the same lists, bit for bit, as aiter's function of this name.

    Runs on the host. Lengths on a GPU cost a synchronisation: pass host tensors where there are some.
    The buffers are written on their device's current stream, so steps cannot overtake each other.

    Args:
        seqlens_qo_indptr: (B + 1) int32 first query token of each request.
        pages_kv_indptr: (B + 1) int32 first page of each request in the list of pages.
        context_lens: (B) int32 keys of each request, those of its query tokens included.
        gqa_ratio: query heads per KV head, which an item takes together: ``qhead_granularity``.
        num_heads_k: KV heads.
        work_metadata_ptrs: uint64 (2), left as it is; kernels get the lists themselves.
        work_indptr, work_info, reduce_indptr, reduce_final_map, reduce_partial_map: int32 buffers to be
            filled, of at least the sizes of this plan; :func:`get_ps_metadata_info_v1` gives bounds. What
            reduce_indptr has room for beyond the plan repeats its last value; other rests stay.
        block_size: keys of a page; kvlen_granularity must be a multiple of it.
        num_cu: compute units that share the work; default: the multiprocessors of the GPU that holds
            ``work_indptr``, or without one the CPUs of the machine.

    Raises:
        InvalidInputError: lengths that do not fit together, a buffer too small (with the size it needs),
            or a causal request with more query tokens than keys.
    """
    if gqa_ratio < 1 or qhead_granularity not in (1, gqa_ratio):
        wanted = f"gqa_ratio, {gqa_ratio}, or 1"
        raise InvalidInputError("qhead_granularity", qhead_granularity, wanted)
    work = persistent.plan(
        *(t.cpu().numpy() for t in (seqlens_qo_indptr, pages_kv_indptr, context_lens)),
        num_heads_k=num_heads_k,
        num_cu=_compute_units(work_indptr.device) if num_cu is None else num_cu,
        granularity=Granularity(qhead_granularity, qlen_granularity, kvlen_granularity),
        block_size=block_size,
        is_causal=is_causal,
    )
    _fill("work_indptr", work_indptr, work.work_indptr)
    _fill("work_info", work_info, work.work_info)
    _fill("reduce_indptr", reduce_indptr, work.reduce_indptr)
    _fill("reduce_final_map", reduce_final_map, work.reduce_final_map)
    _fill("reduce_partial_map", reduce_partial_map, work.reduce_partial_map)
    reduce_indptr[len(work.reduce_indptr) :] = int(work.reduce_indptr[-1])


def _fill(name: str, buffer: Tensor, values: np.ndarray) -> None:
    fits = buffer.dim() == values.ndim and buffer.shape[1:] == values.shape[1:]
    if buffer.dtype != torch.int32 or not fits or buffer.shape[0] < values.shape[0]:
        given = f"{str(buffer.dtype).removeprefix('torch.')} {tuple(buffer.shape)}"
        raise InvalidInputError(name, given, f"int32, at least {values.shape}")
    buffer[: len(values)].copy_(torch.from_numpy(values))


def _compute_units(device: torch.device | None) -> int:
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return os.cpu_count() or 1
