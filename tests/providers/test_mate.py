"""MATE, on a stand-in that knows which call each piece of scheduler metadata was made for."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

import headway
from headway import UnsupportedError, providers
from headway.plan import Plan, PlanKey
from headway.problem import Problem
from tests.calls import Call, assert_matches
from tests.providers.honoured import enough_ran, honoured_or_refused, many, plainer_calls
from tests.stand_ins import CALLS, installed


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with installed("mp31", "mate"):
        yield


@many
@given(call=plainer_calls(head_dims=(64, 96, 128)))
def test_any_call_is_honoured_or_refused(call: Call) -> None:
    honoured_or_refused(call, "mate")


@many
@given(call=plainer_calls())
def test_any_call_runs_on_the_metadata_of_its_own_plan(call: Call) -> None:
    """The stand-in recomputes from each call what its metadata must have been made from."""
    mate, problem = providers.get("mate"), call.copy().problem()
    if mate.reasons_against(problem):
        return
    plan = Plan(problem.plan_key, torch.ones(problem.batch_size, dtype=torch.int32))
    CALLS.clear()
    mate.run(dataclasses.replace(problem, plan=plan))
    expects = problem.scores.sinks is None and problem.qv is None
    assert (len(planned()) == 1) == expects
    assert (handed()[-1] is not None) == expects


def test_enough_calls_were_honoured() -> None:
    enough_ran("mate")


def step(
    lengths: tuple[int, ...] = (40, 17),
    heads: int = 4,
    window: tuple[int, int] = (-1, -1),
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """One decode call over pages of 16 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    b = len(lengths)
    return {
        "q": normal(b, 1, heads, 64),
        "k_cache": normal(3 * b, 16, 2, 64),
        "v_cache": normal(3 * b, 16, 2, 64),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": torch.arange(3 * b, dtype=torch.int32).view(b, 3),
        "causal": True,
        "window_size": window,
    } | changes


def plan_for(kwargs: dict[str, Any]) -> Plan:
    b, _, heads, d = kwargs["q"].shape
    return headway.get_scheduler_metadata(
        b,
        1,
        48,
        heads,
        2,
        d,
        kwargs["cache_seqlens"],
        page_size=16,
        causal=kwargs["causal"],
        window_size=kwargs["window_size"],
    )


def run(kwargs: dict[str, Any], plan: Plan | None, **more: Any) -> torch.Tensor:
    return headway.flash_attn_with_kvcache(
        **kwargs, **more, scheduler_metadata=plan, backend="mate"
    )


def planned() -> list[dict[str, Any]]:
    return [a for name, a in CALLS if name == "mate.get_scheduler_metadata"]


def handed() -> list[torch.Tensor | None]:
    return [a["scheduler_metadata"] for name, a in CALLS if "scheduler_metadata" in a]


# --- metadata -----------------------------------------------------------------------------------------


def test_metadata_is_computed_once_per_step_and_stays_where_it_is() -> None:
    kwargs, layers = step(), 3
    plan = plan_for(kwargs)
    CALLS.clear()
    for lengths in ((40, 17), (41, 18), (3, 48)):
        kwargs["cache_seqlens"].copy_(torch.tensor(lengths))
        plan.new_step()
        for layer in range(layers):
            run(kwargs | {"q": step(seed=layer)["q"]}, plan)
    assert len(planned()) == 3
    addresses = {t.data_ptr() for t in handed() if t is not None}
    assert len(addresses) == 1, "a captured graph keeps the address"
    assert len(handed()) == 9


def test_without_a_plan_there_is_no_metadata_and_explain_says_so() -> None:
    CALLS.clear()
    run(step(), None)
    assert planned() == []
    assert handed() == [None]
    problem = Call("kvcache", step()).problem()
    assert "no split-KV" in providers.get("mate").note(problem)


def test_full_and_window_layers_of_one_step_have_their_own() -> None:
    full, local = step(), step(window=(7, 0))
    plans = plan_for(full), plan_for(local)
    CALLS.clear()
    for _ in range(2):
        for kwargs, plan in zip((full, local), plans, strict=True):
            want = headway.flash_attn_with_kvcache(**kwargs, backend="reference")
            torch.testing.assert_close(run(kwargs, plan), want)
    assert len(planned()) == 2
    with pytest.raises(headway.InvalidInputError, match="window_left"):
        run(local, plans[0])


