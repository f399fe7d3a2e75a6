"""aiter, on a stand-in with its signatures, that executes the work lists it is handed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

import headway
from headway import InvalidInputError, UnsupportedError, providers
from headway.plan import Plan
from headway.providers import aiter
from tests.calls import Call
from tests.providers.honoured import enough_ran, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with installed("gfx950", "aiter"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiter, "_compute_units", lambda device: 24)
        yield


@many
@given(call=plainer_calls())
def test_any_call_is_honoured_or_refused(call: Call) -> None:
    honoured_or_refused(call, "aiter")


def test_enough_calls_were_honoured() -> None:
    enough_ran("aiter")


def offsets(*lengths: int) -> torch.Tensor:
    ends = torch.cumsum(torch.tensor(lengths), 0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def prefill(
    q_lens: tuple[int, ...], k_lens: tuple[int, ...], heads: int = 8, causal: bool = True
) -> dict[str, Any]:
    torch.manual_seed(heads)
    total_q, total_k = sum(q_lens), sum(k_lens)
    shapes = {"q": (total_q, heads, 192), "k": (total_k, heads, 192), "v": (total_k, heads, 128)}
    tensors = {n: torch.randn(s).to(torch.float8_e4m3fn) for n, s in shapes.items()}
    scales = {f"{n}_descale": torch.rand(1, 1).expand(len(q_lens), heads) + 0 for n in "qkv"}
    scales = {n: s[:1, :1].expand(len(q_lens), heads) for n, s in scales.items()}
    lengths = {
        "cu_seqlens_q": offsets(*q_lens),
        "cu_seqlens_k": offsets(*k_lens),
        "max_seqlen_q": max(q_lens),
        "max_seqlen_k": max(k_lens),
    }
    return {**tensors, **scales, **lengths, "causal": causal}


def expected(kwargs: dict[str, Any]) -> torch.Tensor:
    return headway.flash_attn_varlen_func(**kwargs, backend="reference")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [8, 24, 48])
def test_float8_mla_prefill_equals_the_reference(heads: int, causal: bool) -> None:
    """Heads are padded to the next number that kernels exist for, by tiling."""
    kwargs = prefill((300, 1, 70), (700, 40, 70), heads, causal)
    got = headway.flash_attn_varlen_func(**kwargs, backend="aiter")
    torch.testing.assert_close(got, expected(kwargs), atol=2e-2, rtol=2e-2)
    asm = next(a for name, a in CALLS[::-1] if name == "aiter.mla_prefill_ps_asm_fwd")
    assert asm["Q"].shape[1] == {8: 8, 24: 32, 48: 64}[heads]
    assert asm["softmax_scale"] == pytest.approx(192**-0.5)


@pytest.mark.parametrize("heads", [8, 12])
def test_rows_of_no_request_stay_as_they_are(heads: int) -> None:
    """Also where its kernels compute more heads, in memory of their own."""
    kwargs = prefill((70, 3), (70, 3), heads)
    want = expected(kwargs)
    kwargs["q"] = torch.cat((kwargs["q"], kwargs["q"][:2]))
    out = torch.full((75, heads, 128), 7.0, dtype=torch.bfloat16)
    assert headway.flash_attn_varlen_func(**kwargs, out=out, backend="aiter") is out
    torch.testing.assert_close(out[:73], want.to(out.dtype), atol=2e-2, rtol=2e-2)
    assert (out[73:] == 7).all()


def test_a_step_has_one_work_list() -> None:
    kwargs = prefill((300, 70), (300, 700))
    problem = Call("varlen", kwargs).problem()
    schedule = Plan(problem.plan_key, torch.ones(2, dtype=torch.int32))
    CALLS.clear()
    for _ in range(3):
        got = headway.flash_attn_varlen_func(**kwargs, scheduler_metadata=schedule, backend="aiter")
        torch.testing.assert_close(got, expected(kwargs), atol=2e-2, rtol=2e-2)
    lists = [a["work_info_set"] for name, a in CALLS if name == "aiter.mla_prefill_ps_asm_fwd"]
    assert len({w.data_ptr() for w in lists}) == 1
    schedule.new_step()
    headway.flash_attn_varlen_func(**kwargs, scheduler_metadata=schedule, backend="aiter")
    assert CALLS[-2][1]["work_info_set"].data_ptr() != lists[0].data_ptr()


def test_more_queries_than_keys_are_refused_when_causal() -> None:
    """aiter's planner makes no items for such rows: they would stay unwritten."""
    with pytest.raises(InvalidInputError, match="9 query tokens and 4 keys"):
        headway.flash_attn_varlen_func(**prefill((9,), (4,)), backend="aiter")


def test_descales_that_vary_are_refused_with_the_way_out() -> None:
    kwargs = prefill((9,), (40,)) | {"k_descale": torch.rand(1, 8)}
    with pytest.raises(UnsupportedError, match=r"expand\(\) a scalar"):
        headway.flash_attn_varlen_func(**kwargs, backend="aiter")


def test_too_many_heads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="160 query heads: takes up to 128"):
        headway.flash_attn_varlen_func(**prefill((3,), (4,), heads=160), backend="aiter")


def test_gfx942_has_no_float8_prefill() -> None:
    with installed("gfx942", "aiter"), pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        headway.flash_attn_varlen_func(**prefill((9,), (40,)), backend="aiter")


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [8, 16, 40])
def test_absorbed_decode_equals_the_reference(heads: int, page_size: int) -> None:
    torch.manual_seed(heads)
    pages = 160 // page_size
    cache = torch.randn(pages + 3, page_size, 1, 576).to(torch.bfloat16)
    lengths = torch.tensor([70, 0, 33], dtype=torch.int32)
    width = -(-80 // page_size)
    table = torch.randint(0, pages, (3, width), dtype=torch.int32)
    kwargs = {
        "q": torch.randn(3, 2, heads, 576).to(torch.bfloat16),
        "k_cache": cache,
        "v_cache": cache[..., :512],
        "cache_seqlens": lengths,
        "page_table": table,
        "causal": True,
    }
    got = headway.flash_attn_with_kvcache(**kwargs, backend="aiter")
    want = headway.flash_attn_with_kvcache(**kwargs, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_a_window_of_nothing_is_refused() -> None:
    """Its kernels for wide heads take 0 for unbounded."""
    q = torch.randn(1, 4, 2, 128).to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="read 0 as unbounded"):
        headway.flash_attn_func(q, q, q, window_size=(0, 0), backend="aiter")


@pytest.mark.parametrize("kind", ["sm90", "cpu"])
def test_other_devices_are_named(kind: str) -> None:
    with installed(kind, "aiter"):
        assert kind in str(providers.get("aiter").unavailable(torch.device("cpu")))
    with installed("gfx950"):
        assert "pip install amd-aiter" in str(
            providers.get("aiter").unavailable(torch.device("cpu"))
        )
