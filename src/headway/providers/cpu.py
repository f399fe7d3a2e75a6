"""Attention on a CPU, every feature.

Compiled kernels where numba is installed (the extra ``cpu``). What they do not take (score_mod,
mask_mod, qv, float64), and everything where numba is missing, runs in torch operations.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway import reference
from headway.kernels.cpu import blockwise
from headway.problem import FLOAT8_DTYPES, FLOAT_DTYPES, Append, Problem, append_lengths
from headway.providers.base import ALL_FEATURES, Capabilities, HeadDims, Provider, Repeat

if TYPE_CHECKING:
    from headway.kernels.cpu.append import AppendCall
    from headway.kernels.cpu.attention import AttentionCall

COMPILED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class CpuProvider(Provider):
    name = "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "runs on CPU tensors"

    def capabilities(self, device: torch.device) -> Capabilities:
        return _CAPABILITIES

    def documented(self) -> Mapping[str, Capabilities]:
        return {"cpu": self.capabilities(torch.device("cpu"))}

    def note(self, problem: Problem) -> str:
        if not _numba_installed():
            return "in torch operations; compiled kernels need numba: pip install numba"
        if not _attention_is_compiled(problem):
            return (
                "in torch operations: the compiled kernel has no score_mod, mask_mod, qv, float64"
            )
        return ""

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        q, new = problem.q, problem.append
        if new is not None:
            compiled = _numba_installed() and _append_is_compiled(problem, new)
            q = _append(problem, new) if compiled else reference.append(problem, new)
        if _numba_installed() and _attention_is_compiled(problem):
            return _attend(problem, q)
        return blockwise.attention(problem, q)

    def repeat(self, problem: Problem) -> Repeat:
        otherwise, new = super().repeat(problem), problem.append
        compiled = (
            _numba_installed()
            and new is not None
            and new.rotary is None
            and not problem.return_lse
            and problem.out is None
            and _append_is_compiled(problem, new)
            and _attention_is_compiled(problem)
        )
        if not compiled:
            return otherwise
        assert new is not None
        return _CompiledRepeat(problem, new, otherwise)


_ALL_DTYPES = FLOAT_DTYPES + FLOAT8_DTYPES
_CAPABILITIES = Capabilities(
    device_types=frozenset({"cpu"}),
    dtypes=frozenset(itertools.product(_ALL_DTYPES, _ALL_DTYPES)),
    features=ALL_FEATURES,
    head_dims=HeadDims(maximum=1 << 20, multiple_of=1),
)


@cache
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _attention_is_compiled(p: Problem) -> bool:
    return (
        p.scores.score_mod is None
        and p.mask.mask_mod is None
        and p.qv is None
        and p.q.dtype is not torch.float64
        and p.out_dtype in COMPILED_DTYPES
    )


def _append_is_compiled(p: Problem, new: Append) -> bool:
    return {p.q.dtype, p.k.dtype, new.k.dtype, new.v.dtype} <= COMPILED_DTYPES


def _append(p: Problem, new: Append) -> Tensor:
    """Write the new tokens into the cache; returns the query, rotated where there is a rotary."""
    q = p.q if new.rotary is None else torch.empty_like(p.q)
    _append_call(p, new, q).run()
    return q


def _append_call(p: Problem, new: Append, q_out: Tensor) -> AppendCall:
    from headway.kernels.cpu.append import AppendCall

    assert p.seqlens_k is not None
    rotary = new.rotary
    return AppendCall(
        new.k,
        new.v,
        p.k,
        p.v,
        seqlens_k=p.seqlens_k,
        cu_seqlens_new=new.cu_seqlens,
        page_table=p.page_table,
        cache_batch_idx=p.cache_batch_idx,
        rotary_cos=None if rotary is None else rotary.cos,
        rotary_sin=None if rotary is None else rotary.sin,
        rotary_interleaved=rotary is not None and rotary.interleaved,
        rotary_seqlens=None if rotary is None else rotary.seqlens,
        q=None if rotary is None else p.q,
        q_out=None if rotary is None else q_out,
        cu_seqlens_q=p.cu_seqlens_q,
        seqused_q=p.seqused_q,
        q_at_own_positions=p.mask.causal or p.mask.is_local,
    )


def _attend(p: Problem, q: Tensor) -> tuple[Tensor, Tensor | None]:
    out = p.empty_out()
    lse = p.empty_lse() if p.return_lse else None
    _attention_call(p, q, out, lse).run()
    return out, lse


def _attention_call(p: Problem, q: Tensor, out: Tensor, lse: Tensor | None) -> AttentionCall:
    from headway.kernels.cpu.attention import AttentionCall

    seqlens_k = p.seqlens_k
    if seqlens_k is not None and (new := append_lengths(p)) is not None:
        seqlens_k = seqlens_k + new
    sinks = p.scores.sinks
    return AttentionCall(
        q,
        p.k,
        p.v,
        out,
        lse,
        softmax_scale=p.scores.softmax_scale,
        cu_seqlens_q=p.cu_seqlens_q,
        seqused_q=p.seqused_q,
        cu_seqlens_k=p.cu_seqlens_k,
        seqlens_k=seqlens_k,
        leftpad_k=p.leftpad_k,
        cache_batch_idx=p.cache_batch_idx,
        page_table=p.page_table,
        window_left=p.mask.window_left,
        window_right=p.mask.window_right,
        attention_chunk=p.mask.attention_chunk,
        softcap=p.scores.softcap,
        sinks=None if sinks is None else sinks.float(),
        q_descale=p.descales.q,
        k_descale=p.descales.k,
        v_descale=p.descales.v,
    )


class _CompiledRepeat:
    """Appends and attends with arguments that were packed once, for layers of equal strides."""

    def __init__(self, problem: Problem, new: Append, otherwise: Repeat) -> None:
        self._out_shape, self._out_dtype = problem.out_shape, problem.out_dtype
        out = torch.empty(self._out_shape, dtype=self._out_dtype, device="cpu")
        self._append = _append_call(problem, new, problem.q)
        self._attention = _attention_call(problem, problem.q, out, None)
        self._strides = _strides(problem.q, problem.k, problem.v, new.k, new.v)
        self._otherwise = otherwise

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new_k: Tensor,
        new_v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        if _strides(q, k, v, new_k, new_v) != self._strides:
            return self._otherwise(q, k, v, new_k, new_v, sinks)
        out = torch.empty(self._out_shape, dtype=self._out_dtype, device="cpu")
        wide_sinks = None if sinks is None else sinks.float()
        self._append.run_with(new_k, new_v, k, v)
        self._attention.run_with(q, k, v, out, wide_sinks)
        return out


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple([tensor.stride() for tensor in tensors])


PROVIDER = CpuProvider()
