"""The choice of a provider: in which order, remembered how, asked for by whom, and at what cost."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import headway
from headway import InvalidInputError, UnsupportedError, devices, dispatch, providers
from headway.problem import Problem
from headway.providers import order
from headway.providers.base import kind_of
from tests.calls import Call
from tests.providers import feature_calls
from tests.stand_ins import DEVICES, installed

CPU = torch.device("cpu")

#: Every package that a device kind can have at once.
ALL = {
    "sm80": ("fa2", "sgl", "flashinfer"),
    "sm90": ("fa2", "sgl", "flashinfer"),
    "sm100": ("fa4", "flashinfer"),
    "sm120": ("fa4", "flashinfer"),
    "gfx942": ("aiter",),
    "gfx950": ("aiter",),
    "mp31": ("mate",),
}


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And no GPU: kernels that run on a CPU only to be tested are no choice here."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("HEADWAY_BACKEND", raising=False)
    monkeypatch.delenv("HEADWAY_FLASH_ATTN_VERSION", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def problem(name: str = "dense causal", **changes: Any) -> Problem:
    return dataclasses.replace(feature_calls.named(name).problem(), **changes)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that can run the portable kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


# --- order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["prefill", "decode"])
@pytest.mark.parametrize("kind", DEVICES)
def test_every_device_has_one_order_and_headways_kernels_in_it(kind: str, work: order.Work) -> None:
    row = order.order_for(kind, work)
    assert row is not None
    assert len(set(row.providers)) == len(row.providers)
    known = [name for name in row.providers if name in providers.NAMES]
    own = [name for name in known if not providers.get(name).is_package]
    assert kind == "mp31" or own[:1] == known[:1], "packages keep fewer promises: they come after"


@pytest.mark.parametrize("kind", ALL)
def test_the_first_in_order_that_can_is_chosen(kind: str) -> None:
    """Dense tensors without lengths: nothing lies behind the last key, so nothing counts but the order."""
    call = problem()
    with installed(kind, *ALL[kind]):
        row = order.order_for(kind, "prefill")
        assert row is not None
        able = [n for n in row.providers if not providers.get(n).reasons_against(call)]
        assert dispatch.choose(call).name == able[0]
        assert list(dispatch.candidates(call, None)) == list(row.providers)


def test_packages_that_need_finite_tails_come_after_all_others() -> None:
    with installed("sm90", "fa2", "sgl", "flashinfer"):
        assert dispatch.choose(problem("dense causal")).name == "fa3"
        assert dispatch.choose(problem("pages of 256, ragged queries")).name == "fa2"
        explanation = dispatch.explain(problem("pages of 256, ragged queries"))
        notes = {row.provider: row.note for row in explanation.rows}
        assert dispatch.TAILS in notes["fa3"]
        assert dispatch.TAILS not in notes["fa2"]
    with installed("sm90", "sgl"):
        assert dispatch.choose(problem("pages of 256, ragged queries")).name == "fa3"


def test_an_import_that_fails_is_a_reason_and_the_next_one_runs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("sm90", "fa2"):
        text = (
            "def flash_attn_with_kvcache(q, k_cache, v_cache, qv=None, q_descale=None):\n    pass\n"
        )
        text += "\ndef flash_attn_varlen_func(q, k, v, seqused_q=None):\n    pass\n"
        (tmp_path / "flash_attn_interface.py").write_text(text + "raise OSError('libcudart')\n")
        monkeypatch.syspath_prepend(tmp_path)
        dispatch.forget()
        assert dispatch.choose(problem()).name == "fa2"
        rows = {row.provider: row for row in dispatch.explain(problem()).rows}
        assert "fails to import: OSError: libcudart" in rows["fa3"].reasons[0]


def test_the_reference_runs_only_by_name() -> None:
    with installed("mp31"), pytest.raises(UnsupportedError) as caught:
        dispatch.choose(problem())
    assert "reference" not in caught.value.reasons
    assert "reference" in caught.value.alternatives
    assert dispatch.choose(problem(backend="reference")).name == "reference"


# --- remembered choices ---------------------------------------------------------------------------------


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were chosen for anew."""
    seen: list[Problem] = []
    whole = dispatch._choose

    def counted(call: Problem) -> providers.Provider:
        seen.append(call)
        return whole(call)

    monkeypatch.setattr(dispatch, "_choose", counted)
    return seen


