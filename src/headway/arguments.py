"""From the arguments of a public function to its :class:`~headway.problem.Problem`.

Each builder takes all arguments of its function by name. What must hold before a Problem can be built at
all is checked here, everything else in :func:`headway.problem.check`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError, UnsupportedError
from headway.plan import Plan
from headway.problem import (
    FLOAT_DTYPES,
    KEY_SHAPES,
    Append,
    Descales,
    Hints,
    KVLayout,
    Names,
    Problem,
    Rotary,
    Scores,
    as_float,
    as_int,
    check,
    lengths_as_tensor,
    normalise_mask,
)

_VARLEN_NAMES = Names(seqlens_k="seqused_k")
_KVCACHE_NAMES = Names("k_cache", "v_cache", "cache_seqlens")


def dense_problem(a: SimpleNamespace) -> Problem:
    _require_queries(a.q, ragged=False)
    _require_keys("k", a.k, KVLayout.DENSE)
    _require_keys("v", a.v, KVLayout.DENSE)
    return check(
        Problem(
            **_common(a, a.k, a.v),
            kv_layout=KVLayout.DENSE,
            batch_size=a.q.shape[0],
            max_seqlen_q=a.q.shape[1],
            max_seqlen_k=a.k.shape[1],
            return_lse=a.return_attn_probs or a.return_lse or a.return_softmax_lse,
        )
    )


def varlen_problem(a: SimpleNamespace) -> Problem:
    _require_queries(a.q, ragged=a.cu_seqlens_q is not None)
    layout, batch_size, seqlens_k = _varlen_keys(a)
    _require_keys("k", a.k, layout)
    _require_keys("v", a.v, layout)
    for name in ("min_seqlen_k", "seqlen_k_per_split"):
        if getattr(a, name) is not None:
            as_int(name, getattr(a, name), "a non-negative length or None")
    return check(
        Problem(
            **_common(a, a.k, a.v),
            kv_layout=layout,
            batch_size=batch_size,
            max_seqlen_q=_max_rows(a.max_seqlen_q, a.cu_seqlens_q, a.q),
            max_seqlen_k=_max_keys(a.max_seqlen_k, a.cu_seqlens_k, a.page_table, a.k),
            cu_seqlens_q=a.cu_seqlens_q,
            seqused_q=a.seqused_q,
            cu_seqlens_k=a.cu_seqlens_k if layout is KVLayout.RAGGED else None,
            seqlens_k=seqlens_k,
            page_table=a.page_table,
            return_lse=a.return_attn_probs or a.return_lse or a.return_softmax_lse,
            plan=None if a.disable_scheduler_metadata else _plan(a.scheduler_metadata),
        ),
        _VARLEN_NAMES,
    )


def _varlen_keys(a: SimpleNamespace) -> tuple[KVLayout, int, Tensor | None]:
    """Layout of k and v, the batch size, and the KV lengths in use."""
    batch_size = batch_size_of(a.q, a.cu_seqlens_q)
    if a.cu_seqlens_k is not None:
        _require_cumulative("cu_seqlens_k", a.cu_seqlens_k)
    if a.page_table is None:
        layout = KVLayout.DENSE if a.cu_seqlens_k is None else KVLayout.RAGGED
        return layout, batch_size, a.seqused_k
    if a.cu_seqlens_k is None:
        return KVLayout.PAGED, batch_size, a.seqused_k
    if a.seqused_k is not None:
        raise InvalidInputError(
            "cu_seqlens_k", "a tensor beside page_table and seqused_k", "one source of KV lengths"
        )
    given = (a.cu_seqlens_k.dtype, a.cu_seqlens_k.shape[0])
    if given != (torch.int32, batch_size + 1):
        wanted = f"int32 of shape ({batch_size + 1},)"
        raise InvalidInputError("cu_seqlens_k", f"{given[0]} of shape ({given[1]},)", wanted)
    return KVLayout.PAGED, batch_size, a.cu_seqlens_k[1:] - a.cu_seqlens_k[:-1]


def kvcache_problem(a: SimpleNamespace) -> Problem:
    layout = KVLayout.DENSE if a.page_table is None else KVLayout.PAGED
    _require_queries(a.q, ragged=a.cu_seqlens_q is not None)
    _require_keys("k_cache", a.k_cache, layout)
    _require_keys("v_cache", a.v_cache, layout)
    batch_size = batch_size_of(a.q, a.cu_seqlens_q)
    seqlens_k = lengths_as_tensor("cache_seqlens", a.cache_seqlens, batch_size, a.q.device)
    return check(
        Problem(
            **_common(a, a.k_cache, a.v_cache),
            kv_layout=layout,
            batch_size=batch_size,
            max_seqlen_q=_max_rows(a.max_seqlen_q, a.cu_seqlens_q, a.q),
            max_seqlen_k=_max_keys(a.max_seqlen_k, None, a.page_table, a.k_cache),
            cu_seqlens_q=a.cu_seqlens_q,
            seqlens_k=seqlens_k,
            leftpad_k=a.cache_leftpad,
            cache_batch_idx=a.cache_batch_idx,
            page_table=a.page_table,
            append=_append(a),
            return_lse=a.return_softmax_lse or a.return_lse,
            plan=_plan(a.scheduler_metadata),
        ),
        _KVCACHE_NAMES,
    )


def _common(a: SimpleNamespace, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The parts of a Problem that all entry points build alike."""
    _refuse_untranslatable(a)
    q, qv = a.q, a.qv
    dims = q.shape[-1]
    if a.only_qv:
        if qv is None:
            raise InvalidInputError("only_qv", True, "qv given")
        if getattr(a, "k_cache", None) is not None and a.k is not None:
            raise InvalidInputError(
                "only_qv", "True with appended k", "k appended by a call before"
            )
        _require_queries(qv, ragged=q.dim() == 3, name="qv")
        q, k, qv, dims = qv, v, None, v.shape[-1]
    elif qv is not None:
        dims = q.shape[-1] + v.shape[-1]
    sinks = a.sinks
    if a.learnable_sink is not None:
        if sinks is not None:
            raise InvalidInputError(
                "learnable_sink", "a tensor beside sinks", "one of the two names"
            )
        sinks = a.learnable_sink
    if isinstance(sinks, Tensor):
        sinks = sinks.contiguous()  # one number for all heads comes expanded
    scale = 1.0 / math.sqrt(max(dims, 1))
    if a.softmax_scale is not None:
        scale = as_float("softmax_scale", a.softmax_scale)
    return {
        "q": q,
        "k": k,
        "v": v,
        "qv": qv,
        "mask": normalise_mask(a.causal, a.window_size, a.attention_chunk, a.mask_mod),
        "scores": Scores(scale, as_float("softcap", a.softcap or 0.0), sinks, a.score_mod),
        "descales": Descales(a.q_descale, a.v_descale if a.only_qv else a.k_descale, a.v_descale),
        "aux_tensors": _aux_tensors(a.aux_tensors),
        "out": a.out,
        "hints": Hints(a.num_splits, a.pack_gqa, a.sm_margin, getattr(a, "deterministic", False)),
        "ver": a.ver,
        "backend": a.backend,
    }


