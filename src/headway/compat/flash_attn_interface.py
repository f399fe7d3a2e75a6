"""FlashAttention 3's functions: an import line for its callers, a module for programs that read signatures.

    from headway.compat.flash_attn_interface import flash_attn_func

Argument names, order, defaults and tuple returns are those of FA3's ``flash_attn_interface``, and behind
them ``s_aux``, under which vLLM's builds take attention sinks. transformers and others call
``inspect.signature`` on the flash functions they are given, and drop what they do not find there: here
every name works.

Where a program imports ``flash_attn_interface`` itself, this module can take its place:
``sys.modules["flash_attn_interface"] = headway.compat.flash_attn_interface``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from headway import interface
from headway.interface import flash_attn_combine, get_scheduler_metadata
from headway.plan import Plan

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """As :func:`headway.flash_attn_func`; ``s_aux`` (Hq,) are the sinks."""
    arguments = dict(locals())
    return interface.flash_attn_func(**_with_sinks(arguments))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """As :func:`headway.flash_attn_varlen_func`; ``s_aux`` (Hq,) are the sinks."""
    arguments = dict(locals())
    return interface.flash_attn_varlen_func(**_with_sinks(arguments))


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
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Plan | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """As :func:`headway.flash_attn_with_kvcache`; ``s_aux`` (Hq,) are the sinks.

    Returns:
        ``out``, or ``(out, lse, None, None)`` with ``return_softmax_lse``: the last two stand for the
        partial results of a split, which Headway does not expose.
    """
    arguments = dict(locals())
    result = interface.flash_attn_with_kvcache(**_with_sinks(arguments))
    if not return_softmax_lse:
        return result
    out, lse = result
    return out, lse, None, None


def _with_sinks(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments["sinks"] = arguments.pop("s_aux")
    return arguments
