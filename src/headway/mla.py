"""Multi-head latent attention: prefill at 192/128, in bfloat16 or float8, and persistent schedules for it.

Absorbed decode (576/512 against one latent cache) is an ordinary attention call: pass the latent part as
``qv`` to :func:`headway.flash_attn_with_kvcache`, or let ``v_cache`` be the first columns of ``k_cache``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from headway import devices, gradients, persistent, quant
from headway.errors import InvalidInputError, UnsupportedError
from headway.interface import flash_attn_varlen_func
from headway.persistent import DeviceWork, Granularity, Staging
from headway.problem import FLOAT8_DTYPES, FLOAT_DTYPES, values_visible

__all__ = ["get_ps_metadata_info_v1", "get_ps_metadata_v1", "plan_prefill", "prefill"]

#: What prefill's kernel takes at a time: query tokens of a tile, keys of a unit.
TILE = Granularity(qhead=1, qlen=128, kvlen=128)

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
    on_gpu = torch.cuda.is_available() if device is None else device.type != "cpu"
    if on_gpu:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return os.cpu_count() or 1


# --- prefill --------------------------------------------------------------------------------------------


def plan_prefill(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    num_heads_k: int,
    num_heads_q: int | None = None,
    causal: bool = True,
    device: torch.device | str | None = None,
    num_cu: int | None = None,
    with_lse: bool = True,
    staging: Staging | None = None,
) -> DeviceWork:
    """The schedule of one step's :func:`prefill`, for all of its layers.

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1) first tokens of each request; on the host, or it costs a
            synchronisation.
        num_heads_k, num_heads_q: KV heads, and query heads if there are more of them.
        device: where the layers run; default: that of cu_seqlens_q.
        num_cu: programs that share the work, default the multiprocessors of the device.
        with_lse: whether layers ask for the LSE. Where they do not, aiter's kernels save a pass.
        staging: what the plans of one backend are copied through, for backends that keep one.

    Raises:
        InvalidInputError: lengths that do not fit together; causal with more query tokens than keys.
    """
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu_seqlens, Tensor):
            given = type(cu_seqlens).__name__
            raise InvalidInputError(name, given, "an int32 tensor of shape (batch_size + 1,)")
    if num_heads_k < 1 or (num_heads_q or num_heads_k) % num_heads_k:
        given = f"{num_heads_k} for {num_heads_q or num_heads_k} query heads"
        raise InvalidInputError("num_heads_k", given, "at least 1, dividing the query heads")
    if num_cu is not None and num_cu < 1:
        raise InvalidInputError("num_cu", num_cu, "at least 1, or None")
    device = torch.device(cu_seqlens_q.device if device is None else device)
    group = (num_heads_q or num_heads_k) // num_heads_k
    on_aiter = group == 1 and _aiter_has(device, num_heads_k)
    qo, kv = (t.cpu().numpy() for t in (cu_seqlens_q, cu_seqlens_k))
    return persistent.plan_on_device(
        qo,
        kv,
        np.diff(kv),
        device,
        num_heads_k=num_heads_k,
        num_cu=_compute_units(device) if num_cu is None else num_cu,
        granularity=_tile(device, num_heads_k, group),
        is_causal=causal,
        with_lse=with_lse and on_aiter,
        whole_tiles=not on_aiter,
        staging=staging,
    )


def _aiter_has(device: torch.device, num_heads: int) -> bool:
    """Whether aiter's float8 prefill runs on a device, for this number of heads without tiling them."""
    what = devices.of(device)
    if what.vendor != "amd":
        return False
    from headway.providers import aiter

    usable = aiter.PROVIDER.unavailable(device) is None
    return usable and aiter.has_float8_prefill(what.kind) and num_heads in aiter.PREFILL_HEADS


