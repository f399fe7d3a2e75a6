"""The test that every provider of a package passes: each call is run right, or refused with a reason."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings

from headway import UnsupportedError, providers
from tests.calls import FUNCTIONS, UNWRITTEN, Call, Result, assert_matches, calls

#: How many drawn calls a provider ran and refused, by provider.
RAN: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()

many = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def honoured_or_refused(
    call: Call, provider: str, device: str = "cpu", with_lse: bool = True
) -> bool:
    """Run where the provider would, and compare with the reference; else expect its reasons.

    ``with_lse``: with ``out`` given and the LSE asked for, or neither. Returns whether it ran.
    """
    problem = call.copy(device).problem()
    if with_lse:
        out = torch.empty(problem.out_shape, dtype=problem.out_dtype, device=device)
        problem = dataclasses.replace(problem, out=out, return_lse=True)
    reasons = providers.get(provider).reasons_against(problem)
    if not reasons:
        RAN[provider] += 1
        run = call.run if with_lse else functools.partial(_run_plainly, call)
        assert_matches(run(provider, device), call.run("reference"), call)
        return True
    REFUSED[provider] += 1
    assert all(reason and reason[0] != ":" for reason in reasons)
    with pytest.raises(UnsupportedError) as caught:
        (call.run if with_lse else functools.partial(_run_plainly, call))(provider, device)
    assert caught.value.reasons[provider] == tuple(reasons)
    return False


def _run_plainly(call: Call, provider: str, device: str) -> Result:
    """The result without ``out`` and the LSE; what it lacks is taken from the reference."""
    mine, expected = call.copy(device), call.run("reference")
    out = FUNCTIONS[call.function](**mine.kwargs, backend=provider).cpu()
    assert out.dtype == expected.out.dtype
    out[~expected.used] = UNWRITTEN  # nothing is promised of padding that was not handed in
    caches = tuple(mine.kwargs[n].cpu() for n in ("k_cache", "v_cache") if n in mine.kwargs)
    return Result(out, expected.lse, caches, expected.used)


#: Arguments that are drawn often and taken seldom.
_RARE = (
    ("sinks",),
    ("softcap",),
    ("attention_chunk",),
    ("window_size",),
    ("score_mod", "mask_mod", "aux_tensors"),
    ("seqused_q",),
    ("seqused_k",),
    ("cache_leftpad",),
    ("qv",),
)


@st.composite
def plainer_calls(draw: st.DrawFn, **limits: Any) -> Call:
    """Calls with fewer features at once, so that packages run a good part of them."""
    limits = {"dtypes": (torch.bfloat16, torch.float16), "head_dims": (64,), **limits}
    call = draw(calls(**limits))
    kwargs = dict(call.kwargs)
    for names in _RARE:
        paged = "page_table" in kwargs and "cache_seqlens" not in kwargs
        if names == ("seqused_k",) and paged:
            continue
        if draw(st.integers(0, 3)):
            for name in names:
                kwargs.pop(name, None)
    if "sinks" in kwargs and draw(st.booleans()):
        kwargs["sinks"] = kwargs["sinks"].to(torch.bfloat16)
    if "cache_leftpad" in call.kwargs and "cache_leftpad" not in kwargs:
        _fill_nan(kwargs)
    shapes = {k: tuple(v.shape) if torch.is_tensor(v) else v for k, v in kwargs.items()}
    return Call(call.function, kwargs, f"{call.function} {shapes}")


def _fill_nan(kwargs: dict[str, Any]) -> None:
    """Without cache_leftpad, the rows and pages before it are keys like any others."""
    for name in ("k_cache", "v_cache"):
        cache = kwargs[name]
        kwargs[name] = torch.where(cache.float().isnan(), 0.25, cache.float()).to(cache.dtype)
    if "page_table" in kwargs:
        pages = kwargs["k_cache"].shape[0]
        table = kwargs["page_table"]
        kwargs["page_table"] = torch.where((table < 0) | (table >= pages), 0, table)


def enough_ran(provider: str, least: int = 15) -> None:
    """Both kinds must have been drawn, or the test above shows nothing."""
    assert RAN[provider] >= least, (RAN[provider], REFUSED[provider])
    assert REFUSED[provider] >= 5, REFUSED[provider]
