"""FlashAttention 3 from each of its packages, on stand-ins with their signatures and checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import headway
from headway import UnsupportedError, dispatch, providers
from headway.providers import fa3
from headway.providers.base import Feature
from tests.calls import Call, assert_matches
from tests.providers.honoured import RAN, REFUSED, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed

PACKAGES = {
    "sgl": "sglang-kernel",
    "fa3": "flash_attn_3",
    "fa3_fwd": "fa3-fwd",
    "vllm": "vllm",
}


@pytest.mark.parametrize(
    ("kind", "package"),
    [("sm90", package) for package in PACKAGES]
    + [("sm80", package) for package in PACKAGES if package != "vllm"],
)
def test_any_call_is_honoured_or_refused(package: str, kind: str) -> None:
    RAN.clear()
    REFUSED.clear()

    @many
    @given(call=plainer_calls())
    def check(call: Call) -> None:
        honoured_or_refused(call, "fa3")

    with installed(kind, package):
        check()
    assert RAN["fa3"] >= 10, RAN
    assert REFUSED["fa3"] >= 10, REFUSED


def cached(new: int = 0, **changes: Any) -> Call:
    torch.manual_seed(0)
    k, v = (torch.randn(6, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    kwargs: dict[str, Any] = {
        "q": torch.randn(2, 3, 4, 64, dtype=torch.bfloat16),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor([20, 9], dtype=torch.int32),
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 5]], dtype=torch.int32),
        "causal": True,
    }
    if new:
        kwargs["k"] = torch.randn(2, new, 2, 64, dtype=torch.bfloat16)
        kwargs["v"] = torch.randn(2, new, 2, 64, dtype=torch.bfloat16)
    return Call("kvcache", kwargs | changes, "cached")


@pytest.mark.parametrize("package", ["sgl", "fa3"])
def test_pages_go_through_the_function_that_reads_them(package: str) -> None:
    """sgl_kernel's varlen function accepts a page_table and passes on none."""
    call = cached(new=2)
    with installed("sm90", package):
        assert_matches(call.run("fa3"), call.run("reference"), call)
        assert [name.rpartition(".")[2] for name, _ in CALLS] == ["flash_attn_with_kvcache"]


def test_the_callers_out_is_handed_to_packages_that_take_one() -> None:
    call = cached()
    out = torch.empty(2, 3, 4, 64, dtype=torch.bfloat16)
    for package, taken in (("sgl", True), ("fa3", False)):
        with installed("sm90", package):
            got = headway.flash_attn_with_kvcache(**call.kwargs, out=out, backend="fa3")
            assert got is out
            assert (CALLS[0][1].get("out") is out) == taken


def test_sinks_have_another_name_in_each_fork() -> None:
    sinks = torch.randn(4).to(torch.bfloat16)
    want = cached(sinks=sinks).kwargs
    expected = headway.flash_attn_with_kvcache(**want, backend="reference")
    with installed("sm90", "sgl"):
        got = headway.flash_attn_with_kvcache(**want, backend="fa3")
        torch.testing.assert_close(got, expected)
        assert CALLS[0][1]["sinks"] is sinks
    with installed("sm90", "fa3"), pytest.raises(UnsupportedError, match="sinks: this build"):
        headway.flash_attn_with_kvcache(**want, backend="fa3")


def test_a_build_says_what_was_left_out_of_it() -> None:
    with installed("sm90", "fa3_fwd"):
        can = providers.get("fa3").capabilities(torch.device("cpu"))
        assert not {Feature.WINDOW, Feature.CHUNK} & can.features
        assert (torch.float16, torch.float16) not in can.dtypes
        reasons = providers.get("fa3").reasons_against(cached().copy().problem())
        assert any("page_table" in reason for reason in reasons)
        reasons = providers.get("fa3").reasons_against(cached(window_size=(4, 0)).copy().problem())
        assert any("without local attention" in reason for reason in reasons)


def test_absorbed_mla_and_float8_go_where_their_kernels_are() -> None:
    torch.manual_seed(0)
    kwargs = {
        "q": torch.randn(2, 1, 16, 64, dtype=torch.bfloat16),
        "qv": torch.randn(2, 1, 16, 512, dtype=torch.bfloat16),
        "k_cache": torch.randn(5, 64, 1, 64, dtype=torch.bfloat16),
        "v_cache": torch.randn(5, 64, 1, 512, dtype=torch.bfloat16),
        "cache_seqlens": torch.tensor([100, 64], dtype=torch.int32),
        "page_table": torch.tensor([[3, 1], [0, 0]], dtype=torch.int32),
    }
    latent = Call("kvcache", kwargs, "absorbed MLA")
    float8 = cached()
    for name in ("q", "k_cache", "v_cache"):
        float8.kwargs[name] = float8.kwargs[name].to(torch.float8_e4m3fn)
        float8.kwargs[f"{name[0]}_descale"] = torch.rand(2, 2) + 0.5
    for call in (latent, float8):
        with installed("sm90", "sgl"):
            assert_matches(call.run("fa3"), call.run("reference"), call)
        with installed("sm80", "sgl"), pytest.raises(UnsupportedError):
            call.run("fa3")