def _tile(device: torch.device, num_heads_k: int, group: int) -> Granularity:
    """How finely plans are cut: as aiter wants it where it has a kernel. Headway's run any plan."""
    if group > 1 or not _aiter_has(device, num_heads_k):
        return replace(TILE, qhead=group)
    from headway.providers import aiter

    return aiter.TILE


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    fp8: bool | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_rope: Tensor | None = None,
    plan: DeviceWork | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prefill attention after the up-projection of latent keys and values, heads 192 and 128 wide.

    In float8 the inputs are quantised by scales taken from their largest magnitudes unless some are given
    (Hopper: of each query, and of 128 keys or values of a head; elsewhere of a tensor), and attended over
    a persistent schedule. Otherwise this is :func:`headway.flash_attn_varlen_func`. A chunk of
    cached prefix is a call with ``causal=False``.

    Args:
        q: (total_q, Hq, D), k: (total_k, Hkv, D), v: (total_k, Hkv, Dv); bfloat16 or float16, or float8.
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32. Causal: the last query sees the last key.
        softmax_scale: default 1 / sqrt(D).
        fp8: multiply in float8; default: if inputs are float8, or as HEADWAY_FP8_PREFILL says, which is 1
            where aiter has kernels for it (gfx950) and 0 elsewhere.
        q_scale, k_scale, v_scale: float32, one element or one per KV head: the number that a stored 1
            means.
        k_rope: (total_k, 1 or Hkv, R), the last columns of the keys, where k is only the first D - R: saves
            putting them together on Hopper in float8.
        plan: from :func:`plan_prefill`, made once per step; without, made here, which reads cu_seqlens.
        out: (total_q, Hq, Dv), where to put the result.
        backend: whose kernels run it: in float8 "hopper" or "portable", by default the fastest that takes
            the call; otherwise as for :func:`headway.flash_attn_varlen_func`.

    Returns:
        out, bfloat16 (or as q or ``out`` is), or (out, lse) with lse float32 (Hq, total_q), natural log.

    Raises:
        InvalidInputError: shapes, dtypes, scales or a plan that do not fit the call.
        UnsupportedError: a backend that cannot run it here.
    """
    fp8 = _wants_float8(q, k.shape[-2], fp8)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not fp8:
        if any(s is not None for s in (q_scale, k_scale, v_scale)):
            raise InvalidInputError("q_scale", "scales without float8", "fp8=True, or no scales")
        return flash_attn_varlen_func(
            q,
            _joined(k, k_rope),
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
            out=out,
            return_attn_probs=return_lse,
            backend=backend,
        )
    _check_float8(backend, q.device, scale, (q_scale, k_scale, v_scale), k.shape[-2])
    _check_prefill(q, k, v, k_rope, plan, causal)
    _check_out(out, (*q.shape[:2], v.shape[2]), q.device)
    if plan is None:
        plan = plan_prefill(
            cu_seqlens_q,
            cu_seqlens_k,
            num_heads_k=k.shape[1],
            num_heads_q=q.shape[1],
            causal=causal,
            device=q.device,
            with_lse=return_lse,
        )
    _check_lengths(plan, q, k, cu_seqlens_q, cu_seqlens_k)
    scales = (q_scale, k_scale, v_scale)
    if not gradients.required(q, k, v, k_rope):
        return _in_float8(plan, (q, k, v), k_rope, scales, scale, out, return_lse, backend)
    gradients.check_out(out)
    with torch.no_grad():
        result = _in_float8(plan, (q, k, v), k_rope, scales, scale, None, True, backend)
    refused = gradients.refused(result[0], q, k, v, k_rope)
    return (refused, result[1]) if return_lse else refused


Inputs: TypeAlias = "tuple[Tensor, Tensor, Tensor]"
InputScales: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"


def _in_float8(
    plan: DeviceWork,
    inputs: Inputs,
    k_rope: Tensor | None,
    scales: InputScales,
    softmax_scale: float,
    out: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Any:
    """``out`` or ``(out, lse)`` of a checked call, by the kernels of its device."""
    q, k, v = inputs
    if out is None:
        dtype = torch.bfloat16 if q.dtype in FLOAT8_DTYPES else q.dtype
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
    lse = (
        torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if return_lse
        else None
    )
    call = scales, softmax_scale, out, lse
    if backend is None and _runs_on_aiter(plan, inputs, scales, return_lse):
        _float8_on_aiter(plan, (q, _joined(k, k_rope), v), *call)
    elif q.device.type == "cpu":
        _float8_on_cpu(plan, (q, _joined(k, k_rope), v), *call)
    else:
        _float8_on_kernels(plan, inputs, k_rope, *call, backend)
    return out if lse is None else (out, lse)


def multiplies_float8(
    fp8: bool | None, device: torch.device | None = None, num_heads: int = 0
) -> bool:
    """Whether prefill of 16-bit inputs multiplies in float8: as ``fp8`` says, or HEADWAY_FP8_PREFILL.

    Without either, where aiter has kernels for it on ``device``, with so many heads.
    """
    if fp8 is not None:
        return fp8
    switch = os.environ.get("HEADWAY_FP8_PREFILL", "").lower()
    if not switch:
        return device is not None and _aiter_has(device, num_heads)
    if switch not in ("0", "1", "false", "true", "off", "on"):
        raise InvalidInputError("HEADWAY_FP8_PREFILL", repr(switch), "0 or 1")
    return switch in ("1", "true", "on")


def _wants_float8(q: Tensor, num_heads_k: int, fp8: bool | None) -> bool:
    stored = q.dtype in FLOAT8_DTYPES
    if fp8 is None:
        return stored or multiplies_float8(None, q.device, num_heads_k)
    if stored and not fp8:
        raise InvalidInputError("fp8", "False with float8 inputs", "True, or inputs in bfloat16")
    return fp8


def _joined(k: Tensor, k_rope: Tensor | None) -> Tensor:
    return k if k_rope is None else torch.cat((k, k_rope.expand(-1, k.shape[1], -1)), dim=-1)


def _check_float8(
    backend: str | None,
    device: torch.device,
    softmax_scale: float,
    scales: InputScales,
    num_heads: int,
) -> None:
    if backend not in (None, "hopper", "portable"):
        raise InvalidInputError("backend", repr(backend), '"hopper" or "portable" for float8')
    if backend is not None and device.type == "cpu":
        reasons = {backend: ("runs on GPUs",)}
        raise UnsupportedError(f"backend={backend} cannot run this call", reasons)
    if not softmax_scale > 0:
        raise InvalidInputError("softmax_scale", softmax_scale, "a positive number in float8")
    for name, scale in zip(("q_scale", "k_scale", "v_scale"), scales, strict=True):
        wanted = f"a tensor of 1 element, or one for each of the {num_heads} KV heads"
        if scale is not None and not isinstance(scale, Tensor):
            raise InvalidInputError(name, type(scale).__name__, wanted)
        if scale is not None and scale.numel() not in (1, num_heads):
            raise InvalidInputError(name, f"{scale.numel()} elements", wanted)


def _check_out(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if out is None:
        return
    wanted = f"a tensor of shape {shape}, in a floating-point dtype, on {device}"
    if not isinstance(out, Tensor):
        raise InvalidInputError("out", type(out).__name__, wanted)
    if tuple(out.shape) != shape or out.dtype not in FLOAT_DTYPES or out.device != device:
        raise InvalidInputError("out", f"{out.dtype} {tuple(out.shape)} on {out.device}", wanted)
    if out.stride(-1) != 1 and shape[-1] > 1:
        raise InvalidInputError("out", f"strides {out.stride()}", "last-dimension stride 1")


def _check_lengths(
    plan: DeviceWork, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> None:
    if plan.total_q != q.shape[0] or plan.total_k != k.shape[0]:
        given = f"a plan for {plan.total_q} query tokens and {plan.total_k} keys"
        raise InvalidInputError("plan", given, f"one for {q.shape[0]} and {k.shape[0]}")
    if not values_visible(q.device):
        return
    for name, given_ends, planned in (
        ("cu_seqlens_q", cu_seqlens_q, plan.qo_indptr),
        ("cu_seqlens_k", cu_seqlens_k, plan.kv_indptr),
    ):
        if given_ends.tolist() != planned.tolist():
            wanted = f"{planned.tolist()}, which the plan was made from"
            raise InvalidInputError(name, given_ends.tolist(), wanted)


def _check_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rope: Tensor | None,
    plan: DeviceWork | None,
    causal: bool,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_rope", k_rope)):
        if tensor is None:
            continue
        if tensor.dim() != 3 or tensor.stride(-1) != 1 or tensor.dtype != q.dtype:
            given = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            wanted = "three tensors (tokens, heads, width) of one dtype, contiguous in width"
            raise InvalidInputError(name, given, wanted)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k_rope is not None:
        shapes += f", k_rope {tuple(k_rope.shape)}"
        if k_rope.shape[0] != k.shape[0] or k_rope.shape[1] not in (1, k.shape[1]):
            raise InvalidInputError("k_rope", shapes, "as many tokens as k, and 1 or as many heads")
    width = k.shape[2] + (0 if k_rope is None else k_rope.shape[2])
    if k.shape[:2] != v.shape[:2] or q.shape[2] != width or q.shape[1] % k.shape[1]:
        wanted = "k and v of as many tokens and heads, q and k of one width, Hkv dividing Hq"
        raise InvalidInputError("k", shapes, wanted)
    if plan is None:
        return
    if not isinstance(plan, DeviceWork):
        raise InvalidInputError("plan", type(plan).__name__, "what plan_prefill returned")
    made_for = (plan.num_heads_k, plan.is_causal, plan.granularity, plan.block_size)
    group = q.shape[1] // k.shape[1]
    if made_for != (k.shape[1], causal, _tile(q.device, k.shape[1], group), 1):
        heads = plan.num_heads_k * plan.granularity.qhead, plan.num_heads_k
        given = f"one for {heads[0]} query and {heads[1]} KV heads, causal={plan.is_causal}"
        wanted = f"one from plan_prefill for {q.shape[1]} and {k.shape[1]}, causal={causal}"
        raise InvalidInputError("plan", given, wanted)


def _quantised(x: Tensor, scale: Tensor | None, dtype: torch.dtype, group: int) -> quant.Quantised:
    """x in float8 and its scales per tensor or KV head; ``group`` of its heads share a KV head."""
    if scale is None:
        scale = quant.amax_scale(x, dtype)
    scale = scale.reshape(-1).float()
    for_heads = scale.repeat_interleave(group) if scale.numel() > 1 else scale
    return quant.Quantised(quant.quantise(x, dtype, scale=for_heads).values, scale)


def _scales_of(inputs: Inputs, given: InputScales, dtype: torch.dtype) -> InputScales:
    """Scales as given, float32 (1,) or (Hkv,), or of the tensors' own largest magnitudes."""
    lacking = [x for x, scale in zip(inputs, given, strict=True) if scale is None]
    found = iter(quant.amax_scales(lacking, dtype) if lacking else ())
    q, k, v = (next(found) if scale is None else scale.reshape(-1).float() for scale in given)
    return q, k, v


