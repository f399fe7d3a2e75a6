"""FlashAttention 2 from each of its packages, on stand-ins with their signatures and checks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

import headway
from headway import UnsupportedError, dispatch, providers
from headway.providers import _packages
from tests.calls import Call, assert_matches
from tests.providers.honoured import RAN, REFUSED, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, HERE, installed

#: Packages with the page sizes that tests draw for them.
PACKAGES = {"fa2": (256, 16), "vllm": (16, 24, 64)}


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with installed("sm90", "fa2"):
        yield


@pytest.mark.parametrize("package", PACKAGES)
def test_any_call_is_honoured_or_refused(package: str) -> None:
    RAN.clear()
    REFUSED.clear()

    @many
    @given(call=plainer_calls(page_sizes=PACKAGES[package]))
    def check(call: Call) -> None:
        honoured_or_refused(call, "fa2")

    with installed("sm90", package):
        check()
    assert RAN["fa2"] >= 15, RAN
    assert REFUSED["fa2"] >= 5, REFUSED


def pages(page_size: int, ragged: bool) -> Call:
    torch.manual_seed(0)
    k, v = (torch.randn(4, page_size, 2, 64, dtype=torch.float16) for _ in range(2))
    kwargs = {
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor([page_size + 3, 9], dtype=torch.int32),
        "page_table": torch.tensor([[2, 0], [3, 1]], dtype=torch.int32),
    }
    if ragged:
        kwargs["q"] = torch.randn(5, 4, 64, dtype=torch.float16)
        kwargs["cu_seqlens_q"] = torch.tensor([0, 4, 5], dtype=torch.int32)
    else:
        kwargs["q"] = torch.randn(2, 2, 4, 64, dtype=torch.float16)
    return Call("kvcache", kwargs, "pages")


@pytest.mark.parametrize("ragged", [False, True])
def test_pages_of_256_run_ragged_or_not(ragged: bool) -> None:
    call = pages(256, ragged)
    assert_matches(call.run("fa2"), call.run("reference"), call)


def test_other_pages_are_refused_with_the_rule() -> None:
    with pytest.raises(UnsupportedError, match="page_size=128: takes multiples of 256"):
        pages(128, False).run("fa2")
    with (
        installed("sm90", "vllm"),
        pytest.raises(UnsupportedError, match="page_size=24: takes multiples of 16"),
    ):
        pages(24, False).run("fa2")


@pytest.mark.parametrize("ragged", [False, True])
def test_vllm_s_build_reads_pages_of_16(ragged: bool) -> None:
    call = pages(16, ragged)
    with installed("sm90", "vllm"):
        assert_matches(call.run("fa2"), call.run("reference"), call)
        assert [name for name, _ in CALLS] == ["vllm.flash_attn_varlen_func"]


def test_decode_with_dense_queries_packs_the_heads_of_a_group() -> None:
    """The package does where max_seqlen_q is 1 and no window is given; a causal call needs none."""
    call = pages(256, False)
    call.kwargs["q"] = call.kwargs["q"][:, :1]
    with installed("sm90", "vllm"):
        headway.flash_attn_with_kvcache(**call.kwargs, causal=True, backend="fa2")
        _, arguments = CALLS[0]
    assert arguments["max_seqlen_q"] == 1
    assert arguments["window_size"] == (-1, -1)


def test_ragged_decode_does_not_take_row_i_for_sequence_i() -> None:
    """Sequence 0 has no query, so the row of sequence 1 is the first; the second is padding."""
    call = pages(256, True)
    call.kwargs["q"] = call.kwargs["q"][:2]
    call.kwargs["cu_seqlens_q"] = torch.tensor([0, 0, 1], dtype=torch.int32)
    call.kwargs["max_seqlen_q"] = 1
    for package in PACKAGES:
        with installed("sm90", package):
            assert_matches(call.run("fa2"), call.run("reference"), call)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("padding", [0, 2])
def test_ragged_decode_packs_heads_whoever_has_a_query(
    package: str, lengths: tuple[int, ...], padding: int
) -> None:
    """As dense decode does; rows of padding stay as they were."""
    torch.manual_seed(0)
    k, v = (torch.randn(4, 256, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    table = torch.tensor([[2, 0], [3, 1], [1, 3]], dtype=torch.int32)
    cu_seqlens_q = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    total = sum(lengths) + padding
    kwargs: dict[str, Any] = {
        "q": torch.randn(total, 4, 64, dtype=torch.bfloat16),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor([300, 20, 512], dtype=torch.int32),
        "page_table": table,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": 1,
        "causal": True,
    }
    expected = torch.full((total, 4, 64), 7.0, dtype=torch.bfloat16)
    headway.flash_attn_with_kvcache(**kwargs, out=expected, backend="reference")
    out = torch.full_like(expected, 7.0)
    with installed("sm90", package):
        headway.flash_attn_with_kvcache(**kwargs, out=out, backend="fa2")
        if total:
            assert all(arguments.get("max_seqlen_q", 1) == 1 for _, arguments in CALLS)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"causal": True}, {"window_size": (3, 9)}, {"window_size": (-1, 300)}], ids=str
)
def test_rows_that_see_no_key_are_kept_from_the_pages_kernel(
    package: str, ragged: bool, more: dict[str, Any]
) -> None:
    """A block of 64 of them would write its LSE behind the end of the buffer."""
    torch.manual_seed(0)
    k, v = (torch.randn(4, 256, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    kwargs: dict[str, Any] = {
        "q": torch.randn(3, 200, 4, 64, dtype=torch.bfloat16),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor([0, 300, 5], dtype=torch.int32),
        "page_table": torch.tensor([[9**9, 9**9], [3, 1], [0, -1]], dtype=torch.int32),
    }
    if ragged:
        kwargs["q"] = kwargs["q"].flatten(0, 1)[:270]
        kwargs["cu_seqlens_q"] = torch.tensor([0, 3, 65, 265], dtype=torch.int32)
        kwargs["max_seqlen_q"] = 200
    call = Call("kvcache", kwargs | more, "rows without keys")
    with installed("sm90", package):
        assert_matches(call.run("fa2"), call.run("reference"), call)


@pytest.mark.parametrize(
    ("provider", "package"), [("fa2", "fa2"), ("fa2", "vllm"), ("fa3", "vllm")]
)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("batch_size", "rows"), [(0, 1), (0, 3), (2, 0)])
def test_calls_without_a_query_or_a_sequence_are_answered(
    provider: str, package: str, return_lse: bool, ragged: bool, batch_size: int, rows: int
) -> None:
    """Rows behind the last sequence's are padding, of any content."""
    int32 = {"dtype": torch.int32}
    k, v = (torch.randn(4, 256, 2, 64, dtype=torch.float16) for _ in range(2))
    kwargs: dict[str, Any] = {
        "q": torch.randn(batch_size, rows, 4, 64, dtype=torch.float16),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.full((batch_size,), 9, **int32),  # type: ignore[call-overload]
        "page_table": torch.zeros(batch_size, 1, **int32),  # type: ignore[call-overload]
        "causal": True,
        "return_softmax_lse": return_lse,
    }
    lse_shape: tuple[int, ...] = (batch_size, 4, rows)
    if ragged:
        kwargs["q"] = torch.randn(rows, 4, 64, dtype=torch.float16)
        kwargs["cu_seqlens_q"] = torch.zeros(batch_size + 1, **int32)  # type: ignore[call-overload]
        lse_shape = (4, rows)
    with installed("sm90", package):
        got: Any = headway.flash_attn_with_kvcache(**kwargs, backend=provider)
    out, *lse = got if return_lse else (got,)
    assert out.shape == kwargs["q"].shape
    assert [one.shape for one in lse] == [lse_shape] * return_lse


