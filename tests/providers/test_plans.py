"""What providers keep in plans belongs to one key: every component of it is shown to be needed.

For each component there are two calls that differ in it alone. Each backend runs both by turns, over
lengths they share, on plans looked up by their keys; the stand-ins notice a schedule that was made for
the other.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import providers
from headway.plan import Plan, PlanKey
from headway.problem import Problem
from tests.calls import FUNCTIONS, Call
from tests.providers.feature_calls import int32
from tests.stand_ins import installed

LENGTHS = int32(40, 17)

#: Kind of device and package for each provider.
INSTALLED = {"mate": ("mp31", "mate"), "flashinfer": ("sm90", "flashinfer")}


def step(
    *,
    heads: tuple[int, int] = (4, 2),
    d: int = 64,
    dv: int = 0,
    page: int = 16,
    capacity: int = 48,
    sq: int = 1,
    new: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Tensor = LENGTHS,
    **more: Any,
) -> Call:
    """One layer's call in a step of two sequences."""
    generator = torch.Generator().manual_seed(1)
    b, pages = len(lengths), capacity // page

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kwargs: dict[str, Any] = {
        "q": normal(b, sq, heads[0], d),
        "k_cache": normal(pages * b, page, heads[1], d),
        "v_cache": normal(pages * b, page, heads[1], dv or d),
        "page_table": torch.arange(pages * b, dtype=torch.int32).view(b, pages),
        "cache_seqlens": lengths,
    }
    if new:
        kwargs |= {"k": normal(b, new, heads[1], d), "v": normal(b, new, heads[1], dv or d)}
    return Call("kvcache", kwargs | more)


def latent(with_qv: bool) -> Call:
    call = step(heads=(16, 1), d=64, dv=512, sq=2, softmax_scale=0.05, causal=True)
    return dataclasses.replace(call, kwargs=call.kwargs | {"qv": _qv()}) if with_qv else call


def _qv() -> Tensor:
    return torch.randn(2, 2, 16, 512, generator=torch.Generator().manual_seed(2)).bfloat16()


@dataclass(frozen=True)
class Pair:
    """Two calls whose keys differ in these components and no others."""

    components: tuple[str, ...]
    first: Call
    second: Call
    provider: str = "mate"

    def __str__(self) -> str:
        return f"{self.provider}-{'-'.join(self.components)}"


def local(left: int, right: int, **more: Any) -> Call:
    return step(window_size=(left, right), **more)


PAIRS = [
    Pair(("batch_size",), step(), step(lengths=int32(40, 17, 3))),
    Pair(("max_seqlen_q",), step(sq=1), step(sq=3)),
    Pair(("max_seqlen_k",), step(), step(capacity=64)),
    Pair(("num_q_heads",), step(), step(heads=(8, 2))),
    Pair(("num_kv_heads",), step(), step(heads=(4, 1))),
    Pair(("head_dim",), step(d=192, dv=128), step(d=128, softmax_scale=1 / math.sqrt(192))),
    Pair(("head_dim_v",), step(d=192, dv=128), step(d=192)),
    Pair(("page_size",), step(), step(page=8)),
    Pair(("causal",), step(sq=3, causal=True), local(-1, 0, sq=3)),
    Pair(("window_left",), local(7, 0, causal=True), local(9, 0, causal=True)),
    Pair(("window_right",), local(9, 3, sq=9), local(9, 5, sq=9)),
    Pair(("attention_chunk",), step(causal=True), step(causal=True, attention_chunk=8)),
    Pair(("q_dtype", "kv_dtype"), step(), step(dtype=torch.float16)),
    Pair(("new_keys",), step(new=1), step(new=2)),
    Pair(("num_splits",), step(), step(num_splits=4)),
    Pair(("pack_gqa",), step(), step(pack_gqa=False)),
    Pair(("sm_margin",), step(), step(sm_margin=2)),
    Pair(("softcap",), step(), step(softcap=3.0)),
    Pair(("has_qv",), latent(True), latent(False)),
    # FlashInfer plans scales, caps and windows into its wrappers.
    Pair(("softmax_scale",), step(), step(softmax_scale=0.5), "flashinfer"),
    Pair(("softcap",), step(softcap=1.0), step(softcap=30.0), "flashinfer"),
    Pair(("window_left",), local(7, -1), local(2, -1), "flashinfer"),
    Pair(("causal", "window_right"), step(sq=3, causal=True), step(sq=3), "flashinfer"),
    Pair(("num_q_heads",), step(), step(heads=(8, 2)), "flashinfer"),
    Pair(("q_dtype", "kv_dtype"), step(), step(dtype=torch.float16), "flashinfer"),
]

#: Components that keep parts apart although no package's schedule shows the difference here, and why.
ELSEWHERE = {
    "device": "a machine without accelerators has one device",
    "ragged_q": "cu_seqlens_q is told apart by its address too",
    "has_sinks": "MATE takes no schedule with sinks, FlashInfer no sinks",
}


