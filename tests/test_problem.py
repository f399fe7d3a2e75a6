"""Wrong arguments are refused by name, with what was given and what is wanted."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import headway
from headway import InvalidInputError, UnsupportedError


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes: Any) -> Any:
    arguments = {"q": normal(2, 3, 4, 8), "k": normal(2, 5, 2, 8), "v": normal(2, 5, 2, 8)}
    return headway.flash_attn_func(**(arguments | changes))


def ragged(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": normal(5, 4, 8),
        "k": normal(9, 2, 8),
        "v": normal(9, 2, 8),
        "cu_seqlens_q": int32(0, 2, 5),
        "cu_seqlens_k": int32(0, 4, 9),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }
    return headway.flash_attn_varlen_func(**(arguments | changes))


def paged(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": normal(2, 1, 4, 8),
        "k_cache": normal(6, 4, 2, 8),
        "v_cache": normal(6, 4, 2, 8),
        "cache_seqlens": int32(7, 3),
        "page_table": torch.tensor([[0, 5, 1], [2, 0, 0]], dtype=torch.int32),
    }
    return headway.flash_attn_with_kvcache(**(arguments | changes))


CALLS = {"dense": dense, "ragged": ragged, "paged": paged}

WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("dense", {"q": normal(2, 3, 8)}, "q", "4 dimensions"),
    ("dense", {"q": "text"}, "q", "tensor"),
    ("dense", {"q": normal(2, 3, 3, 8)}, "q", "multiple of the 2"),
    ("dense", {"q": normal(2, 3, 4, 16)}, "q", "head_dim"),
    ("dense", {"q": normal(3, 3, 4, 8)}, "k", "batch size"),
    ("dense", {"v": normal(2, 6, 2, 8)}, "v", "shape of k"),
    (
        "dense",
        {"sinks": torch.tensor([0.0, 1.0, float("inf"), 2.0])},
        "sinks",
        "finite numbers, or -inf",
    ),
    (
        "paged",
        {"sinks": torch.tensor([0.0, float("nan"), 1.0, 2.0])},
        "sinks",
        "finite numbers, or -inf",
    ),
    ("dense", {"v": normal(2, 5, 2, 8, dtype=torch.float16)}, "v", "dtype of k"),
    ("dense", {"q": normal(2, 3, 4, 8, dtype=torch.bfloat16)}, "q", "dtype of k"),
    ("dense", {"q": torch.ones(2, 3, 4, 8, dtype=torch.int32)}, "q", "floating-point"),
    ("dense", {"k": normal(2, 5, 2, 16)[..., ::2]}, "k", "contiguous"),
    ("dense", {"causal": torch.tensor([True, False])}, "causal", "for all sequences"),
    ("dense", {"window_size": (-2, 0)}, "window_size", "non-negative"),
    ("dense", {"window_size": 3}, "window_size", "pair"),
    ("dense", {"window_size": (1.5, 0)}, "window_size", "non-negative"),
    ("dense", {"attention_chunk": -1}, "attention_chunk", "positive"),
    ("dense", {"softcap": -1.0}, "softcap", "positive"),
    ("dense", {"softmax_scale": float("nan")}, "softmax_scale", "finite"),
    ("dense", {"num_splits": -1}, "num_splits", "automatic"),
    ("dense", {"sm_margin": -1}, "sm_margin", "multiprocessors"),
    ("dense", {"sinks": normal(3)}, "sinks", "query head"),
    (
        "dense",
        {"sinks": normal(4), "learnable_sink": normal(4)},
        "learnable_sink",
        "one of the two",
    ),
    ("dense", {"score_mod": 3}, "score_mod", "callable"),
    ("dense", {"mask_mod": 3}, "mask_mod", "callable"),
    ("dense", {"aux_tensors": [normal(3)]}, "aux_tensors", "score_mod"),
    ("dense", {"qv": normal(2, 3, 4, 7)}, "qv", "head_dim"),
    ("dense", {"only_qv": True}, "only_qv", "qv given"),
    ("dense", {"k_descale": torch.ones(2, 2)}, "k_descale", "float8"),
    ("dense", {"out": normal(2, 3, 4, 9)}, "out", "(2, 3, 4, 8)"),
    ("dense", {"ver": 2}, "ver", "3, 4"),
    ("dense", {"backend": "fa9"}, "backend", "reference"),
    ("dense", {"q": normal(2, 3, 4, 8).to_sparse()}, "q", "4 dimensions"),
    ("dense", {"q": normal(2, 3, 0, 8)}, "q", "at least one head"),
    ("dense", {"q": normal(2, 3, 4, 0), "k": normal(2, 5, 2, 0)}, "q", "at least 1 wide"),
    ("dense", {"k": normal(2, 5, 0, 8), "v": normal(2, 5, 0, 8)}, "k", "at least one head"),
    ("dense", {"v": None}, "v", "tensor"),
    ("dense", {"attention_chunk": 1.5}, "attention_chunk", "length"),
    ("dense", {"softmax_scale": "small"}, "softmax_scale", "number"),
    ("dense", {"softcap": "small"}, "softcap", "number"),
    ("dense", {"num_splits": None}, "num_splits", "automatic"),
    ("dense", {"sm_margin": None}, "sm_margin", "multiprocessors"),
    ("dense", {"sinks": [0.0] * 4}, "sinks", "(4,)"),
    ("dense", {"qv": [1]}, "qv", "tensor"),
    ("dense", {"qv": normal(2, 3, 8, 4).transpose(2, 3)}, "qv", "contiguous"),
    ("dense", {"qv": [1], "only_qv": True}, "qv", "4 dimensions"),
    ("dense", {"out": [1]}, "out", "(2, 3, 4, 8)"),
    ("dense", {"out": normal(8).expand(2, 3, 4, 8)}, "out", "rows of its own"),
    ("dense", {"aux_tensors": normal(3)}, "aux_tensors", "list or tuple"),
    ("dense", {"aux_tensors": [1], "score_mod": abs}, "aux_tensors[0]", "on cpu"),
    ("dense", {"score_mod": lambda *given: None}, "score_mod", "return"),
    ("dense", {"mask_mod": lambda *given: None}, "mask_mod", "return"),
    ("dense", {"backend": ["cpu"]}, "backend", "name of a provider"),
    ("ragged", {"q": normal(5, 8)}, "q", "3 dimensions"),
    ("ragged", {"k": "text"}, "k", "tensor"),
    ("ragged", {"cu_seqlens_q": [0, 2, 5]}, "cu_seqlens_q", "(batch_size + 1,)"),
    ("ragged", {"cu_seqlens_q": torch.tensor(5)}, "cu_seqlens_q", "(batch_size + 1,)"),
    ("ragged", {"cu_seqlens_q": int32(0, 2, 5)[None]}, "cu_seqlens_q", "(batch_size + 1,)"),
    ("ragged", {"cu_seqlens_q": int32()}, "cu_seqlens_q", "(batch_size + 1,)"),
    ("ragged", {"cu_seqlens_k": [0, 4, 9]}, "cu_seqlens_k", "(batch_size + 1,)"),
    ("ragged", {"max_seqlen_q": 3.5}, "max_seqlen_q", "non-negative length"),
    ("ragged", {"max_seqlen_k": "5"}, "max_seqlen_k", "non-negative length"),
    ("ragged", {"min_seqlen_k": "5"}, "min_seqlen_k", "non-negative length"),
    ("ragged", {"seqused_q": int32(-1, 1)}, "seqused_q", "between 0 and"),
    ("ragged", {"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q", "int32"),
    ("ragged", {"cu_seqlens_q": int32(0, 2, 9)}, "cu_seqlens_q", "5 rows"),
    ("ragged", {"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q", "0 first"),
    ("ragged", {"cu_seqlens_k": int32(0, 6, 4)}, "cu_seqlens_k", "never decreasing"),
    ("ragged", {"cu_seqlens_k": int32(0, 4)}, "cu_seqlens_k", "(3)"),
    ("ragged", {"max_seqlen_q": 1}, "max_seqlen_q", "at least 3"),
    ("ragged", {"seqused_q": int32(1, 9)}, "seqused_q", "rows of q"),
    ("ragged", {"seqused_k": int32(5, 1)}, "seqused_k", "capacity"),
    ("ragged", {"seqused_k": int32(1, 1, 1)}, "seqused_k", "(2)"),
    ("ragged", {"k": normal(9, 2, 8, 1)}, "k", "total_k"),
    ("ragged", {"min_seqlen_k": -1}, "min_seqlen_k", "non-negative"),
    ("paged", {"page_table": int32(0, 1)}, "page_table", "(2, any)"),
    (
        "paged",
        {"page_table": torch.tensor([[0, 6], [1, 1]], dtype=torch.int32)},
        "page_table",
        "page 6",
    ),
    (
        "paged",
        {"page_table": torch.tensor([[0, -1], [1, 1]], dtype=torch.int32)},
        "page_table",
        "page -1",
    ),
    ("paged", {"page_table": [[0, 1], [2, 3]]}, "page_table", "int32"),
    ("paged", {"k_cache": None}, "k_cache", "page_size"),
    ("paged", {"v_cache": None}, "v_cache", "page_size"),
    ("paged", {"v_cache": normal(6, 4, 1, 8)}, "v_cache", "shape of k_cache"),
    ("paged", {"page_table": None}, "k_cache", "batch size of q"),
    ("paged", {"cache_seqlens": torch.tensor([7, 3])}, "cache_seqlens", "int32"),
    ("paged", {"cu_seqlens_q": [0, 1, 2], "cache_seqlens": 3}, "cu_seqlens_q", "(batch_size + 1,)"),
    ("paged", {"k": [1], "v": [1]}, "k", "tensor"),
    ("paged", {"cache_seqlens": int32(7, 13)}, "cache_seqlens", "capacity"),
    ("paged", {"cache_seqlens": 3.5}, "cache_seqlens", "int"),
    ("paged", {"cache_leftpad": int32(8, 0)}, "cache_leftpad", "between 0 and"),
    ("paged", {"cache_batch_idx": int32(0, 2)}, "cache_batch_idx", "rows 0 to 1"),
    ("paged", {"k": normal(2, 1, 2, 8)}, "v", "together"),
    ("paged", {"rotary_cos": normal(9, 4)}, "rotary_sin", "both"),
    ("paged", {"rotary_cos": normal(9, 4), "rotary_sin": normal(9, 4)}, "rotary_cos", "appended"),
    ("paged", {"cu_seqlens_k_new": int32(0, 1, 2)}, "cu_seqlens_k_new", "k and v"),
    ("paged", {"scheduler_metadata": int32(1)}, "scheduler_metadata", "get_scheduler_metadata"),
    (
        "paged",
        {"k": normal(2, 1, 2, 8), "v": normal(2, 1, 2, 8), "cache_seqlens": None},
        "cache_seqlens",
        "given when k and v",
    ),
    ("paged", {"k": normal(2, 1, 1, 8), "v": normal(2, 1, 2, 8)}, "k", "new tokens"),
    (
        "paged",
        {"k": normal(2, 6, 2, 8), "v": normal(2, 6, 2, 8)},
        "cache_seqlens",
        "appended ones included",
    ),
    (
        "paged",
        {
            "k": normal(2, 1, 2, 8),
            "v": normal(2, 1, 2, 8),
            "rotary_cos": normal(9, 8),
            "rotary_sin": normal(9, 8),
        },
        "rotary_cos",
        "at most head_dim",
    ),
]


FLOAT8_CACHE = {n: normal(6, 4, 2, 8).to(torch.float8_e4m3fn) for n in ("k_cache", "v_cache")}
WRONG += [
    ("paged", FLOAT8_CACHE | {"k_descale": 2.0}, "k_descale", "float32 tensor"),
    ("paged", FLOAT8_CACHE | {"k_descale": torch.ones(2)}, "k_descale", "(2, 2)"),
]

NEW = {"k": normal(2, 2, 2, 8), "v": normal(2, 2, 2, 8), "causal": True}


def tables(positions: int) -> dict[str, Any]:
    return {"rotary_cos": normal(positions, 2), "rotary_sin": normal(positions, 2)}


#: Sequences would overwrite each other's new tokens.
SHARED = {name: normal(1, 4, 2, 8).expand(6, 4, 2, 8) for name in ("k_cache", "v_cache")}
WRONG += [("paged", NEW | {name: cache}, name, "looks expanded") for name, cache in SHARED.items()]


#: Tables that are read beyond their end give whatever lies there.
WRONG += [
    ("paged", NEW | tables(8), "rotary_cos", "at least 9"),
    ("paged", NEW | tables(8) | {"causal": False}, "rotary_cos", "at least 9"),
    ("paged", NEW | tables(9) | {"q": normal(2, 3, 4, 8)}, "rotary_cos", "at least 10"),
    ("paged", NEW | tables(9) | {"rotary_seqlens": int32(0, 8)}, "rotary_cos", "at least 10"),
    ("paged", NEW | tables(9) | {"rotary_seqlens": int32(0, -1)}, "rotary_seqlens", "from 0"),
    ("paged", NEW | {"k_cache": normal(6, 4, 1, 8).expand(6, 4, 2, 8)}, "k_cache", "of its own"),
]


@pytest.mark.parametrize(("call", "changes", "argument", "wanted"), WRONG)
def test_a_wrong_argument_is_named(
    call: str, changes: dict[str, Any], argument: str, wanted: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        CALLS[call](**changes)
    assert argument in caught.value.argument
    assert wanted in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_the_unchanged_calls_run(call: str) -> None:
    assert torch.isfinite(CALLS[call]()).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_sink_of_minus_infinity_is_none(backend: str) -> None:
    tensors = {name: normal(2, 3, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    sinks = torch.full((4,), -torch.inf)
    out, lse = dense(**tensors, backend=backend, sinks=sinks, return_lse=True)
    plain_out, plain_lse = dense(**tensors, backend=backend, return_lse=True)
    torch.testing.assert_close(out, plain_out)
    torch.testing.assert_close(lse, plain_lse)


def test_tables_that_just_suffice_are_taken() -> None:
    assert torch.isfinite(paged(**NEW, **tables(9))).all()
    several = {"q": normal(2, 3, 4, 8), "causal": False}  # all of them at the first new position
    assert torch.isfinite(paged(**NEW | tables(9) | several)).all()


@pytest.mark.parametrize("window", [None, (None, None), [-1, -1], (np.int64(9), np.int32(9))])
def test_an_unbounded_window_has_many_spellings(window: Any) -> None:
    torch.manual_seed(0)
    assert dense(window_size=window).shape == (2, 3, 4, 8)


@pytest.mark.parametrize("width", [2**31 - 1, sys.maxsize, 2**70])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_window_wider_than_any_sequence_hides_nothing(width: int, backend: str) -> None:
    tensors = {"q": normal(2, 3, 4, 8), "k": normal(2, 5, 2, 8), "v": normal(2, 5, 2, 8)}
    want = dense(**tensors, backend=backend)
    for mask in ({"window_size": (width, width)}, {"attention_chunk": width}):
        torch.testing.assert_close(dense(**tensors, **mask, backend=backend), want)


def test_a_plan_for_such_a_window() -> None:
    window = {"window_size": (sys.maxsize, sys.maxsize)}
    plan = headway.get_scheduler_metadata(2, 1, 12, 4, 2, 8, int32(7, 3), page_size=4, **window)
    assert plan.num_splits.tolist() == [1, 1]
    assert paged(scheduler_metadata=plan, **window).shape == (2, 1, 4, 8)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sinks_may_lie_anywhere(backend: str) -> None:
    tensors = {"q": normal(2, 3, 4, 8), "k": normal(2, 5, 2, 8), "v": normal(2, 5, 2, 8)}
    spread = torch.arange(8.0)
    for sinks in (spread[1:2].expand(4), spread[::2]):
        want = dense(**tensors, sinks=sinks.clone(), backend=backend)
        assert torch.equal(dense(**tensors, sinks=sinks, backend=backend), want)


def test_rows_of_one_element_have_no_stride() -> None:
    tensors = {"q": normal(2, 3, 1, 1), "k": normal(2, 5, 1, 1), "v": normal(2, 5, 1, 1)}
    out = torch.empty(2, 3).as_strided((2, 3, 1, 1), (3, 1, 1, 9))
    assert dense(**tensors, out=out) is out
    torch.testing.assert_close(out, dense(**tensors))


@pytest.mark.parametrize("cu_seqlens", [[0, 7, 10], torch.tensor([0, 7, 10]), int32(0, 7)])
def test_lengths_of_pages_are_checked_as_cu_seqlens_k(cu_seqlens: Any) -> None:
    k, table = normal(6, 4, 2, 8), torch.tensor([[0, 5, 1], [2, 0, 0]], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"^cu_seqlens_k: .*int32 .*\("):
        ragged(k=k, v=k, page_table=table, cu_seqlens_k=cu_seqlens, max_seqlen_k=None)


PARTS, LSES = normal(2, 3, 5, 4, 8), normal(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"out_partial": [PARTS]}, "out_partial"),
        ({"out_partial": PARTS.int()}, "out_partial"),
        ({"lse_partial": LSES[0]}, "lse_partial"),
        ({"lse_partial": LSES.to("meta")}, "lse_partial"),
        ({"out": torch.empty(3, 5, 4, 8, device="meta")}, "out"),
        ({"out": torch.empty(5, 4, 8)}, "out"),
        ({"out": [PARTS[0]]}, "out"),
        ({"out_dtype": torch.int32}, "out_dtype"),
        ({"out_dtype": torch.float8_e4m3fn}, "out_dtype"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        headway.flash_attn_combine(**{"out_partial": PARTS, "lse_partial": LSES} | changes)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("outs", "lses", "argument"),
    [
        ([], [], "outs"),
        ([PARTS[0]], [], "outs"),
        ([PARTS[0, 0, 0]], [LSES[0, 0, 0]], "outs[0]"),
        ([PARTS[0], PARTS[0, :2]], [LSES[0].mT] * 2, "outs[1]"),
        ([PARTS[0]] * 2, [LSES[0].mT, LSES[0]], "lses[1]"),
        ([PARTS[0], 1.0], [LSES[0].mT] * 2, "outs[1]"),
        ([PARTS[0]], [[0.0]], "lses[0]"),
        ([PARTS[0].int()] * 2, [LSES[0].mT] * 2, "outs[0]"),
        ([PARTS[0]] * 2, [LSES[0].mT, LSES[0].mT.to("meta")], "lses[1]"),
    ],
)
def test_states_that_do_not_fit_are_named(outs: Any, lses: Any, argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        headway.merge_states(outs, lses)
    assert caught.value.argument == argument
    merged, _ = headway.merge_states(PARTS, LSES.mT)
    assert merged.shape == PARTS.shape[1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_seqlens": [7, 3]},
        {"cache_seqlens": torch.tensor([7, 3])},
        {"cache_leftpad": int32(1, 2, 3)},
        {"num_splits": -1},
        {"sm_margin": -1},
        {"max_seqlen_k": "12"},
        {"num_heads_kv": 0},
        {"num_heads_q": 3},
        {"headdim": None},
    ],
)
def test_sizes_of_a_plan_are_checked(changes: dict[str, Any]) -> None:
    sizes = {
        "max_seqlen_q": 1,
        "max_seqlen_k": 12,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 8,
    }
    arguments = {"batch_size": 2, "cache_seqlens": int32(7, 3)} | sizes
    assert headway.get_scheduler_metadata(**arguments).num_splits.tolist() == [1, 1]
    with pytest.raises(InvalidInputError) as caught:
        headway.get_scheduler_metadata(**arguments | changes)
    assert caught.value.argument in changes


@pytest.mark.parametrize("name", ["aux_scalars", "gather_kv_indices", "block_sparse_tensors"])
def test_arguments_no_provider_takes_are_refused_with_advice(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        dense(**{name: [1.0]})


@pytest.mark.parametrize("length", [-1, 2**31, 2**40, np.int64(-3)])
def test_a_number_that_is_no_length_is_named(length: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^cache_seqlens: got {length}; want between 0 "):
        paged(cache_seqlens=length)


@pytest.mark.parametrize("length", [7, np.int64(7), np.int32(7)])
def test_a_length_may_be_any_integer(length: Any) -> None:
    q = normal(2, 3, 4, 8)
    torch.testing.assert_close(
        paged(q=q, cache_seqlens=length, k_cache=(k := normal(6, 4, 2, 8)), v_cache=k),
        paged(q=q, cache_seqlens=int32(7, 7), k_cache=k, v_cache=k),
    )
    table = torch.tensor([[0, 5], [2, 0]], dtype=torch.int32)
    explained = headway.explain(
        headway.flash_attn_with_kvcache, q, k, k, cache_seqlens=length, page_table=table
    )
    assert explained.chosen == "cpu"


def test_an_int_length_counts_for_each_sequence_of_a_ragged_query() -> None:
    """Elsewhere an int is expanded to q.shape[0], which counts tokens, not sequences, when ragged."""
    k, v = normal(2, 8, 2, 8), normal(2, 8, 2, 8)
    q, cu = normal(5, 4, 8), int32(0, 2, 5)
    out = headway.flash_attn_with_kvcache(q, k, v, cache_seqlens=6, cu_seqlens_q=cu, causal=True)
    want = headway.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=int32(6, 6), cu_seqlens_q=cu, causal=True
    )
    assert torch.equal(out, want)


def test_debug_checks_is_a_scope() -> None:
    from headway import problem

    meta = torch.device("meta")
    assert not problem.values_visible(meta)
    with headway.debug_checks():
        assert problem.values_visible(meta)
        with headway.debug_checks(False):
            assert not problem.values_visible(meta)
    assert not problem.values_visible(meta)


def test_debug_checks_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from headway import problem

    meta = torch.device("meta")
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("HEADWAY_DEBUG_CHECKS", value)
        assert problem.values_visible(meta) == on
    monkeypatch.setenv("HEADWAY_DEBUG_CHECKS", "yes")
    with pytest.raises(InvalidInputError, match=r"HEADWAY_DEBUG_CHECKS: got 'yes'; want 0 or 1"):
        problem.values_visible(meta)


def test_a_plan_of_another_geometry_is_refused() -> None:
    plan = headway.get_scheduler_metadata(
        2, 1, 12, num_heads_q=4, num_heads_kv=2, headdim=8, cache_seqlens=int32(7, 3), page_size=4
    )
    paged(scheduler_metadata=plan)
    with pytest.raises(InvalidInputError, match=r"causal False \(plan\) / True \(call\)"):
        paged(scheduler_metadata=plan, causal=True)