def _refuse_untranslatable(a: SimpleNamespace) -> None:
    """Arguments of FlashAttention 4 that no provider takes, each with the way to say it here."""
    instead = {
        "aux_scalars": "put them into aux_tensors, as tensors of no dimension",
        "gather_kv_indices": "gather k and v first, or use page_table with pages of one token",
        "block_sparse_tensors": "mask_mod alone gives the same result",
    }
    for name, advice in instead.items():
        if getattr(a, name, None) is not None:
            raise UnsupportedError(f"{name} is not supported: {advice}")


def _append(a: SimpleNamespace) -> Append | None:
    if (a.k is None) != (a.v is None):
        raise InvalidInputError(
            "k" if a.k is None else "v", None, "k and v given together, or neither"
        )
    if (a.rotary_cos is None) != (a.rotary_sin is None):
        raise InvalidInputError("rotary_sin", "one of cos and sin", "both, or neither")
    if a.k is None:
        if a.rotary_cos is not None:
            raise InvalidInputError(
                "rotary_cos", "a tensor without new k", "k and v to be appended"
            )
        if a.cu_seqlens_k_new is not None:
            raise InvalidInputError("cu_seqlens_k_new", "a tensor without new k", "k and v as well")
        return None
    if a.rotary_cos is None:
        if a.rotary_seqlens is not None:
            raise InvalidInputError(
                "rotary_seqlens", "a tensor", "rotary_cos and rotary_sin as well"
            )
        return Append(a.k, a.v, a.cu_seqlens_k_new, None)
    rotary = Rotary(a.rotary_cos, a.rotary_sin, a.rotary_interleaved, a.rotary_seqlens)
    return Append(a.k, a.v, a.cu_seqlens_k_new, rotary)


