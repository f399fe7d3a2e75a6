"""``from headway.compat.sgl_kernel import flash_attn_with_kvcache``: the import line for SGLang's callers.

Argument names, order, defaults and tuple returns are those of ``sgl_kernel.flash_attn``. What that
package accepts and ignores (``ver``, ``score_mod``, ``aux_tensors``, a ``page_table`` beside ragged
lengths) works here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway import interface
from headway.dispatch import is_fa3_supported
from headway.plan import Plan
from headway.problem import ScoreMod

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "is_fa3_supported",
]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int | None = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Plan | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    ver: int = 3,
    out: Tensor | None = None,
) -> Any:
    """As :func:`headway.flash_attn_with_kvcache`.

    Returns:
        ``out``, or ``(out, lse, None, None)`` with ``return_softmax_lse``: the last two stand for the
        partial results of a split, which Headway does not expose.
    """
    result = interface.flash_attn_with_kvcache(**locals())
    return _four(result) if return_softmax_lse else result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    ver: int = 3,
    out: Tensor | None = None,
) -> Any:
    """As :func:`headway.flash_attn_varlen_func`; returns as :func:`flash_attn_with_kvcache` does."""
    arguments = dict(locals())
    if page_table is not None and seqused_k is not None:
        # SGLang's callers pass cu_seqlens_k as a matter of form; seqused_k is what says the lengths.
        arguments["cu_seqlens_k"] = None
    result = interface.flash_attn_varlen_func(**arguments)
    return _four(result) if return_softmax_lse else result


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Plan:
    """As :func:`headway.get_scheduler_metadata`, under sgl_kernel's argument names."""
    return interface.get_scheduler_metadata(
        batch_size=batch_size,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_heads_q=num_heads,
        num_heads_kv=num_heads_k,
        headdim=headdim,
        cache_seqlens=cache_seqlens,
        qkv_dtype=qkv_dtype,
        headdim_v=headdim_v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        cache_leftpad=leftpad_k,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        has_softcap=has_softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )


def _four(result: Any) -> tuple[Tensor, Tensor, None, None]:
    out, lse = result
    return out, lse, None, None