def test_a_kind_of_call_is_chosen_for_once(choices: list[Problem]) -> None:
    for lengths in (feature_calls.LENGTHS, (9000, 1, 2, 3), (64,)):
        call = feature_calls.pages(64, lengths=lengths).problem()
        assert dispatch.choose(call) is providers.get("cpu")
    assert len(choices) == 1
    dispatch.forget()
    dispatch.choose(call)
    assert len(choices) == 2


@pytest.mark.parametrize(
    "other",
    [
        "dense full",
        "dense causal window",
        "dense softcap",
        "dense sinks",
        "dense chunk",
        "dense score_mod",
        "dense mask_mod",
        "dense head_dim 128",
        "dense head_dim 192/128",
        "dense of one head",
        "dense float16",
        "dense float8",
        "ragged causal",
        "pages of 64, causal",
    ],
)
def test_another_kind_of_call_is_chosen_for_anew(other: str, choices: list[Problem]) -> None:
    dispatch.choose(problem())
    dispatch.choose(problem(other))
    assert len(choices) == 2


@pytest.mark.parametrize(
    "change", [{"return_lse": True}, {"backend": "reference"}, {"ver": 3}, {"ver": 4}], ids=str
)
def test_what_is_asked_for_is_part_of_the_choice(
    change: dict[str, Any], choices: list[Problem]
) -> None:
    dispatch.choose(problem())
    dispatch.choose(problem(**change))
    assert len(choices) == 2


def test_the_environment_is_looked_at_on_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose(problem()).name == "cpu"
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    assert dispatch.choose(problem()).name == "reference"
    monkeypatch.setenv("HEADWAY_BACKEND", "auto")
    assert dispatch.choose(problem()).name == "cpu"
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "5")
    with pytest.raises(InvalidInputError, match="3 or 4"):
        dispatch.choose(problem())


def test_refusals_are_not_remembered_as_choices() -> None:
    call = problem(backend="fa3")
    with pytest.raises(UnsupportedError):
        dispatch.choose(call)
    with installed("sm90", "sgl"):
        assert dispatch.choose(call).name == "fa3"
    with pytest.raises(UnsupportedError):
        dispatch.choose(call)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST_CHOICES", 3)
    for d in range(8, 80, 8):
        dispatch.choose(feature_calls.dense(d).problem())
        assert len(dispatch._CHOSEN) <= 3


@pytest.mark.parametrize("kind", ALL)
def test_two_calls_of_a_kind_get_the_same_answers(kind: str) -> None:
    """What lets a choice be remembered: no provider looks at more than the kind."""
    by_kind: dict[Any, list[Problem]] = {}
    for _, call in feature_calls.each():
        whole = call.problem()
        for one in (whole, _one_sequence(call), dataclasses.replace(whole, return_lse=True)):
            by_kind.setdefault(kind_of(one), []).append(one)
    assert sum(len(alike) > 1 for alike in by_kind.values()) > 50
    with installed(kind, *ALL[kind]):
        for name in providers.NAMES:
            for alike in by_kind.values():
                answers = {tuple(providers.get(name).reasons_against(one)) for one in alike}
                assert len(answers) == 1, (name, answers)


def _one_sequence(call: Call) -> Problem:
    """The same with the first sequence alone, where that is a matter of slicing."""
    kwargs = dict(call.kwargs)
    if call.function == "dense":
        kwargs |= {n: kwargs[n][:1] for n in ("q", "k", "v", "qv") if n in kwargs}
        kwargs |= {n: t[:1] for n, t in kwargs.items() if n.endswith("_descale")}
    elif "cache_seqlens" in kwargs and not {"cu_seqlens_q", "rotary_seqlens"} & kwargs.keys():
        rows = ("q", "qv", "k", "v", "page_table", "cache_seqlens", "cache_leftpad")
        kwargs |= {n: kwargs[n][:1] for n in rows if kwargs.get(n) is not None}
        kwargs |= {n: t[:1] for n, t in kwargs.items() if n.endswith("_descale")}
        if "page_table" not in kwargs and "cache_batch_idx" not in kwargs:
            kwargs |= {n: kwargs[n][:1] for n in ("k_cache", "v_cache")}
        if "cache_batch_idx" in kwargs:
            kwargs["cache_batch_idx"] = kwargs["cache_batch_idx"][:1]
            if "page_table" in kwargs:
                kwargs["page_table"] = call.kwargs["page_table"]
    return Call(call.function, kwargs).problem()


