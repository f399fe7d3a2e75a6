"""FlashAttention 2, from flash-attn or from vLLM: 16-bit inputs on any NVIDIA GPU since sm80.

flash-attn takes pages of 256 tokens and their multiples, vLLM's build pages of 16 and theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.problem import KVLayout, Problem
from headway.providers import _fa2_rows, _vllm
from headway.providers._packages import (
    Package,
    asks_nothing,
    at_least,
    delivered,
    given,
    in_place,
    lengths_over_pages,
    nothing,
    remembered,
    window,
)
from headway.providers.base import (
    Capabilities,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

_FLASH_ATTN = Package(
    "flash_attn",
    "flash-attn",
    source="flash_attn_interface.py",
    install="flash-attn --no-build-isolation",
)
_VLLM = _vllm.package(2)

#: In the order in which they are taken where both are installed: the most arguments first.
PACKAGES = (_FLASH_ATTN, _VLLM)

#: Of flash-attn: the first version whose ragged calls have the LSE of today's shape.
_OLDEST = (2, 7)

_ELSEWHERE = "FlashAttention 2 has none; ver=3 and Headway's kernels do"
_VLLM_LACKS = "vLLM's build has no such argument; flash-attn and Headway's kernels do"
_RAGGED_ALIKE = excludes(
    Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"
)
_EXCLUSIONS = (
    excludes(Feature.RAGGED_Q, KVLayout.DENSE, why="its cache function takes q (B, Sq, Hq, D)"),
    _RAGGED_ALIKE,
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
        package = _installed()
        return _absent() if package is None else package.broken()

    def package(self) -> tuple[str, str] | None:
        return (_installed() or _FLASH_ATTN).installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        package = _installed()
        assert package is not None, "asked for the capabilities of what is not available"
        return _capabilities(package, device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        return {
            "sm80 and newer": _capabilities(_FLASH_ATTN, "cuda"),
            "sm80 and newer, vLLM's build": _capabilities(_VLLM, "cuda"),
        }

    def load(self) -> None:
        package = _installed()
        if package is not None:
            _module(package)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        package = _installed()
        assert package is not None
        if asks_nothing(problem):
            return nothing(problem)
        if problem.page_table is not None and problem.ragged_q and _packs_heads(problem):
            dense, owner = _fa2_rows.one_row_each(problem)
            return delivered(problem, self.run(dense)[0].squeeze(1).index_select(0, owner)), None
        if package is _VLLM:
            return _vllm.unpacked(problem, *_run_vllm(problem))
        if problem.ragged_q:
            return _ragged(problem, _varlen)
        return _finished(problem, _dense(problem) if _is_plain(problem) else _kvcache(problem))


# --- what a build can do ------------------------------------------------------------------------------


@remembered
def _installed() -> Package | None:
    return next((one for one in PACKAGES if one.found() and _outdated(one) is None), None)


def _outdated(package: Package) -> str | None:
    version = package.version()
    if package is not _FLASH_ATTN or version is None or at_least(version, *_OLDEST):
        return None
    return f"flash-attn {version}: needs 2.7 or newer (the LSE of ragged calls changed its shape)"


def _absent() -> str:
    """Why there is no package."""
    outdated = _outdated(_FLASH_ATTN) if _FLASH_ATTN.found() else None
    return outdated or (
        "no package of FlashAttention 2 is installed: flash-attn, vllm"
        f" (pip install {_FLASH_ATTN.install})"
    )


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

_HALF = frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)})


@remembered
def _capabilities(package: Package, device_type: str) -> Capabilities:
    vllm = package is _VLLM
    features = _FEATURES - _vllm.LACKS if vllm else _FEATURES
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=_HALF,
        features=features,
        head_dims=HeadDims(unequal=()),
        kv_layouts=_vllm.LAYOUTS if vllm else frozenset(KVLayout),
        page_size_multiple_of=16 if vllm else 256,
        rotary_dim_multiple_of=16,
        rotary_in_dtype_of_q=True,
        exclusions=(_RAGGED_ALIKE, _vllm.ONE_KIND_OF_LENGTHS) if vllm else _EXCLUSIONS,
        lacks=dict.fromkeys(frozenset(Feature) - _FEATURES, _ELSEWHERE)
        | dict.fromkeys(_FEATURES - features, _VLLM_LACKS),
    )


# --- calls --------------------------------------------------------------------------------------------


def _packs_heads(p: Problem) -> bool:
    """Whether its decode computes the heads of a group together, given one row for each sequence."""
    grouped = p.num_q_heads > p.num_kv_heads
    return p.is_decode and grouped and not p.mask.is_local and not p.return_lse


def _finished(p: Problem, result: Any) -> tuple[Tensor, Tensor | None]:
    if not p.return_lse:
        return delivered(p, result), None
    out, lse = result[:2]
    # Its kernels write +inf for rows that see no key.
    return delivered(p, out), lse.masked_fill_(lse == float("inf"), float("-inf"))


def _ragged(p: Problem, run: Callable[[Problem], Any]) -> tuple[Tensor, Tensor | None]:
    """Ragged queries, through a package's function for them."""
    p = _fa2_rows.ragged_at_any_length(p)
    if p.kv_layout is KVLayout.RAGGED:
        return _finished(p, run(p))
    seeing, others = _fa2_rows.without_unseeing(p, lengths_over_pages(p))
    result = run(seeing)
    out, *lse = result if p.return_lse else (result,)
    out.masked_fill_(others[:, None, None], 0)
    if p.return_lse:
        lse[0].masked_fill_(others, float("-inf"))
    return _finished(p, result)