class Backend:
    """What an engine holds: plans by key, over lengths of its own."""

    def __init__(self, pair: Pair, shift: int) -> None:
        self.plans: dict[PlanKey, Plan] = {}
        self.provider = providers.get(pair.provider)
        shared: dict[Any, Tensor] = {}
        self.calls = []
        for call in (pair.first, pair.second):
            kwargs = dict(call.kwargs)
            for name in ("cache_seqlens", "page_table"):
                # As in an engine, layers of a step have one tensor for these, not equal ones.
                values = name, str(kwargs[name].tolist())
                kwargs[name] = shared.setdefault(values, kwargs[name].clone())
            self.calls.append(Call(call.function, kwargs))
        self.lengths = [t for (name, _), t in shared.items() if name == "cache_seqlens"]
        for lengths in self.lengths:
            lengths -= shift

    def run_step(self) -> None:
        for lengths in self.lengths:
            lengths -= 1
        for plan in self.plans.values():
            plan.new_step()
        for call in (*self.calls, *self.calls):
            fresh = {
                n: t.clone() if n in ("k_cache", "v_cache") else t for n, t in call.kwargs.items()
            }
            want = FUNCTIONS["kvcache"](**call.copy().kwargs, backend="reference")
            # As an engine does it: the problem was checked when the step was built.
            problem = Call(call.function, fresh).problem()
            key = problem.plan_key
            splits = torch.ones(problem.batch_size, dtype=torch.int32)
            plan = self.plans.setdefault(key, Plan(key, splits))
            got, _ = self.provider.run(dataclasses.replace(problem, plan=plan))
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def run_threads(pairs: list[Pair], threads: int, steps: int = 2) -> list[BaseException]:
    """Each thread drives two backends, turn by turn; the target of an engine and its draft."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def drive(index: int) -> None:
        pair = pairs[index % len(pairs)]
        try:
            backends = Backend(pair, 0), Backend(pair, 1 + index % 2)
            barrier.wait(timeout=60)
            for _ in range(steps):
                for backend in backends:
                    backend.run_step()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=drive, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failures


@pytest.fixture(scope="module", params=INSTALLED)
def pairs(request: pytest.FixtureRequest) -> Iterator[list[Pair]]:
    """The pairs of one provider, which is installed."""
    with installed(*INSTALLED[request.param]):
        yield [pair for pair in PAIRS if pair.provider == request.param]


def test_eight_threads_of_two_backends_never_get_each_others_plans(pairs: list[Pair]) -> None:
    for at in range(0, len(pairs), 8):
        assert run_threads(pairs[at : at + 8], threads=8) == []


def test_without_any_one_component_of_the_key_they_do(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, unnoticed = Problem.plan_key, []
    for pair in pairs:
        neutral = {name: getattr(pair.first.problem().plan_key, name) for name in pair.components}

        def without(problem: Problem, neutral: dict[str, Any] = neutral) -> PlanKey:
            return dataclasses.replace(whole.__get__(problem), **neutral)

        monkeypatch.setattr(Problem, "plan_key", property(without))
        if not run_threads([pair], threads=2, steps=1):
            unnoticed.append(str(pair))
        monkeypatch.setattr(Problem, "plan_key", whole)
    assert unnoticed == []


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_pair_differs_in_its_components_alone(pair: Pair) -> None:
    first, second = (call.problem().plan_key for call in (pair.first, pair.second))
    names = [field.name for field in dataclasses.fields(PlanKey)]
    differing = [name for name in names if getattr(first, name) != getattr(second, name)]
    assert tuple(differing) == pair.components


def test_every_component_has_a_pair_or_a_reason() -> None:
    covered = {name for pair in PAIRS for name in pair.components}
    names = {field.name for field in dataclasses.fields(PlanKey)}
    assert covered | ELSEWHERE.keys() == names
    assert not covered & ELSEWHERE.keys()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PlanKey)])
def test_keys_that_differ_in_one_component_have_parts_of_their_own(name: str) -> None:
    class Part:
        def expire(self) -> None: ...

    key = step().problem().plan_key
    other = dataclasses.replace(key, **{name: "another"})
    plan = Plan(key, torch.ones(2, dtype=torch.int32))
    assert plan.part("one", key, Part) is plan.part("one", dataclasses.replace(key), Part)
    assert plan.part("one", key, Part) is not plan.part("one", other, Part)
    assert plan.part("one", key, Part) is not plan.part("two", key, Part)


def test_the_components_without_a_pair_are_read_off_the_problem() -> None:
    plain, meta = step(), step().copy("meta")
    assert plain.problem().plan_key.device.type == "cpu"
    assert meta.problem().plan_key.device.type == "meta"
    sinks = step(sinks=torch.zeros(4))
    assert sinks.problem().plan_key.has_sinks
    ragged = dict(plain.kwargs)
    ragged |= {"q": ragged["q"].flatten(0, 1), "cu_seqlens_q": int32(0, 1, 2), "max_seqlen_q": 1}
    keys = [call.problem().plan_key for call in (plain, Call("kvcache", ragged))]
    assert [key.ragged_q for key in keys] == [False, True]
    assert dataclasses.replace(keys[1], ragged_q=False) == keys[0]
