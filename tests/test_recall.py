"""Calls like earlier ones: what they find remembered, and what is never remembered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import headway
from headway import InvalidInputError, arguments, dispatch, interface, problem, recall
from tests.calls import Call, assert_matches, calls
from tests.providers.honoured import many


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Values of CPU tensors count as out of sight."""
    for module in (problem, recall):
        monkeypatch.setattr(module, "values_visible", lambda device: False)
    monkeypatch.setattr(arguments, "_max_rows", _bound)
    dispatch.forget()
    yield
    dispatch.forget()


def _bound(given: int | None, cu_seqlens: Any, rows: Any) -> int:
    if given is not None:
        return int(given)
    return int(rows.shape[1] if cu_seqlens is None else rows.shape[0])


def test_any_call_repeated_with_other_tensors() -> None:
    """Remembered or not, the second of two calls of one shape is computed from its own tensors."""
    remembered = 0

    @settings(many, max_examples=150, database=None)
    @given(call=calls((torch.bfloat16,), head_dims=(8, 16), max_len=20))
    def check(call: Call) -> None:
        nonlocal remembered
        recall.forget()
        call.run("reference")
        other = call.copy()
        for name in ("q", "qv", "sinks", "k", "v"):
            given = other.kwargs.get(name)
            if isinstance(given, torch.Tensor) and given.dtype == torch.bfloat16:
                other.kwargs[name] = -given.flip(-1)
        kept = len(recall._CALLS)
        assert kept <= 1
        result = other.run("reference")
        remembered += kept
        recall.forget()
        assert_matches(result, other.run("reference"), other)

    check()
    assert remembered > 50


def dense(**more: Any) -> dict[str, Any]:
    made = {name: torch.randn(2, 5, 2, 8) for name in "qkv"}
    return made | {"backend": "reference"} | more


def found(**arguments: Any) -> int:
    """How many calls are remembered after this one alone."""
    recall.forget()
    headway.flash_attn_func(**arguments)
    return len(recall._CALLS)


def test_what_a_call_is_remembered_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(**dense()) == 1
    headway.flash_attn_func(**dense())
    assert len(recall._CALLS) == 1
    different: list[dict[str, Any]] = [
        {"causal": True},
        {"softcap": 2.0},
        {"window_size": (1, 0)},
        {"window_size": [1, 1]},
        {"sinks": torch.randn(2)},
        {"sinks": torch.nn.Parameter(torch.randn(2, dtype=torch.float64))},
        {"return_lse": True},
        {"q": torch.randn(2, 3, 2, 8)},
        {"v": torch.randn(2, 5, 2, 16)[..., ::1]},
        {"q": torch.randn(2, 2, 5, 8).transpose(1, 2)},
    ]
    for i, more in enumerate(different):
        headway.flash_attn_func(**dense(**more))
        assert len(recall._CALLS) == i + 2, more
    monkeypatch.setenv("HEADWAY_FLASH_ATTN_VERSION", "3")
    headway.flash_attn_func(**dense())
    assert len(recall._CALLS) == len(different) + 2


def test_numbers_read_from_tensors_are_not_remembered() -> None:
    assert found(**dense(softmax_scale=torch.tensor(0.5))) == 0
    assert (
        found(**dense(aux_tensors=[torch.zeros(2)], mask_mod=lambda b, h, i, j, aux: i >= j)) == 0
    )


def test_numbers_are_remembered_by_value_whatever_their_type() -> None:
    numpy = pytest.importorskip("numpy")
    assert found(**dense(softmax_scale=numpy.float32(0.5), attention_chunk=numpy.int64(4))) == 1
    headway.flash_attn_func(**dense(softmax_scale=0.5, attention_chunk=4))
    assert len(recall._CALLS) == 1


def test_lists_are_remembered_as_tuples() -> None:
    assert found(**dense(window_size=[1, 2])) == 1
    headway.flash_attn_func(**dense(window_size=(1, 2)))
    assert len(recall._CALLS) == 1


def test_mods_aliased_tensors_and_derived_ones_are_not_remembered() -> None:
    assert found(**dense(score_mod=lambda score, b, h, i, j: score)) == 0
    both = torch.randn(2, 5, 2, 8)
    assert found(**dense(k=both, v=both)) == 0
    recall.forget()
    pages = torch.randn(4, 5, 2, 8)
    headway.flash_attn_varlen_func(
        torch.randn(2, 1, 2, 8),
        pages,
        pages.clone(),
        cu_seqlens_k=torch.tensor([0, 3, 7], dtype=torch.int32),
        page_table=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        backend="reference",
    )
    assert not recall._CALLS


def test_one_length_for_all_is_a_number_that_may_change() -> None:
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 5, 2, 8)
    for length in (3, 5, 1):
        arguments: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache.clone()}
        arguments["backend"] = "reference"
        out = headway.flash_attn_with_kvcache(**arguments, cache_seqlens=length)
        lengths = torch.full((2,), length, dtype=torch.int32)
        torch.testing.assert_close(
            out, headway.flash_attn_with_kvcache(**arguments, cache_seqlens=lengths)
        )
    assert len(recall._CALLS) == 1