def test_another_call_of_the_same_geometry_gets_metadata_of_its_own() -> None:
    """One plan, two kinds of calls that it serves: nothing crosses over."""
    kwargs = step()
    plan = plan_for(kwargs)
    CALLS.clear()
    for more in ({}, {"num_splits": 4}, {"pack_gqa": False}, {"softcap": 5.0}, {"sm_margin": 2}):
        for _ in range(2):
            run(kwargs, plan, **more)
    half = {n: kwargs[n].half() for n in ("q", "k_cache", "v_cache")}
    run(kwargs | half, plan)
    assert len(planned()) == 6


def test_lengths_of_the_append_are_said_only_with_new_keys() -> None:
    kwargs = step((30, 7))
    plan = plan_for(kwargs)
    new = {n: torch.randn(2, 1, 2, 64).to(torch.bfloat16) for n in "kv"}
    CALLS.clear()
    run(kwargs, plan)
    run(kwargs | new, plan)
    assert [a["max_seqlen_k_new"] for a in planned()] == [0, 1]
    assert all(a["cu_seqlens_k_new"] is None for a in planned())


def test_sinks_drop_the_metadata_and_explain_says_so() -> None:
    kwargs = step(sinks=torch.randn(4).to(torch.bfloat16))
    plan = plan_for(kwargs)
    CALLS.clear()
    want = headway.flash_attn_with_kvcache(**kwargs, backend="reference")
    torch.testing.assert_close(run(kwargs, plan), want)
    assert handed() == [None]
    explanation = headway.explain(
        headway.flash_attn_with_kvcache, **kwargs, scheduler_metadata=plan
    )
    row = next(row for row in explanation.rows if row.provider == "mate")
    assert "no split-KV with sinks" in row.note
    assert explanation.chosen == "mate"


def test_planner_and_kernel_resolve_windows_with_the_same_bound() -> None:
    kwargs = step(window=(7, 0))
    plan = headway.get_scheduler_metadata(
        2, 1, 41, 4, 2, 64, kwargs["cache_seqlens"], page_size=16, causal=True, window_size=(7, 0)
    )
    CALLS.clear()
    run(kwargs, plan, max_seqlen_k=41)
    assert planned()[0]["max_seqlen_k"] == 48
    assert CALLS[-1][1]["max_seqlen_k"] == 48


def test_prepare_fills_the_plan_before_a_graph_is_replayed() -> None:
    kwargs = step()
    plan = plan_for(kwargs)
    problem = Call("kvcache", kwargs | {"scheduler_metadata": plan}).problem()
    CALLS.clear()
    providers.get("mate").prepare(problem)
    assert len(planned()) == 1
    run(kwargs, plan)
    assert len(planned()) == 1


# --- absorbed MLA -------------------------------------------------------------------------------------


def latent(lengths: tuple[int, int] = (40, 17)) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(2, 1, 16, 64).to(torch.bfloat16),
        "qv": torch.randn(2, 1, 16, 512).to(torch.bfloat16),
        "k_cache": torch.randn(6, 16, 1, 64).to(torch.bfloat16),
        "v_cache": torch.randn(6, 16, 1, 512).to(torch.bfloat16),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 5]], dtype=torch.int32),
        "causal": True,
    }


def test_absorbed_mla_equals_the_reference() -> None:
    call = Call("kvcache", latent(), "absorbed MLA")
    assert_matches(call.run("mate"), call.run("reference"), call)


def test_its_workspace_belongs_to_the_plan_and_is_new_to_each_step() -> None:
    kwargs = latent()
    problem = Call("kvcache", kwargs).problem()
    plans = [Plan(problem.plan_key, torch.ones(2, dtype=torch.int32)) for _ in range(2)]
    CALLS.clear()
    for lengths in ((40, 17), (41, 18)):
        kwargs["cache_seqlens"].copy_(torch.tensor(lengths))
        for plan in plans:
            plan.new_step()
            for _ in range(3):
                run(kwargs, plan)
    flags = [initialised for _, initialised in handed()]  # type: ignore[misc]
    assert flags == [False, True, True] * 4
    workspaces = {memory.data_ptr() for memory, _ in handed()}  # type: ignore[misc]
    assert len(workspaces) == 2


