"""FlashInfer, on a stand-in with its wrappers' signatures and checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    with installed("sm90", "flashinfer"):
        yield


@many
@given(call=plainer_calls())
def test_any_call_is_honoured_or_refused(call: Call) -> None:
    honoured_or_refused(call, "flashinfer")


def test_enough_calls_were_honoured() -> None:
    enough_ran("flashinfer")


def step(lengths: tuple[int, int], **changes: Any) -> dict[str, Any]:
    torch.manual_seed(sum(lengths))
    k, v = (torch.randn(6, 16, 2, 64).to(torch.bfloat16) for _ in range(2))
    return {
        "q": torch.randn(2, 1, 4, 64).to(torch.bfloat16),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 5]], dtype=torch.int32),
        "causal": True,
    } | changes


def plan(kwargs: dict[str, Any]) -> headway.Plan:
    return headway.get_scheduler_metadata(
        2, 1, 48, 4, 2, 64, kwargs["cache_seqlens"], page_size=16, causal=True
    )


def planned() -> int:
    return sum(name.endswith(".plan") for name, _ in CALLS)


def test_a_step_is_planned_once_for_all_its_layers() -> None:
    kwargs = step((40, 17))
    schedule = plan(kwargs)
    CALLS.clear()
    for layer in range(4):
        torch.manual_seed(layer)
        other = {n: torch.randn_like(kwargs[n]) for n in ("q", "k_cache", "v_cache")}
        call = Call("kvcache", kwargs | other | {"scheduler_metadata": schedule}, "layer")
        want = Call("kvcache", kwargs | other, "layer").run("reference")
        got = headway.flash_attn_with_kvcache(**call.kwargs, backend="flashinfer")
        torch.testing.assert_close(got, want.out)
    assert planned() == 1
    headway.flash_attn_with_kvcache(
        **kwargs, softcap=3.0, scheduler_metadata=schedule, backend="flashinfer"
    )
    assert planned() == 2, "another softcap is another plan"


def test_a_new_step_and_another_table_are_planned_anew() -> None:
    kwargs = step((40, 17))
    schedule = plan(kwargs)
    CALLS.clear()

    def run() -> None:
        got = headway.flash_attn_with_kvcache(
            **kwargs, scheduler_metadata=schedule, backend="flashinfer"
        )
        torch.testing.assert_close(
            got, headway.flash_attn_with_kvcache(**kwargs, backend="reference")
        )

    run()
    kwargs["page_table"] = kwargs["page_table"].flip(0).contiguous()
    run()
    kwargs["cache_seqlens"].copy_(torch.tensor([3, 48]))
    schedule.new_step()
    run()
    assert planned() == 3


def test_without_a_plan_explain_says_what_that_costs() -> None:
    explanation = headway.explain(
        headway.flash_attn_with_kvcache, **step((40, 17)), backend="flashinfer"
    )
    row = next(row for row in explanation.rows if row.provider == "flashinfer")
    assert "planned on the host" in row.note


def test_lse_is_in_base_e_and_minus_infinity_where_there_is_no_key() -> None:
    call = Call("kvcache", step((40, 0)), "one empty sequence")
    assert_matches(call.run("flashinfer"), call.run("reference"), call)


def test_a_right_window_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a right bound of window_size"):
        headway.flash_attn_with_kvcache(
            **step((40, 17), causal=False), window_size=(3, 3), backend="flashinfer"
        )


def test_where_it_is_not_installed_it_says_what_to_install() -> None:
    with installed("sm90"):
        reason = providers.get("flashinfer").unavailable(torch.device("cpu"))
    assert reason == "package flashinfer-python is not installed (pip install flashinfer-python)"