def test_threads_may_choose_at_once() -> None:
    calls = [feature_calls.dense(8 * n).problem() for n in range(1, 9)]
    found: list[set[str]] = [set() for _ in range(8)]
    barrier = threading.Barrier(8)

    def run(index: int) -> None:
        barrier.wait()
        for _ in range(50):
            found[index].update(dispatch.choose(call).name for call in calls)
            if index == 0:
                dispatch.forget()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"cpu"}] * 8


# --- ver=, backend=, environment --------------------------------------------------------------------------


def test_a_pinned_backend_runs_or_says_why_and_what_would() -> None:
    with installed("sm90", "fa2", "sgl"):
        assert dispatch.choose(problem(backend="fa2")).name == "fa2"
        with pytest.raises(UnsupportedError) as caught:
            dispatch.choose(problem("dense sinks", backend="fa2"))
    assert set(caught.value.reasons) == {"fa2"}
    assert any(reason.startswith("sinks") for reason in caught.value.reasons["fa2"])
    assert "fa3" in caught.value.alternatives
    assert "backend=fa2 cannot run this call" in str(caught.value)


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "fa4")
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "4")
    assert dispatch.choose(problem(backend="reference")).name == "reference"
    assert dispatch.choose(problem(backend="auto")).name == "cpu"
    with installed("sm90", "sgl"):
        assert dispatch.choose(problem(backend="auto", ver=3)).name == "fa3"


@pytest.mark.parametrize("value", ["warp", "FA3", "3"])
def test_an_unusable_backend_is_an_error_naming_the_usable_ones(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 2, 1, 8)
    headway.flash_attn_func(q, q, q)  # a remembered choice does not hide it
    for backend, source in ((value, "backend"), (None, "HEADWAY_BACKEND")):
        if backend is None:
            monkeypatch.setenv("HEADWAY_BACKEND", value)
        with pytest.raises(InvalidInputError) as caught:
            headway.flash_attn_func(q, q, q, backend=backend)
        assert str(caught.value).startswith(f"{source}: got '{value}'")
        assert all(name in str(caught.value) for name in ("auto", *providers.NAMES))


@pytest.mark.parametrize("value", ["5", "2", "v3", "4.0", " "])
def test_an_unusable_version_is_an_error_naming_the_usable_ones(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 2, 1, 8)
    headway.flash_attn_func(q, q, q)
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", value)
    with pytest.raises(InvalidInputError, match=r"HEADWAY_FLASH_ATTN_VERSION.*want 3 or 4"):
        headway.flash_attn_func(q, q, q)
    with pytest.raises(InvalidInputError, match=r"ver: got 5; want 3, 4"):
        headway.flash_attn_func(q, q, q, ver=5)  # type: ignore[arg-type]


def test_an_empty_variable_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "")
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "")
    assert dispatch.choose(problem()).name == "cpu"


@pytest.mark.parametrize(("ver", "runs"), [(3, "fa3"), (4, "fa4")])
def test_a_version_is_its_own_packages_first(ver: int, runs: str, own_kernels: None) -> None:
    call = problem(ver=ver)
    with installed("sm90", "fa4", "sgl"):
        assert dispatch.choose(call).name == runs
        assert dispatch.explain(call).why == f"ver={ver}: the generation's own package"
    with installed("sm90", "fa4" if ver == 3 else "sgl"):
        assert dispatch.choose(call).name == "portable", "never the other generation's package"
        rows = {row.provider: row for row in dispatch.explain(call).rows}
        assert f"not asked: ver={ver}" in rows["fa4" if ver == 3 else "fa3"].note


