"""FlashAttention 2, the package flash-attn: 16-bit, pages of 256 tokens and their multiples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.problem import KVLayout, Problem
from headway.providers._packages import Package, at_least, delivered, given, remembered, window
from headway.providers.base import (
    Capabilities,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

PACKAGE = Package(
    "flash_attn",
    "flash-attn",
    source="flash_attn_interface.py",
    install="flash-attn --no-build-isolation",
)

_OLDEST = (2, 7)

_ELSEWHERE = "FlashAttention 2 has none; ver=3 and Headway's kernels do"
_EXCLUSIONS = (
    excludes(Feature.RAGGED_Q, KVLayout.DENSE, why="its cache function takes q (B, Sq, Hq, D)"),
    excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
    excludes(
        Feature.SEQUSED_K, KVLayout.RAGGED, why="no public function takes it; pass cu_seqlens_k"
    ),
    excludes(Feature.RAGGED_Q, Feature.APPEND, why="its cache function takes q (B, Sq, Hq, D)"),
    excludes(Feature.RAGGED_Q, Feature.LEFTPAD, why="its cache function takes q (B, Sq, Hq, D)"),
    excludes(Feature.BATCH_IDX, KVLayout.PAGED, why="put the rows of page_table in order instead"),
    excludes(Feature.LEFTPAD, KVLayout.PAGED, why="only dense caches have one here"),
    excludes(Trait.APPEND_RAGGED, why="takes new keys (B, Snew, Hkv, D)"),
    excludes(Trait.APPEND_QUANTISED, why="caches are of the dtype of q"),
    excludes(Trait.ROTARY_SEQLENS, why="rotates from cache_seqlens on"),
)


class Fa2Provider(Provider):
    name = "fa2"
    generation = 2
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "nvidia":
            return f"runs on NVIDIA GPUs from sm80 on, this is {what}"
        if what.capability < (8, 0):
            return f"runs on sm80 and newer, this is {what}"
        if not PACKAGE.found():
            return PACKAGE.missing()
        version = PACKAGE.version()
        if version is not None and not at_least(version, *_OLDEST):
            return f"flash-attn {version}: needs 2.7 or newer (the LSE of ragged calls changed its shape)"
        return PACKAGE.broken()

    def package(self) -> tuple[str, str] | None:
        return PACKAGE.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        return Capabilities(
            device_types=frozenset({device.type}),
            dtypes=frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)}),
            features=_FEATURES,
            head_dims=HeadDims(unequal=()),
            page_size_multiple_of=256,
            rotary_dim_multiple_of=16,
            rotary_in_dtype_of_q=True,
            exclusions=_EXCLUSIONS,
            lacks={feature: _ELSEWHERE for feature in Feature if feature not in _FEATURES},
        )

    def documented(self) -> Mapping[str, Capabilities]:
        return {"sm80 and newer": self.capabilities(torch.device("cuda"))}

    def load(self) -> None:
        _module()

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        if problem.ragged_q:
            result = _varlen(problem)
        elif _is_plain(problem):
            result = _dense(problem)
        else:
            result = _kvcache(problem)
        if not problem.return_lse:
            return delivered(problem, result), None
        out, lse = result[:2]
        # Its kernels write +inf for rows that see no key.
        return delivered(problem, out), lse.masked_fill_(lse == float("inf"), float("-inf"))


_FEATURES = frozenset(
    {
        Feature.CAUSAL,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.APPEND,
        Feature.ROTARY,
        Feature.LEFTPAD,
        Feature.BATCH_IDX,
        Feature.RAGGED_Q,
        Feature.SEQUSED_K,
        Feature.GQA,
        Feature.LSE,
        Feature.OUT,
    }
)


def _is_plain(p: Problem) -> bool:
    """Whether q, k and v are all there is to the call."""
    cached = (p.seqlens_k, p.leftpad_k, p.cache_batch_idx, p.append)
    return p.kv_layout is KVLayout.DENSE and all(part is None for part in cached)


def _dense(p: Problem) -> Any:
    return _module().flash_attn_func(p.q, p.k, p.v, return_attn_probs=p.return_lse, **_common(p))


def _varlen(p: Problem) -> Any:
    cu_seqlens_k, max_seqlen_k = p.cu_seqlens_k, p.max_seqlen_k
    if p.kv_layout is KVLayout.PAGED:
        cu_seqlens_k = _as_cumulative(p)
    return _module().flash_attn_varlen_func(
        p.q,
        p.k,
        p.v,
        p.cu_seqlens_q,
        cu_seqlens_k,
        p.max_seqlen_q,
        max_seqlen_k,
        return_attn_probs=p.return_lse,
        **given(_common(p), block_table=p.page_table),
    )


def _as_cumulative(p: Problem) -> Tensor:
    """(B + 1,) int32: with pages, this package takes lengths as differences."""
    assert p.page_table is not None
    if p.seqlens_k is not None:
        ends = torch.cumsum(p.seqlens_k, 0, dtype=torch.int32)
        return torch.nn.functional.pad(ends, (1, 0))
    rows = p.page_table.shape[1] * p.k.shape[1]
    return torch.arange(p.batch_size + 1, dtype=torch.int32, device=p.device) * rows


def _kvcache(p: Problem) -> Any:
    arguments = given(
        _common(p),
        cache_seqlens=p.seqlens_k,
        cache_batch_idx=p.cache_batch_idx,
        cache_leftpad=p.leftpad_k,
        block_table=p.page_table,
    )
    if p.append is not None:
        arguments |= {"k": p.append.k, "v": p.append.v}
        rotary = p.append.rotary
        if rotary is not None:
            arguments |= {"rotary_cos": rotary.cos, "rotary_sin": rotary.sin}
            arguments["rotary_interleaved"] = rotary.interleaved
    splits = min(p.hints.num_splits, 128)
    return _module().flash_attn_with_kvcache(
        p.q, p.k, p.v, num_splits=splits, return_softmax_lse=p.return_lse, **arguments
    )


def _common(p: Problem) -> dict[str, Any]:
    return {
        "softmax_scale": p.scores.softmax_scale,
        "causal": p.mask.causal,
        "window_size": window(p.mask),
        "softcap": p.scores.softcap,
    }


@remembered
def _module() -> Any:
    return PACKAGE.load()


PROVIDER = Fa2Provider()