@pytest.mark.parametrize("package", PACKAGES)
def test_a_right_bound_as_long_as_the_keys_still_hides_some(package: str) -> None:
    """Query 0 of 20 stands 16 rows before the first of 4 keys."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {
        "q": torch.randn(20, 4, 64, dtype=torch.bfloat16),
        "k": torch.randn(4, 2, 64, dtype=torch.bfloat16),
        "v": torch.randn(4, 2, 64, dtype=torch.bfloat16),
        "cu_seqlens_q": torch.tensor([0, 20], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32),
        "max_seqlen_q": 20,
        "max_seqlen_k": 4,
        "window_size": (-1, 6),
    }
    call = Call("varlen", kwargs, "a long right bound")
    with installed("sm90", package):
        assert_matches(call.run("fa2"), call.run("reference"), call)


@pytest.mark.parametrize(
    ("provider", "package"), [("fa2", "fa2"), ("fa2", "vllm"), ("fa3", "vllm"), ("fa3", "sgl")]
)
def test_without_a_key_rows_of_padding_stay_as_they_were(provider: str, package: str) -> None:
    """There the host fills all of the out that it is handed."""
    nothing = torch.empty(0, 2, 64, dtype=torch.bfloat16)
    kwargs: dict[str, Any] = {
        "q": torch.randn(5, 4, 64, dtype=torch.bfloat16),
        "k": nothing,
        "v": nothing,
        "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 0, 0], dtype=torch.int32),
        "max_seqlen_q": 2,
        "max_seqlen_k": 0,
    }
    call = Call("varlen", kwargs, "no keys")
    with installed("sm90", package):
        assert_matches(call.run(provider), call.run("reference"), call)


def test_flash_attn_is_taken_before_vllm_unless_it_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with installed("sm90", "fa2", "vllm"):
        assert providers.get("fa2").package() == ("flash-attn", "version unknown")
        assert "vllm" not in sys.modules
        monkeypatch.setattr(_packages, "_version", {"flash-attn": "2.6.3"}.get)
        dispatch.forget()
        assert providers.get("fa2").package() == ("vllm", "version unknown")
    with installed("sm90", "fa2"):
        reason = providers.get("fa2").unavailable(torch.device("cpu"))
        assert reason is not None
        assert reason.startswith("flash-attn 2.6.3: needs 2.7 or newer")


def test_vllm_without_its_binary_is_no_package(tmp_path: Path) -> None:
    """Builds for other devices have the same files but for the extension module."""
    kept = shutil.ignore_patterns("_vllm_fa2_C.py", "__pycache__")
    shutil.copytree(HERE / "vllm", tmp_path, ignore=kept, dirs_exist_ok=True)
    with installed("sm90"), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        dispatch.forget()
        assert providers.get("fa2").package() is None
        assert providers.get("fa3").package() is not None


def test_empty_rows_have_an_lse_of_minus_infinity() -> None:
    """The package writes +inf there."""
    q, k = torch.randn(1, 5, 2, 64), torch.randn(1, 2, 2, 64)
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    _, lse = headway.flash_attn_func(q, k, k, causal=True, return_lse=True, backend="fa2")
    assert (lse[..., :3] == float("-inf")).all()
    assert lse[..., 3:].isfinite().all()


def test_it_is_told_apart_from_the_other_package_of_its_folder() -> None:
    assert providers.get("fa2").package() is not None
    assert providers.get("fa4").package() is None
    with installed("sm90", "fa4"):
        assert providers.get("fa2").package() is None
        assert providers.get("fa4").package() is not None


def test_hints_are_passed_within_bounds() -> None:
    CALLS.clear()
    call = pages(256, False)
    headway.flash_attn_with_kvcache(**call.kwargs, num_splits=1000, backend="fa2")
    assert len(CALLS) == 1


@pytest.mark.parametrize("kind", ["gfx950", "cpu"])
def test_other_devices_are_named(kind: str) -> None:
    with installed(kind, "fa2"):
        assert kind in str(providers.get("fa2").unavailable(torch.device("cpu")))
    with installed("sm90"):
        assert "pip install flash-attn" in str(
            providers.get("fa2").unavailable(torch.device("cpu"))
        )
