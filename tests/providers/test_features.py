"""Every claim of every package provider, on stand-ins; tests/gpu shows it with the packages themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from headway import providers
from headway.providers import aiter
from tests import calls
from tests.calls import FUNCTIONS, UNWRITTEN
from tests.providers import feature_calls
from tests.providers.claims import assert_claims_are_shown
from tests.providers.honoured import honoured_or_refused
from tests.stand_ins import installed

#: Providers with the device and the package that each is asked on.
INSTALLED = (
    ("fa2", "sm90", "fa2"),
    ("fa2", "sm90", "vllm"),
    ("fa3", "sm90", "sgl"),
    ("fa3", "sm90", "vllm"),
    ("fa4", "sm90", "fa4"),
    ("flashinfer", "sm90", "flashinfer"),
    ("aiter", "gfx950", "aiter"),
    ("mate", "mp31", "mate"),
)


@pytest.fixture(params=INSTALLED, ids=" ".join, scope="module")
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    name, kind, package = request.param
    with installed(kind, package), pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiter, "_compute_units", lambda device: 8)
        yield name


@pytest.mark.parametrize("name", feature_calls.CALLS)
def test_a_call_is_honoured_or_refused(provider: str, name: str) -> None:
    call = feature_calls.named(name)
    if not honoured_or_refused(call, provider):
        honoured_or_refused(call, provider, with_lse=False)


@pytest.mark.parametrize("name", feature_calls.CALLS)
def test_results_go_into_rows_of_wider_memory(provider: str, name: str) -> None:
    """As engines ask: no LSE, and ``out`` in memory that what follows reads."""
    call = feature_calls.named(name)
    problem = call.problem()
    shape = problem.out_shape
    rows, (heads, width) = math.prod(shape[:-2]), shape[-2:]
    memory = torch.full((rows + 4, heads * width), UNWRITTEN, dtype=problem.out_dtype)
    out = memory[1 : rows + 1].view(shape)
    if providers.get(provider).reasons_against(dataclasses.replace(problem, out=out)):
        return  # shown to be refused above
    run, used = FUNCTIONS[call.function], calls._used_rows(problem)
    want = run(**call.copy().kwargs, backend=provider)
    assert run(**call.copy().kwargs, out=out, backend=provider) is out
    assert torch.equal(out[used], want[used])
    out[used] = UNWRITTEN
    assert (memory == UNWRITTEN).all()


def test_every_claim_is_shown(provider: str) -> None:
    assert_claims_are_shown(provider)


@pytest.mark.parametrize("name", ["hopper", "portable"])
def test_every_claim_of_our_own_kernels_has_a_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tests/gpu runs on a card: no claim is without a call there."""
    monkeypatch.setenv("HEADWAY_TARGET", "sm90")
    assert_claims_are_shown(name, "meta")
