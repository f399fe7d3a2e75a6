"""Stands in for the Hopper kernels: their signatures, computed with the reference from their arguments.

What the kernels would read as something else, and what they do not take, fails an assertion here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import reference
from headway.kernels.hopper.decode import appends
from headway.kernels.hopper.decode_config import MOST_APPENDED
from headway.kernels.mods import ModArguments
from headway.problem import Append, Descales, KVLayout, Mask, Problem, Scores
from headway.providers import hopper
from headway.providers.base import Capabilities

#: Names of the kernels that ran, in order; a decode plan is filled by "plan".
RAN: list[str] = []


def assert_aligned(*tensors: Tensor) -> None:
    for t in tensors:
        assert t.stride(-1) == 1
        steps = [t.data_ptr(), *(s * t.element_size() for s in t.stride()[:-1])]
        assert all(step % 16 == 0 for step in steps), steps


def _solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    layout: KVLayout,
    lengths: dict[str, Any],
    mask: Mask,
    scores: Scores,
    **more: Any,
) -> None:
    cu = lengths["cu_seqlens_q"]
    batch = q.shape[0] if cu is None else cu.shape[0] - 1
    problem = Problem(
        q=q,
        k=k,
        v=v,
        kv_layout=layout,
        batch_size=batch,
        mask=mask,
        scores=scores,
        out=out,
        **lengths,
        **more,
    )
    _, got = reference.attention(dataclasses.replace(problem, return_lse=True))
    if lse is not None:
        assert got is not None
        assert lse.shape == got.shape
        mine = slice(None) if cu is None else slice(int(cu[0]), int(cu[-1]))
        lse[..., mine] = got[..., mine]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    aux: Any = None,
    num_splits: int = 0,
    descales: Tensor | None = None,
) -> None:
    RAN.append("forward")
    assert_aligned(q, k, v, out)
    assert k.numel()
    assert q.dtype == k.dtype == out.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert not causal or window_right == 0
    layout = KVLayout.DENSE if cu_seqlens_k is None else KVLayout.RAGGED
    layout = KVLayout.PAGED if page_table is not None else layout
    if cu_seqlens_q is None:
        assert max_seqlen_q == q.shape[1]
    rows = k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]
    if seqused_k is None and layout is not KVLayout.RAGGED:
        assert max_seqlen_k == rows
    _solve(
        q,
        k,
        v,
        out,
        lse,
        layout,
        {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "seqused_q": seqused_q,
            "seqlens_k": seqused_k,
            "leftpad_k": leftpad_k,
            "cache_batch_idx": cache_batch_idx,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        },
        Mask(causal, window_left, window_right, attention_chunk, mask_mod),
        Scores(softmax_scale, softcap, sinks, score_mod),
        page_table=page_table,
        aux_tensors=aux or (),
        descales=Descales() if descales is None else Descales(None, *descales.unbind(-1)),
    )


@dataclass
class Step:
    """A decode plan: what it was made for, and the lengths that it was filled with, as they were then."""

    made_for: dict[str, Any]
    starts: Tensor
    arrivals: Tensor
    filled: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_plan(*, batch_size: int, **made_for: Any) -> Step:
    starts = torch.zeros(batch_size, dtype=torch.int32)
    return Step({"batch_size": batch_size, **made_for}, starts, torch.zeros_like(starts))


def plan_decode(
    plan: Step,
    *,
    seqlens_k: Tensor | None,
    capacity: int,
    rows_q: int,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_q: Tensor | None = None,
    new_tokens: int = 0,
    cu_seqlens_new: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
) -> None:
    RAN.append("plan")
    if seqlens_k is None:
        seqlens_k = torch.full_like(plan.starts, capacity)
    assert new_tokens == 0 or cu_seqlens_new is None
    seqlens_k = seqlens_k + new_tokens
    if cu_seqlens_new is not None:
        seqlens_k += cu_seqlens_new.diff()
    lengths = {
        "seqlens_k": seqlens_k,
        "leftpad_k": leftpad_k,
        "cache_batch_idx": cache_batch_idx,
        "cu_seqlens_q": cu_seqlens_q,
        "seqused_q": seqused_q,
    }
    plan.filled = {name: None if t is None else t.clone() for name, t in lengths.items()}
    plan.filled |= {"mask": (window_left, window_right, chunk), "rows_q": rows_q}
    plan.filled["capacity"] = capacity


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: Step,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    page_table: Tensor | None = None,
    max_seqlen_q: int = 1,
    leftpad: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    aux: Any = None,
    append: Append | None = None,
    longest_new: int = 0,
    whole_rows: bool = False,
) -> None:
    RAN.append("decode" if append is None else "appending decode")
    assert_aligned(q, k, v, out)
    assert softmax_scale > 0
    if qv is None:
        assert max(q.shape[-1], v.shape[-1]) <= 256
    else:
        assert_aligned(qv)
        assert q.shape[-1] <= 64
        assert 256 < v.shape[-1] <= 512
        assert qv.shape == (*q.shape[:-1], v.shape[-1])
    made_of_rows = q, k
    if whole_rows:
        assert qv is not None
        made_of_rows = torch.cat((qv, q), -1), torch.cat((v, k), -1)
    if plan.made_for["abreast"]:  # the kernel reads two heads as one where rows are short
        assert lie_abreast(k)
        assert lie_abreast(v)
        assert append is None
    filled = plan.filled
    rows = max_seqlen_q if q.dim() == 3 else q.shape[1]
    made_for = {
        "batch_size": plan.starts.shape[0],
        "num_kv_heads": k.shape[2],
        "group": q.shape[-2] // k.shape[2],
        "max_seqlen_q": rows,
        "head_dim": q.shape[-1],
        "head_dim_v": v.shape[-1],
        "itemsize": k.element_size(),
        "page_size": 0 if page_table is None else k.shape[1],
    }
    assert made_for.items() <= plan.made_for.items(), (made_for, plan.made_for)
    assert filled["mask"] == (window_left, window_right, chunk)
    assert leftpad == (filled["leftpad_k"] is not None)
    assert filled["rows_q"] == rows
    names = ("seqlens_k", "leftpad_k", "cache_batch_idx", "cu_seqlens_q", "seqused_q")
    lengths = {name: filled[name] for name in names}
    if append is not None:
        lengths["seqlens_k"] = _before(append, lengths["seqlens_k"], longest_new)
    _solve(
        *made_of_rows,
        v,
        out,
        lse,
        KVLayout.DENSE if page_table is None else KVLayout.PAGED,
        lengths | {"max_seqlen_q": rows, "max_seqlen_k": filled["capacity"]},
        Mask(False, window_left, window_right, chunk, mask_mod),
        Scores(softmax_scale, softcap, sinks, score_mod),
        page_table=page_table,
        qv=None if whole_rows else qv,
        descales=Descales(q_descale, k_descale, v_descale),
        aux_tensors=aux or (),
        append=append,
    )


def _before(append: Append, ends: Tensor, longest_new: int) -> Tensor:
    """Lengths before what the kernel appends."""
    assert_aligned(append.k, append.v)
    if append.rotary is not None:
        assert_aligned(append.rotary.cos, append.rotary.sin)
    cu = append.cu_seqlens
    new = torch.full_like(ends, append.k.shape[1]) if cu is None else cu.diff()
    assert new.numel() == 0 or new.max() <= longest_new <= MOST_APPENDED
    return ends - new


def are_narrow(head_dim: int, head_dim_v: int, itemsize: int, page_size: int, heads: int) -> bool:
    """More are than the kernel takes for narrow: whatever it would ask for is looked at."""
    return itemsize == 1


def lie_abreast(t: Tensor) -> bool:
    return t.stride(2) == t.shape[3]


def prepare_decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Step, *rest: Tensor | None, **options: Any
) -> Any:
    """Calls :func:`decode` as it was prepared, with tensors that are what they were then."""
    names = ("lse", "page_table", "sinks", "qv", "q_descale", "k_descale", "v_descale")
    kind = _kind(q, k, v, out, *rest)
    first = options.pop("append", None)

    def prepared(plan: Step, *given: Any) -> None:
        tensors, append = given[:11], given[11] if len(given) > 11 else None
        assert _kind(*tensors) == kind
        assert (append is None) == (first is None)
        q, k, v, out, *others = tensors
        named = dict(zip(names, others, strict=True))
        decode(q, k, v, out, plan, **named, **options, append=append)

    return prepared


def prepare_forward(*given: Tensor | None, **options: Any) -> Any:
    """The same with :func:`forward`."""
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")
    names = ("out", "lse", *lengths, "cache_batch_idx", "page_table", "sinks", "descales")
    kind = _kind(*given)

    def prepared(*tensors: Any) -> None:
        assert _kind(*tensors) == kind
        q, k, v, *others = tensors
        forward(q, k, v, **dict(zip(names, others, strict=True)), **options)

    return prepared


def widen(problem: Problem, dtype: torch.dtype) -> Any:
    """The kernel itself, interpreted."""
    from headway.kernels.hopper import widen

    RAN.append("widen")
    return widen.widen(problem, dtype)


def at_once(problem: Problem) -> int:
    from headway.kernels.hopper import widen

    return widen.sequences_at_once(problem)


def _kind(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _mods(p: Problem) -> ModArguments:
    return ModArguments(p.scores.score_mod, p.mask.mask_mod, p.aux_tensors)  # type: ignore[arg-type]


def _on_cpu(can: Capabilities) -> Capabilities:
    return dataclasses.replace(can, device_types=frozenset({"cpu"}))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Inside, the provider runs on CPU tensors, with these kernels."""
    from headway import dispatch

    launchers = SimpleNamespace(
        append=reference.append,
        appends=appends,
        prepare_forward=prepare_forward,
        reason_against_widening=lambda problem: None,
        widen=widen,
        widened_at_once=at_once,
        make_plan=make_plan,
        plan_decode=plan_decode,
        prepare_decode=prepare_decode,
        are_narrow=are_narrow,
        lie_abreast=lie_abreast,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper.HopperProvider, "unavailable", lambda self, device: None)
        patch.setattr(hopper, "_ANY", _on_cpu(hopper._ANY))
        for work, can in hopper._CAPABILITIES.items():
            patch.setitem(hopper._CAPABILITIES, work, _on_cpu(can))
        patch.setattr(hopper, "_mods", _mods)
        patch.setattr(hopper, "_kernels", lambda: launchers)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        dispatch.forget()
        RAN.clear()
        yield
    dispatch.forget()