def test_narrow_float8_heads_with_wider_values_are_refused() -> None:
    """FlashAttention 3 checks these dims, then runs the kernel for 64 / 64."""
    call = cached()
    kwargs = {n: t.to(torch.float8_e4m3fn) for n, t in call.kwargs.items() if n in ("q", "k_cache")}
    wide = torch.randn(6, 16, 2, 128).to(torch.float8_e4m3fn)
    with installed("sm90", "sgl"), pytest.raises(UnsupportedError, match="head_dim=64/128"):
        headway.flash_attn_with_kvcache(**call.kwargs | kwargs | {"v_cache": wide}, backend="fa3")


def test_an_lse_over_no_keys_is_minus_infinity() -> None:
    q = torch.randn(3, 2, 64, dtype=torch.bfloat16)
    none = torch.empty(0, 2, 64, dtype=torch.bfloat16)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3], [0, 0, 0]))
    with installed("sm90", "fa3"):
        out, lse = headway.flash_attn_varlen_func(
            q, none, none, cu_q, cu_k, 2, 0, return_lse=True, backend="fa3"
        )
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_vllm_s_build_has_code_for_sm90_alone() -> None:
    with installed("sm80", "vllm"):
        reason = providers.get("fa3").unavailable(torch.device("cpu"))
        assert reason is not None
        assert "sm90 alone" in reason


@pytest.mark.parametrize("package", PACKAGES)
def test_splits_stay_within_the_packages_bounds(package: str) -> None:
    with installed("sm90", package):
        call = cached(cu_seqlens_q=torch.tensor([0, 3, 6], dtype=torch.int32), max_seqlen_q=3)
        call.kwargs["q"] = call.kwargs["q"].flatten(0, 1)
        if package == "fa3_fwd":  # has no pages
            del call.kwargs["page_table"]
            for name in ("k_cache", "v_cache"):
                call.kwargs[name] = call.kwargs[name].flatten(0, 1).view(2, 48, 2, 64)
        headway.flash_attn_with_kvcache(**call.kwargs, num_splits=1000, backend="fa3")
        assert CALLS[0][1]["num_splits"] <= 256


def test_dense_queries_over_pages_are_ragged_ones_for_vllm() -> None:
    """Of equal lengths; the caller's out is written in place where it is contiguous, else copied into."""
    call = cached()
    expected = call.run("reference")
    with installed("sm90", "vllm"):
        assert_matches(call.run("fa3"), expected, call)
        assert CALLS[0][1]["cu_seqlens_q"].tolist() == [0, 3, 6]
        for apart in (False, True):
            memory = torch.zeros(2, 6, 4, 64, dtype=torch.bfloat16)
            out = memory[:, ::2] if apart else memory[:, :3].contiguous()
            got, lse = headway.flash_attn_with_kvcache(
                **call.kwargs, out=out, return_lse=True, backend="fa3"
            )
            assert got is out
            torch.testing.assert_close(got, expected.out)
            assert lse.shape == (2, 4, 3)
            assert (memory[:, 1::2] == 0).all() or not apart


def test_where_nothing_is_installed_it_says_what_to_install() -> None:
    with installed("sm90"):
        reason = providers.get("fa3").unavailable(torch.device("cpu"))
        assert reason is not None
        assert all(name in reason for name in PACKAGES.values())
        assert "pip install" in reason


@pytest.mark.parametrize("kind", ["sm100", "gfx950", "mp31", "cpu"])
def test_other_devices_are_named(kind: str) -> None:
    with installed(kind, "sgl"):
        reason = providers.get("fa3").unavailable(torch.device("cpu"))
        assert reason is not None
        assert kind in reason


def test_the_package_with_most_arguments_is_taken() -> None:
    with installed("sm90", "fa3_fwd", "sgl", "fa3"):
        package = providers.get("fa3").package()
    assert package == ("sglang-kernel", "version unknown")


def test_finding_packages_imports_none() -> None:
    import sys

    with installed("sm90", *PACKAGES):
        assert fa3._installed() is not None
        providers.get("fa3").reasons_against(cached().copy().problem())
        roots = {package.module.split(".")[0] for package in fa3.PACKAGES}
        assert not roots & set(sys.modules)


def test_a_package_that_does_not_import_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(
        "raise OSError('libcudart.so.99: not found')\n\n"
        "def flash_attn_varlen_func(q, return_attn_probs=False):\n    pass\n\n"
        "def flash_attn_with_kvcache(q, softcap=0.0):\n    pass\n"
    )
    call = cached()
    with installed("sm90"):
        monkeypatch.syspath_prepend(str(tmp_path))
        dispatch.forget()
        with pytest.raises(UnsupportedError, match=r"fails to import: OSError: libcudart.so.99"):
            call.run("fa3")
        explanation = headway.explain(headway.flash_attn_with_kvcache, **call.kwargs, ver=3)
        assert explanation.chosen != "fa3"