def _runs_on_aiter(plan: DeviceWork, inputs: Inputs, scales: InputScales, return_lse: bool) -> bool:
    """Whether aiter's kernels run a call; Headway's run the same plan where they do not."""
    q, k, v = inputs
    if not _aiter_has(q.device, plan.num_heads_k) or (return_lse and not plan.with_lse):
        return False
    plain = q.shape[1] == k.shape[1] and (q.shape[2], v.shape[2]) == (192, 128)
    return plain and all(scale is None or scale.numel() == 1 for scale in scales)


def _float8_on_aiter(
    plan: DeviceWork,
    inputs: Inputs,
    scales: InputScales,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    from headway.providers import aiter

    stored, factors = [], []
    for x, scale in zip(inputs, scales, strict=True):
        if x.dtype not in FLOAT8_DTYPES:
            x, scale = _quantised(x, scale, quant.native_float8(x.device), 1)
        stored.append(x.contiguous())
        factors.append(None if scale is None else scale.reshape(-1).float())
    in_place = out.dtype == torch.bfloat16 and out.is_contiguous()
    to = out if in_place else torch.empty(out.shape, dtype=torch.bfloat16, device=out.device)
    lse_rows = None if lse is None else lse.T
    q, k, v = stored
    aiter.prefill(plan, q, k, v, to, softmax_scale, tuple(factors), lse_rows)
    if to is not out:
        out.copy_(to)


def _float8_on_kernels(
    plan: DeviceWork,
    inputs: Inputs,
    k_rope: Tensor | None,
    scales: InputScales,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
    backend: str | None,
) -> None:
    from headway.kernels.portable.mla_prefill import Scales, mla_prefill

    lse_rows = None if lse is None else lse.T
    if _runs_on_hopper(backend, plan, inputs, out):
        _float8_on_hopper(plan, inputs, k_rope, scales, softmax_scale, out, lse_rows)
        return
    q, k, v = inputs
    q, k, values, scales = _scaled_by_tensor(plan, (q, _joined(k, k_rope), v), scales)
    mla_prefill(
        plan,
        q,
        k,
        values,
        out,
        lse_rows,
        softmax_scale=softmax_scale,
        scales=Scales(*scales),
        v_transposed=True,
    )


def _float8_on_hopper(
    plan: DeviceWork,
    inputs: Inputs,
    k_rope: Tensor | None,
    scales: InputScales,
    softmax_scale: float,
    out: Tensor,
    lse_rows: Tensor | None,
) -> None:
    """Scales that are not given are those of each query, and of each block of keys and of values."""
    from headway.kernels.hopper.mla_prefill import mla_prefill, takes_queries
    from headway.kernels.hopper.quantise_blocks import quantise_blocks, takes
    from headway.kernels.portable.mla_prefill import Scales

    q, k, v = inputs
    records = None
    if takes(k, v, k_rope):
        q_scale, k_scale, v_scale = (None if s is None else s.reshape(-1).float() for s in scales)
        if not takes_queries(q):
            q, q_scale = _quantised(q, q_scale, torch.float8_e4m3fn, q.shape[1] // k.shape[1])
        k, values, records = quantise_blocks(
            k,
            v,
            (k_scale, v_scale),
            plan.kv_indptr,
            plan.value_indptr,
            plan.padded_keys,
            plan.max_seqlen_k,
            torch.float8_e4m3fn,
            k_rope=k_rope,
            block_n=plan.granularity.kvlen,
        )
        of_blocks = None, None
        scales = q_scale, *((k_scale, v_scale) if records is None else of_blocks)
    else:
        q, k, values, scales = _scaled_by_tensor(plan, (q, _joined(k, k_rope), v), scales)
    mla_prefill(
        plan,
        q,
        k,
        values,
        out,
        lse_rows,
        softmax_scale=softmax_scale,
        scales=Scales(*scales),
        records=records,
    )


def _scaled_by_tensor(
    plan: DeviceWork, inputs: Inputs, scales: InputScales
) -> tuple[Tensor, Tensor, Tensor, InputScales]:
    """(q, k, values transposed, scales) in float8, as they are or by a scale each, as given or found."""
    q, k, v = inputs
    if q.dtype in FLOAT8_DTYPES:
        return q, k, _transposed(v, None, q.dtype, plan), scales
    dtype = quant.native_float8(q.device)
    scales = _scales_of(inputs, scales, dtype)
    q = _quantised(q, scales[0], dtype, q.shape[1] // k.shape[1]).values
    k = _quantised(k, scales[1], dtype, 1).values
    return q, k, _transposed(v, scales[2], dtype, plan), scales


def _transposed(v: Tensor, scale: Tensor | None, dtype: torch.dtype, plan: DeviceWork) -> Tensor:
    """Values (Hkv, Dv, padded keys) in float8; ``scale``: of values that are not in float8 yet."""
    from headway.kernels.portable.quantise import transpose_values

    values = torch.empty(*v.shape[1:], plan.padded_keys, dtype=dtype, device=v.device)
    transpose_values(
        v,
        scale,
        values,
        plan.kv_indptr,
        plan.value_indptr,
        plan.max_seqlen_k,
        plan.granularity.kvlen,
    )
    return values


def _runs_on_hopper(backend: str | None, plan: DeviceWork, inputs: Inputs, out: Tensor) -> bool:
    """Whether the kernel for Hopper runs a call. Asked for by name, it says what it does not take."""
    from headway.kernels.portable.operands import device_of

    if backend is not None:
        return backend == "hopper"
    if device_of(inputs[0].device).arch != "sm90":
        return False
    from headway.kernels.hopper.mla_prefill import refusal

    return refusal(plan, inputs[0], inputs[1], out) is None


def _float8_on_cpu(
    plan: DeviceWork,
    inputs: Inputs,
    scales: InputScales,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """The same rounding of the inputs, then attention in float32: a CPU has no float8 arithmetic."""
    groups = (inputs[0].shape[1] // inputs[1].shape[1], 1, 1)
    wide = []
    for x, scale, group in zip(inputs, scales, groups, strict=True):
        if x.dtype in FLOAT8_DTYPES:
            stored, scale = (
                x,
                x.new_ones(1, dtype=torch.float32) if scale is None else scale.reshape(-1),
            )
        else:
            stored, scale = _quantised(x, scale, quant.native_float8(x.device), group)
        for_heads = scale.repeat_interleave(group) if scale.numel() > 1 else scale
        wide.append(quant.dequantise(stored, for_heads))
    q, k, v = wide
    attended, attended_lse = flash_attn_varlen_func(
        q,
        k,
        v,
        plan.qo_indptr,
        plan.kv_indptr,
        softmax_scale=softmax_scale,
        causal=plan.is_causal,
        return_lse=True,
    )
    out.copy_(attended)
    if lse is not None:
        lse.copy_(attended_lse)