def _refused_by_fa4() -> Call:
    """In-place append, rotary and descales at once: what FlashAttention 4 has none of."""
    call = feature_calls.rows(2, new=2)
    angle = torch.rand(400, 16)
    call.kwargs |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    return feature_calls.in_float8(call, ("k_cache", "v_cache"))


def test_what_fa4_refuses_runs_on_headways_kernels_and_explain_says_so(own_kernels: None) -> None:
    call = dataclasses.replace(_refused_by_fa4().problem(), ver=4)
    with installed("sm90", "fa4"):
        assert dispatch.choose(call).name == "portable"
        explanation = dispatch.explain(call)
    assert explanation.chosen == "portable"
    assert explanation.why.startswith("ver=4 runs on Headway's own kernels, which cover it (fa4: ")
    for argument in ("append to the cache", "rotary_cos / rotary_sin", "q_descale / k_descale"):
        assert argument in explanation.why


def test_fa4_by_name_refuses_it_with_three_reasons_and_the_alternatives(own_kernels: None) -> None:
    call = dataclasses.replace(_refused_by_fa4().problem(), backend="fa4")
    with installed("sm90", "fa4"), pytest.raises(UnsupportedError) as caught:
        dispatch.choose(call)
    text = "; ".join(caught.value.reasons["fa4"])
    for argument in ("append to the cache", "rotary_cos / rotary_sin", "q_descale / k_descale"):
        assert argument in text
    assert {"portable", "reference"} <= set(caught.value.alternatives)


# --- explain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense causal", "pages of 64, softcap", "dense float8"])
@pytest.mark.parametrize("kind", ALL)
def test_explain_tells_what_choose_does(kind: str, name: str) -> None:
    call = problem(name)
    with installed(kind, *ALL[kind]):
        try:
            chosen = dispatch.choose(call).name
        except UnsupportedError as error:
            chosen = None
            said = error.reasons
        explanation = dispatch.explain(call)
        assert explanation.chosen == chosen
        assert [row.provider for row in explanation.rows] == list(providers.NAMES)
        for row in explanation.rows:
            reasons = providers.get(row.provider).reasons_against(call)
            assert list(row.reasons) == reasons
            if chosen is None and row.provider in said:
                assert said[row.provider] == row.reasons
        lines = str(explanation).splitlines()
        assert [line[3:].split()[0] for line in lines[:-1]] == list(providers.NAMES)
        assert sum(line.startswith("->") for line in lines) == (chosen is not None)


