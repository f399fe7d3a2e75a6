"""FlashAttention 2, on a stand-in with its signatures and checks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given

import headway
from headway import UnsupportedError, providers
from tests.calls import Call, assert_matches
from tests.providers.honoured import enough_ran, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with installed("sm90", "fa2"):
        yield


@many
@given(call=plainer_calls(page_sizes=(256, 16)))
def test_any_call_is_honoured_or_refused(call: Call) -> None:
    honoured_or_refused(call, "fa2")


def test_enough_calls_were_honoured() -> None:
    enough_ran("fa2")


def pages(page_size: int, ragged: bool) -> Call:
    torch.manual_seed(0)
    k, v = (torch.randn(4, page_size, 2, 64, dtype=torch.float16) for _ in range(2))
    kwargs = {
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor([page_size + 44, 40], dtype=torch.int32),
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
