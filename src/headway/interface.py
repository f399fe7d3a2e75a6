"""The public functions: arguments in, :class:`~headway.problem.Problem` out, one dispatch call.

What is in between is in :mod:`headway.arguments` (from the one to the other) and :mod:`headway.recall`.

Argument names and order are FlashAttention 3's, joined by what FlashAttention 4 and sgl_kernel add.
Every argument is honoured, or refused with a reason. Semantics are those of :mod:`headway.reference`.

Shapes used below: B sequences; Sq, Sk tokens; Hq query heads, Hkv key/value heads (Hkv divides Hq); D
head_dim of q and k, Dv of v. ``window_size`` is (left, right), inclusive; -1 and None are unbounded on
that side. ``num_splits``, ``pack_gqa``, ``sm_margin`` and ``deterministic`` are hints: they may change
speed, never results (every Headway kernel is deterministic). ``ver`` is 3, 4 or None; ``backend`` names
a provider that must run the call.
"""

from __future__ import annotations

import importlib.util
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from headway import dispatch, gradients, recall, reference
from headway.arguments import (
    batch_size_of,
    check_parts,
    check_sizes,
    check_states,
    dense_problem,
    kvcache_problem,
    require_lengths,
    varlen_problem,
)
from headway.errors import InvalidInputError
from headway.plan import MAX_SPLITS, Plan, PlanKey, plan_splits
from headway.problem import (
    MaskMod,
    Problem,
    ScoreMod,
    lengths_as_tensor,
    normalise_mask,
)

Window = Sequence[int | None] | None

