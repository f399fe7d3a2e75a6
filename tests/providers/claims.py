"""What a provider claims against the calls that show it."""

from __future__ import annotations

import dataclasses

import torch

from headway import providers
from headway.problem import KVLayout, Problem
from headway.providers.base import Feature, features_of, name_of
from tests.providers import feature_calls


def assert_claims_are_shown(provider: str, device: str = "cpu") -> None:
    """Each feature, layout and dtype that it claims is in a call that it runs; the others it refuses."""
    answers = [
        (problem, providers.get(provider).reasons_against(problem))
        for _, call in feature_calls.each()
        for problem in _forms(call.copy(device).problem(), device)
    ]
    can = providers.get(provider).capabilities(torch.device(device))
    runs = [problem for problem, reasons in answers if not reasons]
    shown = {feature for problem in runs for feature in features_of(problem)}
    assert can.features <= shown, {f.value for f in can.features - shown}
    assert {p.kv_layout for p in runs} == can.kv_layouts
    pairs = {pair for pair in can.dtypes if torch.float8_e5m2 not in pair}
    assert pairs <= {(p.q.dtype, p.k.dtype) for p in runs}
    for missing in (frozenset(Feature) - can.features) | (frozenset(KVLayout) - can.kv_layouts):
        assert any(_names(missing, reasons) for _, reasons in answers), missing


def _forms(problem: Problem, device: str) -> list[Problem]:
    """As it is, and with ``out`` and the LSE."""
    out = torch.empty(problem.out_shape, dtype=problem.out_dtype, device=device)
    return [problem, dataclasses.replace(problem, out=out, return_lse=True)]


def _names(missing: Feature | KVLayout, reasons: list[str]) -> bool:
    return any(reason.startswith(name_of(missing)) for reason in reasons)
