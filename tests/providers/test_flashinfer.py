"""FlashInfer, on a stand-in with its wrappers' signatures and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import headway
from headway import UnsupportedError, providers
from headway.plan import Plan
from headway.providers import flashinfer
from headway.serving.flash import FlashAttentionBackend
from tests.calls import Call, assert_matches
from tests.providers import replays
from tests.providers.honoured import enough_ran, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed

CPU = torch.device("cpu")


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


def recorded(new: int, sizes: tuple[int, ...] = (4,)) -> list[replays.Recorded]:
    """Steps as CUDA graphs have them: recording is remembering here, replaying is doing it again."""
    backend, limits = (
        FlashAttentionBackend("flashinfer", fused_append=False),
        replays.limits(new, CPU),
    )
    backend.init_cuda_graph_state(limits)

    def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        function()  # what a graph is captured after
        held = backend._batch, backend._decode

        def replay() -> Tensor:
            backend._batch, backend._decode = held
            return function()

        return replay

    return [replays.Recorded(backend, record, size, limits, head_dim=64) for size in sizes]


@pytest.mark.parametrize("new", [1, 4])
def test_a_captured_step_is_planned_before_each_replay(
    new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (step,) = recorded(new)
    made = [call for name, call in CALLS if name.endswith("Wrapper")][-2:]
    assert all(one["graph"] and one["backend"] == "fa2" for one in made)

    def from_the_device(lengths: Tensor | None) -> None:
        assert lengths is None, "the host knows the lengths"

    monkeypatch.setattr(flashinfer, "_given", from_the_device)
    for before in replays.STEPS:
        CALLS.clear()
        step.assert_replays(before)
        order = [name.rpartition(".")[-1] for name, _ in CALLS]
        assert order == ["plan"] * 2 + ["run"] * 3, (
            "one plan for each kind of layer, then the graph"
        )


def test_lengths_that_the_host_does_not_know_are_read_before_a_replay() -> None:
    (step,) = recorded(1)
    for before in replays.STEPS:
        step.assert_replays(before, known=False)


def test_captured_steps_of_all_sizes_share_their_scratch() -> None:
    CALLS.clear()
    steps = recorded(1, (4, 2, 1))
    made = [call for name, call in CALLS if name.endswith("Wrapper")]
    assert len(made) == 6, "of two kinds of layers each"
    assert len({one["workspace"].data_ptr() for one in made}) == 1
    steps[1].assert_replays((33, 7))
    steps[2].assert_replays((120,))
    steps[0].assert_replays((5, 0, 44, 16))
    steps[1].assert_replays((9,))


def test_a_step_without_a_graph_asks_the_device_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its lengths are known; its layers share one plan for each kind."""
    monkeypatch.delattr(flashinfer, "_given")
    backend, layers = FlashAttentionBackend("flashinfer", fused_append=False), replays.layers(64)
    step = replays.batch((40, 17), 1, CPU, known=True)
    backend.init_forward_metadata(step)
    pages = 2, replays.num_pages(4), replays.PAGE_SIZE, 2, 64
    keys, values = torch.randn(pages).bfloat16()
    CALLS.clear()
    for one in layers * 2:
        q, k, v = (torch.randn(2, heads, 64).bfloat16() for heads in (4, 2, 2))
        backend.forward(q, k, v, (keys, values), one)
    assert planned() == 2


def test_what_is_captured_reads_pages() -> None:
    problem = Call("dense", {n: torch.randn(2, 8, 2, 64).bfloat16() for n in "qkv"}).problem()
    plan = Plan(problem.plan_key, torch.ones(2, dtype=torch.int32), replayed=True)
    with pytest.raises(UnsupportedError, match="page_table"):
        providers.get("flashinfer").run(dataclasses.replace(problem, plan=plan))


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