_HAS_TRITON = importlib.util.find_spec("triton") is not None
Version = Literal[3, 4]


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
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    only_qv: bool = False,
    sinks: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Sequence[float] | None = None,
    gather_kv_indices: Tensor | None = None,
    block_sparse_tensors: object | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    ver: Version | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over dense tensors.

    Args:
        q: (B, Sq, Hq, D); k: (B, Sk, Hkv, D); v: (B, Sk, Hkv, Dv).
        qv: (B, Sq, Hq, Dv); adds qv·vᵀ to the scores (absorbed MLA). With ``only_qv``, replaces q·kᵀ:
            k and ``k_descale`` are not read then, nor is q, in whose place qv is. ``q_descale`` is of what
            takes q's place; a float8 qv beside q has no scale of its own.
        softmax_scale: default 1/√D, with ``qv`` 1/√(D + Dv), with ``only_qv`` 1/√Dv.
        q_descale, k_descale, v_descale: float32 (B, Hkv), only beside float8 tensors.
        sinks (or ``learnable_sink``): (Hq,), finite, or -inf for a head without one; adds exp(sink) to each
            row's denominator and to its LSE.
        score_mod: ``f(score, b, h, q_idx, kv_idx[, aux])`` on scaled, soft-capped scores.
        mask_mod: ``f(b, h, q_idx, kv_idx[, aux])``; true keeps. Joins causal and window by "and".
            In both, q_idx and kv_idx are absolute positions (the last query sits at Sk - 1) and ``aux``
            is the tuple of ``aux_tensors``, passed when there are any.
        out: (B, Sq, Hq, Dv), filled and returned.

    Returns:
        ``out``, or ``(out, lse)`` with lse float32 (B, Hq, Sq) when any of ``return_attn_probs``,
        ``return_lse``, ``return_softmax_lse`` is true.

    Raises:
        InvalidInputError: an argument is wrong. UnsupportedError: no provider can run the call.
    """
    if torch.compiler.is_compiling():
        # fmt: off
        return _traced(
            "flash_attn_func",
            q, k, v, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            return_attn_probs, only_qv, sinks, learnable_sink, score_mod, mask_mod, aux_tensors,
            aux_scalars, gather_kv_indices, block_sparse_tensors, return_lse, return_softmax_lse,
            out, ver, backend,
        )
        # fmt: on
    return _solve(_DENSE, locals())


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    only_qv: bool = False,
    sinks: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Sequence[float] | None = None,
    gather_kv_indices: Tensor | None = None,
    block_sparse_tensors: object | None = None,
    min_seqlen_k: int | None = None,
    seqlen_k_per_split: int | None = None,
    scheduler_metadata: Plan | None = None,
    disable_scheduler_metadata: bool = False,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    ver: Version | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths.

    Args:
        q: (total_q, Hq, D) with ``cu_seqlens_q`` (B + 1,) int32, or dense (B, Sq, Hq, D) without.
        k, v: (total_k, Hkv, D / Dv) with ``cu_seqlens_k``; or pages (num_pages, page_size, Hkv, D / Dv)
            with ``page_table`` (B, max_pages) int32; or dense (B, Sk, Hkv, D / Dv).
        seqused_q, seqused_k: (B,) int32 lengths in use, counted from each sequence's first row. With
            ``page_table``, lengths come from seqused_k, or else from the differences of cu_seqlens_k.
        max_seqlen_q, max_seqlen_k: upper bounds; default: what the shapes allow (exact on a CPU).
        min_seqlen_k, seqlen_k_per_split, disable_scheduler_metadata: hints, like ``num_splits``.
        Others as in :func:`flash_attn_func`; ragged ``qv`` and ``out`` are (total_q, Hq, Dv).

    Returns:
        ``out``, or ``(out, lse)`` with lse float32 (Hq, total_q), dense (B, Hq, Sq). Rows of padding
        (behind seqused_q) are not written.

    Raises:
        InvalidInputError: an argument is wrong. UnsupportedError: no provider can run the call.
    """
    if torch.compiler.is_compiling():
        # fmt: off
        return _traced(
            "flash_attn_varlen_func",
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            return_attn_probs, page_table, only_qv, sinks, learnable_sink, score_mod, mask_mod,
            aux_tensors, aux_scalars, gather_kv_indices, block_sparse_tensors, min_seqlen_k,
            seqlen_k_per_split, scheduler_metadata, disable_scheduler_metadata, return_lse,
            return_softmax_lse, out, ver, backend,
        )
        # fmt: on
    return _solve(_VARLEN, locals())


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
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Plan | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    max_seqlen_k: int | None = None,
    only_qv: bool = False,
    sinks: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    ver: Version | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention against a KV cache, with optional in-place append of new tokens and rotary embedding.

    Args:
        q: (B, Sq, Hq, D), or (total_q, Hq, D) with ``cu_seqlens_q``.
        k_cache, v_cache: (rows, max_len, Hkv, D / Dv); with ``page_table`` (B, max_pages) int32, pages
            (num_pages, page_size, Hkv, D / Dv). Any page size. Never copied.
        k, v: (B, Snew, Hkv, D / Dv), or ragged with ``cu_seqlens_k_new``: rotated (if rotary is given)
            and written behind ``cache_seqlens`` before attention sees them. Into a float8 cache wider
            values are divided by the descale and saturated.
        cache_seqlens: int or (B,) int32, lengths *before* the append. Default: the whole cache.
        cache_batch_idx: (B,) int32, the cache row (with pages: the page_table row) of each sequence.
        cache_leftpad: (B,) int32, first valid row of each sequence's cache.
        rotary_cos, rotary_sin: (max_pos, rotary_dim / 2); need ``k``. Position of new token i:
            ``rotary_seqlens[b]`` (default cache_seqlens) + i. Queries likewise if causal or local, else
            all at the first position. ``rotary_interleaved`` pairs (0, 1), (2, 3)..
        scheduler_metadata: a :class:`~headway.plan.Plan` from :func:`get_scheduler_metadata`.
        max_seqlen_k: upper bound of the lengths after the append; default: what the cache can hold.
        Others as in :func:`flash_attn_func`.

    Returns:
        ``out``, or ``(out, lse)``: dense (B, Hq, Sq), ragged (Hq, total_q).

    Raises:
        InvalidInputError: an argument is wrong. UnsupportedError: no provider can run the call.
    """
    if torch.compiler.is_compiling():
        # fmt: off
        return _traced(
            "flash_attn_with_kvcache",
            q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q,
            rotary_seqlens, q_descale, k_descale, v_descale, softmax_scale, causal, window_size,
            attention_chunk, softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa,
            sm_margin, return_softmax_lse, max_seqlen_k, only_qv, sinks, learnable_sink, score_mod,
            mask_mod, aux_tensors, return_lse, out, ver, backend,
        )
        # fmt: on
    if cache_seqlens.__class__ is not Tensor and isinstance(cache_seqlens, Integral):
        cache_seqlens = _one_length(int(cache_seqlens), q, cu_seqlens_q)
    return _solve(_KVCACHE, locals())


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    return_lse: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merge partial results over disjoint keys, as split-KV attention leaves them.

    Args:
        out_partial: float32 (n, B, Sq, Hq, Dv) or ragged (n, total_q, Hq, Dv), each part normalised.
        lse_partial: float32 (n, B, Sq, Hq) or (n, total_q, Hq). Parts that saw no key carry -inf (+inf
            and NaN are read as that too).
        out: where to put the result; out_dtype: its dtype otherwise, default that of out_partial.

    Returns:
        ``(out, lse)``, lse (B, Sq, Hq) or (total_q, Hq), float32; or ``out`` without ``return_lse``.

    Raises:
        InvalidInputError: shapes, devices or dtypes that do not fit together.
    """
    check_parts(out_partial, lse_partial, out, out_dtype)
    dtype = out_dtype or out_partial.dtype
    if _merges_here(out_partial):
        merged, lse = _merging().combine(
            out_partial, lse_partial, dtype if out is None else out.dtype
        )
    else:
        merged, lse = reference.combine(out_partial, lse_partial)
        lse = lse.float()
    result = merged.to(dtype) if out is None else out.copy_(merged)
    return (result, lse) if return_lse else result


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge results of attention over disjoint keys (a shared prefix and each request's own keys).

    Args:
        outs: each (B, Sq, Hq, Dv) or ragged (total_q, Hq, Dv).
        lses: each (B, Hq, Sq) or (Hq, total_q), as the attention functions return them.

    Returns:
        ``(out, lse)`` in the same layouts; where no part saw a key, 0 and -inf.

    Raises:
        InvalidInputError: shapes that are not alike, or not as many outs as lses.
    """
    outs, lses = tuple(outs), tuple(lses)
    check_states(outs, lses)
    if _merges_here(outs[0]):
        return _merging().merge_states(outs, lses)
    return reference.merge_states(outs, lses)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Plan:
    """The schedule of one step, to be passed as ``scheduler_metadata`` to each of its layers.

    Args:
        cache_seqlens: (B,) int32 lengths before any append; ``max_seqlen_k_new`` tokens are added.
        max_seqlen_k: capacity of a sequence's cache (max_pages * page_size, or the cache's rows).
        num_splits: upper bound of the pieces a sequence is cut into; 0: automatic.
        cu_seqlens_q, cu_seqlens_k_new, has_softcap, pack_gqa: for callers of FlashAttention 3; no schedule
            depends on them.

    Returns:
        A :class:`~headway.plan.Plan`; a call of another geometry refuses it.

    Raises:
        InvalidInputError: sizes that are no sizes, or lengths that are not int32 (B,).
    """
    check_sizes(
        num_heads_q,
        num_heads_kv,
        headdim=headdim,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        max_seqlen_k_new=max_seqlen_k_new,
        num_splits=num_splits,
        sm_margin=sm_margin,
    )
    require_lengths("cache_seqlens", cache_seqlens, batch_size)
    if cache_leftpad is not None:
        require_lengths("cache_leftpad", cache_leftpad, batch_size)
    mask = normalise_mask(causal, window_size, attention_chunk)
    lengths = cache_seqlens + max_seqlen_k_new
    if cache_leftpad is not None:
        lengths = lengths - cache_leftpad
    if mask.window_left is not None:
        widest = mask.window_left + max_seqlen_q + (mask.window_right or 0)
        lengths = lengths.clamp(max=min(widest, torch.iinfo(torch.int32).max))
    key = PlanKey(
        device=cache_seqlens.device,
        batch_size=batch_size,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_q_heads=num_heads_q,
        num_kv_heads=num_heads_kv,
        head_dim=headdim,
        head_dim_v=headdim if headdim_v is None else headdim_v,
        page_size=page_size,
        causal=mask.causal,
        window_left=mask.window_left,
        window_right=mask.window_right,
        attention_chunk=mask.attention_chunk,
    )
    planner = dispatch.planner(cache_seqlens.device)
    if planner is not None:
        return planner.plan(
            key, lengths, kv_dtype=qkv_dtype, num_splits=num_splits, sm_margin=sm_margin
        )
    workers = max(1, _num_workers(cache_seqlens.device) - sm_margin)
    bound = min(num_splits or MAX_SPLITS, MAX_SPLITS)
    splits = plan_splits(lengths, num_kv_heads=num_heads_kv, num_workers=workers, max_splits=bound)
    return Plan(key, splits)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """What would run this call, and why: ``explain(flash_attn_func, q, k, v, causal=True)``.

    Takes one of the attention functions and the arguments of a call to it, prints the table of
    providers, and returns it. Nothing is computed and no cache is written.
    """
    builder = _BUILDERS.get(function)
    if builder is None:
        names = ", ".join(f"headway.{f.__name__}" for f in _BUILDERS)
        given = f"{getattr(function, '__module__', None)}.{getattr(function, '__name__', function)}"
        raise InvalidInputError("function", given, f"one of {names}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    explanation = dispatch.explain(builder(SimpleNamespace(**bound.arguments)))
    print(explanation)
    return explanation


# --- from calls to providers ----------------------------------------------------------------------------


def _traced(function: str, *values: Any) -> Any:
    """A call of a public function inside torch.compile, all its arguments in order: one operator."""
    from headway import ops  # with torch's compiler, which is a second of imports

    return ops.call(function, dict(zip(_PARAMETERS[function], values, strict=True)))


def _solve(entry: _Entry, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """Run the call; one like an earlier call is neither checked nor chosen for again."""
    known = entry.calls.fitting(arguments)
    if known is not None and not (known.requires_grad and torch.is_grad_enabled()):
        out, lse = known.run(known.make(arguments))
        return out if lse is None else (out, lse)
    if torch.is_grad_enabled():
        inputs = entry.differentiable(arguments)
        if gradients.required(*inputs):
            return _without_gradients(entry, arguments, inputs)
    key, known = entry.calls.recall(arguments)
    if known is not None:
        out, lse = known.run(known.make(arguments))
    else:
        problem = entry.build(SimpleNamespace(**arguments))
        run = dispatch.choose(problem).runner(problem)
        entry.calls.remember(key, arguments, problem, run)
        out, lse = run(problem)
    return out if lse is None else (out, lse)


def _without_gradients(
    entry: _Entry, arguments: dict[str, Any], inputs: tuple[object, ...]
) -> Tensor | tuple[Tensor, Tensor]:
    gradients.check_out(arguments["out"])
    with torch.no_grad():
        result = _solve(entry, arguments)
    if isinstance(result, Tensor):
        return gradients.refused(result, *inputs)
    out, lse = result
    return gradients.refused(out, *inputs), lse


def _one_length(length: int, q: Tensor, cu_seqlens_q: Tensor | None) -> int | Tensor | None:
    """One length for all sequences as a tensor, so that calls which differ in it alone are alike."""
    if not isinstance(q, Tensor) or q.dim() < 3:
        return length  # refused for that
    batch_size = batch_size_of(q, cu_seqlens_q)
    return lengths_as_tensor("cache_seqlens", length, batch_size, q.device)


def _merges_here(part: Tensor) -> bool:
    """Whether partial results are merged by a kernel; elsewhere by the reference, in float64."""
    is_there = _HAS_TRITON and part.device.type in ("cuda", "meta")
    return is_there and part.dtype != torch.float64


def _merging() -> Any:
    """What merges on a GPU: the launchers, or, in a compiled region, operators that the graph keeps."""
    if torch.compiler.is_compiling():
        from headway import ops  # noqa: F401 - registers them

        return torch.ops.headway
    from headway.kernels.portable import combine

    return combine


def _num_workers(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


@dataclass(frozen=True)
class _Entry:
    """A public function behind its signature: what makes its Problems, and its calls so far."""

    build: Callable[[SimpleNamespace], Problem]
    calls: recall.Memory
    #: of its arguments, those that a training attention has gradients for
    differentiable: Callable[[dict[str, Any]], tuple[object, ...]]


_TRAINED = ("q", "k", "v", "qv", "sinks", "learnable_sink")
_FRESH = operator.itemgetter(*_TRAINED)
_CACHED = operator.itemgetter(*_TRAINED, "k_cache", "v_cache")
_DENSE = _Entry(dense_problem, recall.Memory(flash_attn_func, "k", "v"), _FRESH)
_VARLEN = _Entry(varlen_problem, recall.Memory(flash_attn_varlen_func, "k", "v"), _FRESH)
_KVCACHE = _Entry(
    kvcache_problem, recall.Memory(flash_attn_with_kvcache, "k_cache", "v_cache"), _CACHED
)

_BUILDERS: dict[Callable[..., Any], Callable[[SimpleNamespace], Problem]] = {
    flash_attn_func: dense_problem,
    flash_attn_varlen_func: varlen_problem,
    flash_attn_with_kvcache: kvcache_problem,
}

#: Names of their parameters, in order.
_PARAMETERS = {f.__name__: tuple(inspect.signature(f).parameters) for f in _BUILDERS}