def _decides(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score if h > 0 else -score


def _sums(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + score.sum(-1, keepdim=True)


def _special(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return torch.special.erfinv(torch.tanh(score))


def _doubled(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return 2 * score


def _one_side(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx and q_idx >= 0


@pytest.mark.parametrize(
    "mods",
    [{"score_mod": mod} for mod in (_decides, _sums, _special, _doubled)]
    + [{"mask_mod": _one_side}],
    ids=lambda mods: next(iter(mods.values())).__name__,
)
@pytest.mark.parametrize("backend", [None, "cpu", "portable"])
def test_explain_knows_the_mods_that_a_call_refuses(
    mods: dict[str, Any], backend: str | None, own_kernels: None
) -> None:
    x = torch.randn(1, 2, 2, 8, dtype=torch.bfloat16)
    explanation = headway.explain(headway.flash_attn_func, x, x, x, backend=backend, **mods)
    rows = {row.provider: row.reasons for row in explanation.rows}
    kernels = [rows["cpu"], rows["portable"]]
    assert rows["reference"] == ()  # it may be named
    if mods.get("score_mod") is _doubled:
        assert kernels == [(), ()]
        assert explanation.chosen is not None
        headway.flash_attn_func(x, x, x, backend=backend, **mods)
        return
    assert all("cannot be part of a kernel" in said for (said,) in kernels)
    assert explanation.chosen is None
    with pytest.raises(UnsupportedError, match="cannot be part of a kernel") as caught:
        headway.flash_attn_func(x, x, x, backend=backend, **mods)
    assert "reference" in caught.value.alternatives


def test_explain_refuses_a_mod_that_returns_nothing_as_the_call_does() -> None:
    x = torch.randn(1, 2, 2, 8)
    with pytest.raises(InvalidInputError, match="score_mod: got a callable that returns"):
        headway.explain(headway.flash_attn_func, x, x, x, score_mod=lambda *_: None)


def test_explain_says_what_was_pinned_and_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.explain(problem(backend="cpu")).why == "pinned by backend=cpu"
    monkeypatch.setenv("HEADWAY_BACKEND", "fa3")
    explanation = dispatch.explain(problem())
    assert explanation.chosen is None
    assert explanation.why == "pinned by HEADWAY_BACKEND=fa3, which cannot run this call"


# --- devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toolkit", [None, "11.8", "12.3", "12.10", "13.0"])
@pytest.mark.parametrize("kind", DEVICES)
def test_no_question_about_a_device_fails_on_any_build_of_torch(
    kind: str, toolkit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    with installed(kind, *ALL.get(kind, ())):
        for name in providers.NAMES:
            reason = providers.get(name).unavailable(CPU)
            assert reason is None or isinstance(reason, str)
        assert set(headway.supported_versions("cpu")) <= {3, 4}
        assert headway.is_fa3_supported("cpu") == (3 in headway.supported_versions("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_version_runs_on_a_device_that_is_not_there() -> None:
    assert headway.supported_versions("cuda") == ()
    assert not headway.is_fa3_supported("cuda:1")


def test_toolkit_versions_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As text, 12.10 sorts before 12.3."""
    for text, able in (("12.10", True), ("12.3", True), ("12.2", False), ("9.2", False)):
        monkeypatch.setattr(torch.version, "cuda", text)
        with installed("sm90", "sgl"):
            assert (providers.get("fa3").unavailable(CPU) is None) == able
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.toolkit_version() is None


@pytest.mark.parametrize(
    ("kind", "package", "versions"),
    [
        ("sm90", "sgl", (3,)),
        ("sm90", "fa4", (4,)),
        ("mp31", "mate", (3,)),
        ("gfx950", "aiter", ()),
    ],
)
@pytest.mark.parametrize("toolkit", [None, "12.8"])
def test_versions_are_those_that_calls_run_with(
    kind: str,
    package: str,
    versions: tuple[int, ...],
    toolkit: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    assert headway.supported_versions() == (3, 4)  # Headway's kernels for CPUs answer to both
    monkeypatch.setattr(providers.get("cpu"), "unavailable", lambda device: "not here")
    with installed(kind, package):
        assert headway.supported_versions("cpu") == versions
        assert headway.is_fa3_supported("cpu") is (3 in versions)


def test_each_device_of_a_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of different kinds: an answer for one is not the other's."""
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.version, "hip", None)
    devices._of.cache_clear()
    try:
        kinds = [devices.of(torch.device("cuda", index)).kind for index in (0, 1, 0)]
    finally:
        devices._of.cache_clear()
    assert kinds == ["sm90", "sm75", "sm90"]


# --- cost -------------------------------------------------------------------------------------------------


def best_us(function: Callable[[], object], times: int, rounds: int) -> float:
    """Processor time of one call in microseconds, the best of several rounds."""
    function()
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(times):
            function()
        best = min(best, time.thread_time() - start)
    return 1e6 * best / times


def test_a_remembered_choice_costs_microseconds() -> None:
    """5 us is what is wanted on a quiet machine; the rest is slack for slow and busy ones."""
    call = problem("pages of 64, causal")
    assert best_us(lambda: dispatch.choose(call), times=500, rounds=20) < 15


@pytest.mark.parametrize("kind", ["cpu", "sm90", "gfx950", "mp31"])
def test_explaining_costs_milliseconds_with_nothing_installed(kind: str) -> None:
    """5 ms is what is wanted."""
    call = problem("pages of 64, causal")
    with installed(kind):
        assert best_us(lambda: dispatch.explain(call), times=5, rounds=5) < 15e3
