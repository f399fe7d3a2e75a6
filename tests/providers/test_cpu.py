"""The cpu provider equals the reference over every feature, drawn together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from headway import UnsupportedError
from headway.providers import cpu
from tests.calls import CAPS, Call, assert_matches, calls, capped
from tests.providers import feature_calls


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(call=calls())
def test_any_call_equals_the_reference(call: Call) -> None:
    assert_matches(call.run("cpu"), call.run("reference"), call)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_prefill_equals_the_reference(dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 700, 6, 64, dtype=dtype)
    k, v = (torch.randn(1, 1500, 2, 64, dtype=dtype) for _ in range(2))
    call = Call("dense", {"q": q, "k": k, "v": v, "causal": causal}, "long prefill")
    assert_matches(call.run("cpu"), call.run("reference"), call)


def test_pages_without_lengths_are_keys_to_their_ends() -> None:
    call = feature_calls.named("pages of 64, all of them")
    assert_matches(call.run("cpu"), call.run("reference"), call)


def test_calls_without_compiled_kernels_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = feature_calls.named("dense causal").problem()
    modified = feature_calls.named("dense score_mod").problem()
    assert cpu.PROVIDER.note(plain) == ""
    assert "torch operations" in cpu.PROVIDER.note(modified)
    monkeypatch.setattr(cpu, "_numba_installed", lambda: False)
    assert "pip install numba" in cpu.PROVIDER.note(plain)


def test_a_mod_that_no_kernel_could_have_is_refused_here_too() -> None:
    """A CPU sees scores in blocks: a sum over them would depend on where these end."""
    call = feature_calls.named("dense score_mod")
    call.kwargs |= {"score_mod": lambda score, *rest: score - score.sum()}
    with pytest.raises(UnsupportedError, match="a mod sees single scores"):
        call.run("cpu")


@pytest.mark.parametrize("softcap", CAPS)
def test_a_cap_of_any_size(softcap: float) -> None:
    call = capped(softcap)
    assert_matches(call.run("cpu"), call.run("reference"), call)