def test_a_wrong_call_is_wrong_every_time() -> None:
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="softcap"):
            headway.flash_attn_func(**dense(softcap=-1.0))
    assert not recall._CALLS


def test_a_plan_is_looked_at_with_every_call() -> None:
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 5, 2, 8)
    lengths = torch.tensor([3, 5], dtype=torch.int32)

    def run(plan: Any) -> Any:
        return headway.flash_attn_with_kvcache(
            q,
            cache,
            cache.clone(),
            cache_seqlens=lengths,
            scheduler_metadata=plan,
            backend="reference",
        )

    def plan_for(capacity: int) -> Any:
        return headway.get_scheduler_metadata(2, 1, capacity, 2, 2, 8, lengths)

    run(plan_for(5))
    run(plan_for(5))
    assert len(recall._CALLS) == 1
    with pytest.raises(InvalidInputError, match="made for another call"):
        run(plan_for(7))


def test_a_known_call_still_has_no_gradients(guards: None) -> None:
    for _ in range(3):
        assert not headway.flash_attn_func(**dense()).requires_grad
    given = dense(q=torch.randn(2, 5, 2, 8, requires_grad=True))
    for _ in range(3):
        with pytest.raises(headway.UnsupportedError, match="gradients"):
            headway.flash_attn_func(**given).sum().backward()
        with torch.no_grad():
            assert not headway.flash_attn_func(**given).requires_grad
    assert not headway.flash_attn_func(**dense()).requires_grad


def test_memory_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_MOST_CALLS", 2)
    for seqlen in range(1, 6):
        headway.flash_attn_func(**dense(q=torch.randn(2, seqlen, 2, 8)))
        assert len(recall._CALLS) <= 2


def test_inside_debug_checks_nothing_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    found(**dense())
    monkeypatch.undo()
    k = torch.randn(1, 1, 1, 8)
    given = dict.fromkeys(interface.flash_attn_func.__annotations__) | {
        "k": k,
        "v": k,
    }
    assert interface._DENSE.calls.recall(given) == (None, None)


@pytest.fixture(params=["torch's guards", "no guards of torch's"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no guards of torch's":
        monkeypatch.setattr(recall, "_compiled_guards", lambda: None)


def test_torchs_guards_are_what_recall_takes_them_for() -> None:
    assert recall._compiled_guards() is not None


def test_guards_see_every_difference(guards: None) -> None:
    q, k = torch.zeros(2, 3, 1, 8), torch.zeros(2, 5, 1, 8, dtype=torch.bfloat16)
    alike = recall._guard((q, k))
    assert alike(torch.ones(2, 3, 1, 8), k.clone())
    others: list[Any] = [
        torch.zeros(2, 3, 1, 9),
        torch.zeros(2, 3, 8),
        torch.zeros(2, 3, 2, 8)[:, :, :1],
        torch.zeros(2, 1, 3, 8).transpose(1, 2),
        q.double(),
        q.to("meta"),
        torch.nn.Parameter(q),
        q.clone().requires_grad_(),
        None,
        3,
    ]
    for other in others:
        assert not alike(other, k), other
    assert not alike(q, q)


def test_calls_in_turn_are_all_known(guards: None) -> None:
    """More of them than are compared with one after the other."""
    lengths = [*range(1, 8)] * 3
    for seqlen in lengths:
        q = torch.randn(2, seqlen, 2, 8)
        k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
        out = headway.flash_attn_func(q, k, v, backend="reference")
        assert isinstance(out, torch.Tensor)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        torch.testing.assert_close(out, expected.transpose(1, 2))
    assert len(recall._CALLS) == 7
    assert len(interface._DENSE.calls.recent) == recall._MOST_RECENT


def test_tensors_of_inference_mode_are_known_the_second_time() -> None:
    """torch's guards tell them from others; their calls are the same."""
    memory = interface._DENSE.calls
    headway.flash_attn_func(**dense())
    with torch.inference_mode():
        for _ in range(3):
            headway.flash_attn_func(**dense())
    assert len(recall._CALLS) == len(memory.recent) == 1


@pytest.mark.parametrize("odd", [torch.zeros(3), torch.zeros(2, 2), "a"], ids=str)
def test_what_cannot_be_compared_is_looked_at(odd: Any) -> None:
    headway.flash_attn_func(**dense())
    for _ in range(2):
        with pytest.raises((InvalidInputError, RuntimeError, ValueError, TypeError)):
            headway.flash_attn_func(**dense(softmax_scale=odd))


def test_the_environment_counts_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = dense(backend=None)
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    for _ in range(2):
        headway.flash_attn_func(**arguments)
    monkeypatch.setenv("HEADWAY_BACKEND", "nobody")
    with pytest.raises(InvalidInputError, match="HEADWAY_BACKEND"):
        headway.flash_attn_func(**arguments)
