"""torch's default dtype and device belong to the program: calls neither follow nor trip over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import mla, quant
from tests.calls import assert_matches
from tests.providers import feature_calls

CALLS = [
    "dense causal",
    "dense score_mod",
    "dense mask_mod",
    "ragged sinks",
    "pages of 64, all of them",
    "pages of 64, append with rotary",
    "pages of 64, float8 keys and values",
    "pages of 64, latent",
    "dense cache append of other dtype",
]


def prefill() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    of = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    q, k = (torch.randn(30, 2, 192, **of) for _ in range(2))  # type: ignore[call-overload]
    ends = torch.tensor([0, 20, 30], dtype=torch.int32, device="cpu")
    v = k[..., :128]
    float8 = mla.prefill(q, k, v, ends, ends, fp8=True, return_lse=True)
    return (*float8, *quant.quantise(k, per="head"), quant.amax_scales([q])[0])


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def under_other_defaults(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    def run(function: Callable[[], Any]) -> Any:
        if request.param == "meta":
            with torch.device("meta"):
                return function()
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            return function()
        finally:
            torch.set_default_dtype(before)

    return run


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for mine, other in zip(got, want, strict=True):
        assert (mine.dtype, mine.device) == (other.dtype, other.device)
        torch.testing.assert_close(mine.float(), other.float())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_attention(name: str, backend: str, under_other_defaults: Any) -> None:
    call = feature_calls.named(name)
    got = under_other_defaults(lambda: call.run(backend))
    assert_matches(got, call.run("reference"), call)


def test_float8(under_other_defaults: Any) -> None:
    assert_same(under_other_defaults(prefill), prefill())