def _run_vllm(p: Problem) -> tuple[Tensor, Tensor | None]:
    packed = _vllm.packed(p)
    # Dense queries are as many rows as their LSEs have room for: rows that see no key spoil nothing else.
    if not p.ragged_q and not p.return_lse:
        return _finished(packed, _vllm_varlen(packed))
    return _ragged(packed, _vllm_varlen)


def _vllm_varlen(p: Problem) -> Any:
    arguments = given(_common(p), out=in_place(p))
    arguments["max_seqlen_k"] = _fa2_rows.longest_k(p)
    if p.hints.num_splits == 1:
        arguments["num_splits"] = 1  # it counts no further
    return _vllm.call(_module(_VLLM).flash_attn_varlen_func, 2, p, **arguments)


def _is_plain(p: Problem) -> bool:
    """Whether q, k and v are all there is to the call."""
    cached = (p.seqlens_k, p.leftpad_k, p.cache_batch_idx, p.append)
    return p.kv_layout is KVLayout.DENSE and all(part is None for part in cached)


def _dense(p: Problem) -> Any:
    return _module(_FLASH_ATTN).flash_attn_func(
        p.q, p.k, p.v, return_attn_probs=p.return_lse, **_common(p)
    )


def _varlen(p: Problem) -> Any:
    paged = p.kv_layout is KVLayout.PAGED
    return _module(_FLASH_ATTN).flash_attn_varlen_func(
        p.q,
        p.k,
        p.v,
        p.cu_seqlens_q,
        _as_cumulative(p) if paged else p.cu_seqlens_k,
        p.max_seqlen_q,
        _fa2_rows.longest_k(p),
        return_attn_probs=p.return_lse,
        **given(_common(p), block_table=p.page_table),
    )


def _as_cumulative(p: Problem) -> Tensor:
    """(B + 1,) int32: with pages, flash-attn takes lengths as differences."""
    ends = torch.cumsum(lengths_over_pages(p), 0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))


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
    return _module(_FLASH_ATTN).flash_attn_with_kvcache(
        p.q, p.k, p.v, num_splits=splits, return_softmax_lse=p.return_lse, **arguments
    )


def _common(p: Problem) -> dict[str, Any]:
    left, right = window(p.mask)
    return {
        "softmax_scale": p.scores.softmax_scale,
        "causal": p.mask.causal,
        # A right bound beside causal says nothing more, and keeps decode from packing heads.
        "window_size": (left, -1 if p.mask.causal else right),
        "softcap": p.scores.softcap,
    }


@remembered
def _module(package: Package) -> Any:
    return package.load()


PROVIDER = Fa2Provider()