def test_what_absorbed_mla_ignores_is_refused() -> None:
    for more in ({"window_size": (3, 0)}, {"softcap": 3.0}, {"attention_chunk": 4}):
        with pytest.raises(UnsupportedError, match="ignores it"):
            run(latent() | more, None)


# --- what MATE would drop -----------------------------------------------------------------------------


def test_float8_and_descales_are_refused() -> None:
    kwargs = step()
    float8 = {n: kwargs[n].to(torch.float8_e4m3fn) for n in ("q", "k_cache", "v_cache")}
    with pytest.raises(UnsupportedError, match="takes bfloat16, float16"):
        run(kwargs | float8, None)


def test_softcap_in_prefill_keeps_away_from_kernels_that_drop_it() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 5, 2, 64).to(torch.bfloat16)
    got = headway.flash_attn_func(q, q, q, softcap=2.0, causal=True, backend="mate")
    want = headway.flash_attn_func(q, q, q, softcap=2.0, causal=True, backend="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["sm90", "gfx950", "cpu"])
def test_other_devices_are_named(kind: str) -> None:
    with installed(kind, "mate"):
        assert kind in str(providers.get("mate").unavailable(torch.device("cpu")))
    with installed("mp31"):
        assert "not installed" in str(providers.get("mate").unavailable(torch.device("cpu")))


# --- two backends, many threads -----------------------------------------------------------------------

#: Kinds of layers that a step mixes: query heads, window, splits asked for, whether softcapped.
LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"window": (7, 0)},
    {"heads": 8},
    {"window": (15, 0), "heads": 8},
    {"num_splits": 3},
    {"softcap": 4.0},
    {"pack_gqa": False},
    {"sm_margin": 1},
)


class Backend:
    """What an engine holds: its own plans, one for each kind of layer, over its own lengths."""

    def __init__(self, seed: int) -> None:
        self.plans: dict[PlanKey, Plan] = {}
        self.seed = seed

    def layer(self, lengths: torch.Tensor, layer: dict[str, Any]) -> None:
        geometry = {n: v for n, v in layer.items() if n in ("window", "heads")}
        hints = {n: v for n, v in layer.items() if n not in geometry}
        kwargs = step(seed=self.seed, **geometry) | {"cache_seqlens": lengths} | hints
        key = Call("kvcache", kwargs).problem().plan_key
        plan = self.plans.setdefault(key, plan_for(kwargs))
        problem = Call("kvcache", kwargs).problem()
        # As an engine does it: the problem was checked when the step was built.
        providers.get("mate").run(dataclasses.replace(problem, plan=plan))

    def run_step(self, lengths: tuple[int, int]) -> None:
        tensor = torch.tensor(lengths, dtype=torch.int32)
        for plan in self.plans.values():
            plan.new_step()
        for layer in LAYERS:
            for _ in range(2):
                self.layer(tensor, layer)


def run_threads(threads: int = 8, steps: int = 4) -> list[BaseException]:
    """Each thread drives a target and a draft backend, turn by turn, with lengths of their own."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def drive(index: int) -> None:
        try:
            backends = Backend(index), Backend(index + 100)
            barrier.wait()
            for n in range(steps):
                backends[0].run_step((1 + index + n, 40 - n))
                backends[1].run_step((30 - index, 5 + n))
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=drive, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failures


def test_no_plan_reaches_the_wrong_call() -> None:
    assert run_threads() == []


@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("window_left", None),
        ("num_q_heads", 0),
        ("num_splits", 0),
        ("softcap", 0.0),
        ("pack_gqa", None),
        ("sm_margin", 0),
    ],
)
def test_without_one_component_of_the_key_it_does(
    monkeypatch: pytest.MonkeyPatch, component: str, value: Any
) -> None:
    whole = Problem.plan_key.__get__

    def without(problem: Problem) -> PlanKey:
        return dataclasses.replace(whole(problem), **{component: value})

    monkeypatch.setattr(Problem, "plan_key", property(without))
    failures = run_threads(threads=2, steps=1)
    assert failures
    assert all("scheduler metadata of another call" in str(f) for f in failures), failures
