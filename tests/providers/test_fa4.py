"""FlashAttention 4, on stand-ins with its signatures and checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import headway
from headway import UnsupportedError, providers
from tests.calls import Call, assert_matches
from tests.providers.honoured import RAN, REFUSED, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed


@pytest.mark.parametrize(
    ("package", "kind"),
    [("fa4", "sm90"), ("fa4", "sm100"), ("fa4", "sm120"), ("fa4_public", "sm90")],
)
def test_any_call_is_honoured_or_refused(package: str, kind: str) -> None:
    RAN.clear()
    REFUSED.clear()

    @many
    @given(call=plainer_calls(head_dims=(64, 128, 192, 40), page_sizes=(1, 16, 128)))
    def check(call: Call) -> None:
        honoured_or_refused(call, "fa4")

    with installed(kind, package):
        check()
    assert RAN["fa4"] >= 10, RAN
    assert REFUSED["fa4"] >= 10, REFUSED


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


@pytest.mark.parametrize("package", ["fa4", "fa4_public"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window", [(-1, -1), (3, -1), (-1, 3), [-1, -1], (None, 0), (2, 1), (0, 0), (-1, 0)]
)
def test_every_window_means_the_same_as_elsewhere(package: str, causal: bool, window: Any) -> None:
    """-1 is an offset in this package, and the one-sided forms change their meaning."""
    torch.manual_seed(0)
    call = Call(
        "dense",
        {"q": normal(1, 6, 2, 64), "k": normal(1, 9, 2, 64), "v": normal(1, 9, 2, 64)}
        | {"causal": causal, "window_size": window},
        f"window {window}",
    )
    with installed("sm90", package):
        assert_matches(call.run("fa4"), call.run("reference"), call)


def cached(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": normal(2, 1, 4, 64),
        "k_cache": normal(6, 16, 2, 64),
        "v_cache": normal(6, 16, 2, 64),
        "cache_seqlens": torch.tensor([20, 9], dtype=torch.int32),
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 5]], dtype=torch.int32),
        "causal": True,
    } | changes


def test_append_rotary_and_descales_are_three_reasons_and_alternatives() -> None:
    float8 = torch.float8_e4m3fn
    kwargs = cached(
        k=normal(2, 1, 2, 64),
        v=normal(2, 1, 2, 64),
        rotary_cos=normal(64, 16),
        rotary_sin=normal(64, 16),
        k_descale=torch.ones(2, 2),
    )
    kwargs |= {name: kwargs[name].to(float8) for name in ("k_cache", "v_cache")}
    with installed("sm90", "fa4"):
        with pytest.raises(UnsupportedError) as caught:
            headway.flash_attn_with_kvcache(**kwargs, backend="fa4")
        text = "\n".join(caught.value.reasons["fa4"])
        for argument in ("append to the cache", "rotary_cos", "q_descale / k_descale"):
            assert argument in text
        assert "reference" in caught.value.alternatives
        explanation = headway.explain(
            headway.flash_attn_with_kvcache, **kwargs, ver=4, backend="auto"
        )
        assert explanation.chosen in ("cpu", "portable", None)


def test_splits_are_asked_for_only_where_there_are_kernels_for_them() -> None:
    for kind, wanted in (("sm90", 1), ("sm100", 0)):
        with installed(kind, "fa4"):
            headway.flash_attn_with_kvcache(**cached(), num_splits=0, backend="fa4")
            assert CALLS[-1][1]["num_splits"] == wanted


def test_out_and_lse_are_the_callers() -> None:
    for package in ("fa4", "fa4_public"):
        out = torch.empty(2, 1, 4, 64, dtype=torch.bfloat16)
        with installed("sm90", package):
            got, lse = headway.flash_attn_with_kvcache(
                **cached(), out=out, return_softmax_lse=True, backend="fa4"
            )
            assert got is out
            assert lse.shape == (2, 4, 1)
            assert (CALLS[-1][1]["out"] is out) == (package == "fa4")


def test_a_cache_that_would_be_copied_is_refused_with_its_strides() -> None:
    wide = normal(6, 16, 2, 68)
    with installed("sm90", "fa4"), pytest.raises(UnsupportedError, match="would be copied"):
        headway.flash_attn_with_kvcache(
            **cached(k_cache=wide[..., :64], v_cache=wide[..., :64]), backend="fa4"
        )


def test_absorbed_mla_returns_the_interfaces_lse() -> None:
    torch.manual_seed(0)
    kwargs = {
        "q": normal(2, 3, 16, 64),
        "qv": normal(2, 3, 16, 512),
        "k": normal(2, 70, 1, 64),
        "v": normal(2, 70, 1, 512),
        "causal": True,
    }
    call = Call("dense", kwargs, "absorbed MLA")
    with installed("sm100", "fa4"):
        assert_matches(call.run("fa4"), call.run("reference"), call)
    with installed("sm90", "fa4"), pytest.raises(UnsupportedError, match="compute capability 10"):
        call.run("fa4")


def test_float8_with_descales_runs_on_blackwell() -> None:
    torch.manual_seed(0)
    float8 = {n: normal(2, 40, 2, 128).to(torch.float8_e4m3fn) for n in ("q", "k", "v")}
    scales = {f"{n}_descale": torch.rand(2, 2) + 0.5 for n in "qkv"}
    call = Call("dense", float8 | scales, "float8")
    with installed("sm100", "fa4"):
        assert_matches(call.run("fa4"), call.run("reference"), call)
    for kind, package in (("sm90", "fa4"), ("sm100", "fa4_public")):
        with installed(kind, package), pytest.raises(UnsupportedError):
            call.run("fa4")


def test_sinks_of_any_dtype_need_a_build_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.providers import _packages

    sinks = torch.randn(4)
    for version, runs in (("4.0.0b36", True), ("4.0.0b9", False), (None, False)):
        with installed("sm90", "fa4"):
            monkeypatch.setattr(_packages, "_version", lambda name, version=version: version)
            if runs:
                headway.flash_attn_with_kvcache(**cached(sinks=sinks), backend="fa4")
                continue
            with pytest.raises(UnsupportedError, match="sinks of float32: takes bfloat16"):
                headway.flash_attn_with_kvcache(**cached(sinks=sinks), backend="fa4")


def test_the_draft_in_flash_attn_is_not_taken_for_it() -> None:
    with installed("sm90", "fa4_early"):
        reason = providers.get("fa4").unavailable(torch.device("cpu"))
    assert reason is not None
    assert "early" in reason
    assert "pip install flash-attn-4" in reason


@pytest.mark.parametrize("kind", ["gfx950", "cpu"])
def test_other_devices_are_named(kind: str) -> None:
    with installed(kind, "fa4"):
        assert kind in str(providers.get("fa4").unavailable(torch.device("cpu")))