def _plan(metadata: object) -> Plan | None:
    if metadata is None or isinstance(metadata, Plan):
        return metadata
    raise InvalidInputError(
        "scheduler_metadata",
        type(metadata).__name__,
        "the Plan that get_scheduler_metadata returned",
    )


def _aux_tensors(given: object) -> tuple[Tensor, ...]:
    if given is None or isinstance(given, tuple | list):
        return tuple(given or ())
    raise InvalidInputError("aux_tensors", type(given).__name__, "a list or tuple of tensors")


# --- what must hold before a Problem can be built at all ------------------------------------------------


def _require_queries(q: object, *, ragged: bool, name: str = "q") -> None:
    want = "(total_q, num_heads, head_dim) with cu_seqlens_q"
    if not ragged:
        want = "(batch, seqlen_q, num_heads, head_dim), or three dimensions with cu_seqlens_q"
    _require_dims(name, q, 3 if ragged else 4, want)


def _require_keys(name: str, keys: object, layout: KVLayout) -> None:
    _require_dims(name, keys, 3 if layout is KVLayout.RAGGED else 4, KEY_SHAPES[layout])


def _require_dims(name: str, tensor: object, dims: int, shape: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        kind = type(tensor).__name__
        if isinstance(tensor, Tensor):
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise InvalidInputError(name, kind, f"a tensor of {dims} dimensions, {shape}")
    if tensor.dim() != dims:
        want = f"{dims} dimensions, {shape}"
        raise InvalidInputError(name, f"shape {tuple(tensor.shape)}", want)


def _require_cumulative(name: str, cu_seqlens: object) -> None:
    want = "an int32 tensor of shape (batch_size + 1,)"
    if not isinstance(cu_seqlens, Tensor):
        raise InvalidInputError(name, type(cu_seqlens).__name__, want)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise InvalidInputError(name, f"shape {tuple(cu_seqlens.shape)}", want)


def require_lengths(name: str, lengths: object, batch_size: int) -> None:
    want = f"an int32 tensor of shape ({batch_size},)"
    if not isinstance(lengths, Tensor):
        raise InvalidInputError(name, type(lengths).__name__, want)
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != (batch_size,):
        raise InvalidInputError(name, f"{lengths.dtype} of shape {tuple(lengths.shape)}", want)


def batch_size_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    if cu_seqlens_q is None:
        return q.shape[0]
    _require_cumulative("cu_seqlens_q", cu_seqlens_q)
    return cu_seqlens_q.shape[0] - 1


def _max_rows(given: int | None, cu_seqlens: Tensor | None, rows: Tensor) -> int:
    """Longest query: given, or what shapes allow; on a CPU, where looking is free, the true one."""
    if given is not None:
        return as_int("max_seqlen_q", given, "a non-negative length")
    if cu_seqlens is None:
        return rows.shape[1]
    if cu_seqlens.device.type == "cpu" and cu_seqlens.numel() > 1:
        return int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return rows.shape[0]


def _max_keys(
    given: int | None, cu_seqlens: Tensor | None, page_table: Tensor | None, k: Tensor
) -> int:
    if given is not None:
        return as_int("max_seqlen_k", given, "a non-negative length")
    if isinstance(page_table, Tensor) and page_table.dim() == 2:
        return page_table.shape[1] * k.shape[1]
    return _max_rows(None, cu_seqlens, k)


# --- of the other functions -----------------------------------------------------------------------------


def check_parts(
    out_partial: object, lse_partial: object, out: object, out_dtype: torch.dtype | None
) -> None:
    shape = "(n, B, Sq, Hq, Dv) or (n, total_q, Hq, Dv)"
    for name, part in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(part, Tensor):
            raise InvalidInputError(name, type(part).__name__, "a tensor, of all parts together")
        if not part.is_floating_point():
            raise InvalidInputError(name, part.dtype, "a floating-point dtype")
    assert isinstance(out_partial, Tensor)
    assert isinstance(lse_partial, Tensor)
    if out_partial.dim() not in (4, 5):
        raise InvalidInputError("out_partial", f"shape {tuple(out_partial.shape)}", shape)
    if lse_partial.shape != out_partial.shape[:-1] or lse_partial.device != out_partial.device:
        given = f"shape {tuple(lse_partial.shape)} on {lse_partial.device}"
        wanted = f"{tuple(out_partial.shape[:-1])} on {out_partial.device}"
        raise InvalidInputError("lse_partial", given, wanted)
    if out_dtype not in (None, *FLOAT_DTYPES):
        raise InvalidInputError("out_dtype", out_dtype, "a 16-, 32- or 64-bit floating-point dtype")
    if out is None:
        return
    wanted = f"a tensor of shape {tuple(out_partial.shape[1:])} on {out_partial.device}"
    if not isinstance(out, Tensor):
        raise InvalidInputError("out", type(out).__name__, wanted)
    if out.shape != out_partial.shape[1:] or out.device != out_partial.device:
        raise InvalidInputError("out", f"shape {tuple(out.shape)} on {out.device}", wanted)
    if out_dtype not in (None, out.dtype):
        raise InvalidInputError("out_dtype", out_dtype, f"the dtype of out, {out.dtype}, or None")


def check_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        given = f"{len(outs)} outs, {len(lses)} lses"
        raise InvalidInputError("outs", given, "as many, at least one")
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise InvalidInputError(f"{name}[{i}]", type(part).__name__, "a tensor")
            if part.dtype not in FLOAT_DTYPES or part.device != outs[0].device:
                given = f"{part.dtype} on {part.device}"
                wanted = f"a 16-, 32- or 64-bit floating-point dtype on {outs[0].device}"
                raise InvalidInputError(f"{name}[{i}]", given, wanted)
    if outs[0].dim() not in (3, 4):
        given, wanted = f"shape {tuple(outs[0].shape)}", "(B, Sq, Hq, Dv) or (total_q, Hq, Dv)"
        raise InvalidInputError("outs[0]", given, wanted)
    shape = outs[0].shape
    heads_first = (*shape[:-3], shape[-2], shape[-3])
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape:
            given = f"shape {tuple(out.shape)}"
            raise InvalidInputError(f"outs[{i}]", given, f"{tuple(shape)}, like the first")
        if lse.shape != heads_first:
            given = f"shape {tuple(lse.shape)}"
            raise InvalidInputError(f"lses[{i}]", given, f"{heads_first}, heads first")


def check_sizes(num_heads_q: int, num_heads_kv: int, **sizes: int) -> None:
    for name, size in sizes.items():
        as_int(name, size, "0 or more")
    if as_int("num_heads_kv", num_heads_kv, "at least 1") == 0:
        raise InvalidInputError("num_heads_kv", 0, "at least 1")
    if as_int("num_heads_q", num_heads_q, "at least 1") % num_heads_kv:
        wanted = f"a multiple of the {num_heads_kv} key/value heads"
        raise InvalidInputError("num_heads_q", num_heads_q, wanted)
