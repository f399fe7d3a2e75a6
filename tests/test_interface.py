"""The public signatures, the choice of a provider, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import headway
from headway import InvalidInputError, UnsupportedError
from headway.compat import flash_attn_interface, sgl_kernel

# The parameter names of FlashAttention 3 (hopper/flash_attn_interface.py), in order.
FA3 = {
    "flash_attn_func": "q k v softmax_scale causal qv q_descale k_descale v_descale window_size "
    "attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q "
    "seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "flash_attn_with_kvcache": "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens "
    "cache_batch_idx cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q "
    "rotary_seqlens q_descale k_descale v_descale softmax_scale causal window_size attention_chunk "
    "softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse",
    "flash_attn_combine": "out_partial lse_partial out out_dtype",
    "get_scheduler_metadata": "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim "
    "cache_seqlens qkv_dtype headdim_v cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size "
    "max_seqlen_k_new causal window_size attention_chunk has_softcap num_splits pack_gqa sm_margin",
}
SGL = {
    "flash_attn_with_kvcache": FA3["flash_attn_with_kvcache"].replace(
        "sm_margin return_softmax_lse",
        "only_qv sm_margin return_softmax_lse sinks score_mod aux_tensors ver out",
    ),
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q "
    "seqused_k page_table softmax_scale causal qv q_descale k_descale v_descale window_size "
    "attention_chunk softcap num_splits pack_gqa only_qv sm_margin return_softmax_lse sinks score_mod "
    "aux_tensors ver out",
}


@pytest.mark.parametrize("name", FA3)
def test_parameters_follow_fa3_in_order(name: str) -> None:
    names = FA3[name].split()
    assert list(inspect.signature(getattr(headway, name)).parameters)[: len(names)] == names
    if name != "flash_attn_combine":
        compat = inspect.signature(getattr(flash_attn_interface, name))
        sinks = ["s_aux"] if name in FA3 and name.startswith("flash_attn") else []
        assert (
            list(compat.parameters) == names + sinks
        )  # behind FA3's own, as vLLM's builds have it


@pytest.mark.parametrize("name", SGL)
def test_the_sgl_kernel_module_has_sgl_kernels_signatures(name: str) -> None:
    assert list(inspect.signature(getattr(sgl_kernel, name)).parameters) == SGL[name].split()


def decode_arguments() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.randn(2, 9, 2, 16),
        "v_cache": torch.randn(2, 9, 2, 16),
        "cache_seqlens": torch.tensor([9, 4], dtype=torch.int32),
    }


@pytest.mark.parametrize("module", [flash_attn_interface, sgl_kernel])
def test_compat_modules_return_what_their_originals_return(module: Any) -> None:
    a = decode_arguments()
    out = module.flash_attn_with_kvcache(**a)
    assert isinstance(out, torch.Tensor)
    whole = module.flash_attn_with_kvcache(**a, return_softmax_lse=True)
    assert len(whole) == 4
    assert torch.equal(whole[0], out)
    assert whole[1].shape == (2, 4, 1)


def test_sgl_varlen_takes_pages_and_says_so_by_its_result() -> None:
    torch.manual_seed(0)
    q, cu = torch.randn(3, 4, 16), torch.tensor([0, 1, 3], dtype=torch.int32)
    pages = torch.randn(4, 4, 2, 16)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    used = torch.tensor([5, 7], dtype=torch.int32)
    arguments = {"page_table": table, "seqused_k": used, "causal": True}
    out = sgl_kernel.flash_attn_varlen_func(q, pages, pages, cu, cu, **arguments)
    want = headway.flash_attn_with_kvcache(
        q, pages, pages, cache_seqlens=used, page_table=table, cu_seqlens_q=cu, causal=True
    )
    assert torch.equal(out, want)


def test_lse_is_returned_when_asked_for_by_any_name() -> None:
    q = torch.randn(1, 2, 1, 8)
    for name in ("return_lse", "return_attn_probs", "return_softmax_lse"):
        out, lse = headway.flash_attn_func(q, q, q, **{name: True})
        assert lse.shape == (1, 1, 2)
        assert torch.equal(out, headway.flash_attn_func(q, q, q))


# --- choice ------------------------------------------------------------------------------------------


def test_explain_prints_the_table_and_agrees_with_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explanation = headway.explain(
        headway.flash_attn_with_kvcache, **decode_arguments(), causal=True
    )
    printed = capsys.readouterr().out
    assert explanation.chosen == "cpu"
    assert printed == f"{explanation}\n"
    assert "-> cpu" in printed
    assert {row.provider for row in explanation.rows} == set(headway.providers.NAMES)  # type: ignore


def test_explain_computes_nothing() -> None:
    a = decode_arguments()
    k = torch.ones(2, 1, 2, 16)
    before = a["k_cache"].clone()
    headway.explain(headway.flash_attn_with_kvcache, **a | {"cache_seqlens": 3}, k=k, v=k)
    assert torch.equal(a["k_cache"], before)


def test_backend_pins_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    explanation = headway.explain(headway.flash_attn_func, q, q, q)
    assert explanation.chosen == "reference"
    assert "HEADWAY_BACKEND" in explanation.why
    assert headway.explain(headway.flash_attn_func, q, q, q, backend="cpu").chosen == "cpu"
    monkeypatch.setenv("HEADWAY_BACKEND", "nonsense")
    with pytest.raises(InvalidInputError, match=r"HEADWAY_BACKEND.*nonsense.*reference"):
        headway.flash_attn_func(q, q, q)


def test_an_unusable_version_in_the_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.randn(1, 2, 1, 8)
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "5")
    with pytest.raises(InvalidInputError, match="3 or 4"):
        headway.flash_attn_func(q, q, q)
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "4")
    assert torch.isfinite(headway.flash_attn_func(q, q, q)).all()


def test_a_pinned_backend_that_cannot_raises_with_reason_and_alternatives() -> None:
    q = torch.empty(1, 2, 1, 8, device="meta")
    with pytest.raises(UnsupportedError) as caught:
        headway.flash_attn_func(q, q, q, backend="cpu")
    assert "CPU" in str(caught.value)
    assert "reference" in caught.value.alternatives


# --- importing -----------------------------------------------------------------------------------------


def test_import_is_cheap_and_lazy() -> None:
    code = (
        "import sys, torch, time; start = time.perf_counter(); import headway; "
        "seconds = time.perf_counter() - start; "
        "heavy = [m for m in ('triton', 'transformers', 'fastapi', 'uvicorn', 'numba') "
        "if m in sys.modules]; print(seconds, heavy)"
    )
    for _ in range(3):  # as quick as that once, whatever else the machine does
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, heavy = run.stdout.split(maxsplit=1)
        assert heavy.strip() == "[]"
        if float(seconds) < 0.3:
            break
    assert float(seconds) < 0.3


@pytest.mark.parametrize("name", headway.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(importlib.import_module("headway"), name))


def test_errors_cross_processes() -> None:
    wrong = InvalidInputError("page_table", torch.Size([2]), "(2, any)")
    refused = UnsupportedError("backend=fa3 cannot", {"fa3": ["no GPU"]}, ["cpu"])
    for error in (wrong, refused):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert {**vars(copy)} == {**vars(error)}
