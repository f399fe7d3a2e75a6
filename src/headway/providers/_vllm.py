"""vLLM's builds of FlashAttention 2 and 3: one function of ragged queries for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.problem import KVLayout, Problem
from headway.providers._packages import Package, given, lengths_over_pages
from headway.providers.base import Exclusion, Feature, excludes

#: What the function has no argument for, in either version.
LACKS = frozenset(
    {Feature.APPEND, Feature.ROTARY, Feature.LEFTPAD, Feature.BATCH_IDX, Feature.SEQUSED_Q}
)

LAYOUTS = frozenset({KVLayout.RAGGED, KVLayout.PAGED})

#: Its lengths of keys are one or the other.
ONE_KIND_OF_LENGTHS: Exclusion = excludes(
    Feature.SEQUSED_K, KVLayout.RAGGED, why="takes cu_seqlens_k or seqused_k, not both"
)


def package(version: int) -> Package:
    """The package, for those who call this version of FlashAttention in it."""
    return Package(
        "vllm.vllm_flash_attn",
        "vllm",
        source="flash_attn_interface.py",
        binary=f"_vllm_fa{version}_C",
    )


def packed(p: Problem) -> Problem:
    """The same problem with ragged queries: (B, Sq) of them are B sequences of Sq."""
    if p.ragged_q:
        return p
    b, sq = p.q.shape[:2]
    return dataclasses.replace(
        p,
        q=p.q.flatten(0, 1),
        qv=None if p.qv is None else p.qv.flatten(0, 1),
        out=p.out.flatten(0, 1) if p.out is not None and p.out.is_contiguous() else None,
        cu_seqlens_q=_multiples(sq, b + 1, p.device),
    )


def _multiples(step: int, count: int, device: torch.device) -> Tensor:
    if step == 0:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return torch.arange(0, step * count, step, dtype=torch.int32, device=device)


def unpacked(p: Problem, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the packed problem gave, in the shapes of this one and in its ``out``."""
    if p.ragged_q:
        return out, lse
    b, sq, heads = p.q.shape[:3]
    out = out.view(b, sq, heads, -1)
    if p.out is not None:
        out = p.out if p.out.is_contiguous() else p.out.copy_(out)
    if lse is not None:
        lse = lse.view(heads, b, sq).transpose(0, 1).contiguous()
    return out, lse


def call(function: Callable[..., Any], version: int, p: Problem, **options: Any) -> Any:
    """Its result for a packed problem; ``options`` say all but where the tensors' rows lie."""
    lengths = lengths_over_pages(p) if p.kv_layout is KVLayout.PAGED else None
    arguments: dict[str, Any] = {
        "max_seqlen_q": p.max_seqlen_q,
        "cu_seqlens_q": p.cu_seqlens_q,
        "max_seqlen_k": p.max_seqlen_k,
        "return_softmax_lse": p.return_lse,
        "fa_version": version,
    }
    given(arguments, cu_seqlens_k=p.cu_seqlens_k, seqused_k=lengths, block_table=p.page_table)
    return function(p.q, p.k, p.v, **arguments | options)
