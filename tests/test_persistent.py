"""Persistent schedules: recorded plans, what the lists compute, bounds, refusals."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway import mla, persistent
from headway.errors import InvalidInputError
from headway.persistent import Granularity, Item

RECORDED = Path(__file__).parent / "data" / "ps_metadata.jsonl.gz"
LISTS = ("work_indptr", "work_info", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
with gzip.open(RECORDED, "rt") as lines:
    PLANS = [json.loads(line) for line in lines]


def test_all_recorded_plans_are_here():
    assert len(PLANS) == 79


def planned(case, plan=persistent.plan):
    return plan(
        case["qo_indptr"],
        case["kv_indptr"],
        case["context_lens"],
        num_heads_k=case["num_head_k"],
        num_cu=case["num_cu"],
        granularity=Granularity(
            case["qhead_granularity"], case["qlen_granularity"], case["kvlen_granularity"]
        ),
        block_size=case["block_size"],
        is_causal=case["is_causal"],
    )


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_plan_equals_the_recorded_one(number):
    work = planned(PLANS[number])
    for name in LISTS:
        assert getattr(work, name).tolist() == PLANS[number][name], name


def info_of(case, **more):
    return mla.get_ps_metadata_info_v1(
        len(case["context_lens"]),
        case["num_head_k"],
        case["max_qlen"],
        case["qlen_granularity"],
        num_cu=case["num_cu"],
        **more,
    )


def buffers_of(case, **more):
    return [torch.full(_shape(n), -7, dtype=dtype) for n, dtype in info_of(case, **more)[1:]]


def _shape(size):
    return size if isinstance(size, tuple) else (size,)


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_buffers_have_the_recorded_sizes(number):
    names = ("work_indptr", "work_info", "reduce_indptr", "reduce_final", "reduce_partial")
    sizes = dict(zip(names, (len(b) for b in buffers_of(PLANS[number])), strict=True))
    assert sizes == PLANS[number]["sizes"]


@pytest.mark.parametrize("number", range(0, len(PLANS), 7))
@pytest.mark.parametrize("tight", [False, True])
def test_buffers_are_filled(number, tight):
    """Through the public function, with buffers of aiter's sizes and with tight ones."""
    case = PLANS[number]
    buffers = buffers_of(case, **({"total_qlen": case["qo_indptr"][-1]} if tight else {}))
    lengths = (
        torch.tensor(case[n], dtype=torch.int32) for n in ("qo_indptr", "kv_indptr", "context_lens")
    )
    mla.get_ps_metadata_v1(
        *lengths,
        case["qhead_granularity"],
        case["num_head_k"],
        torch.zeros(2, dtype=torch.uint64),
        *buffers,
        case["qhead_granularity"],
        case["qlen_granularity"],
        case["kvlen_granularity"],
        case["block_size"],
        case["is_causal"],
        num_cu=case["num_cu"],
    )
    for name, buffer in zip(LISTS, buffers, strict=True):
        assert buffer[: len(case[name])].tolist() == case[name]
        rest = buffer[len(case[name]) :]
        assert (rest == (case[name][-1] if name == "reduce_indptr" else -7)).all()


# --- what a schedule computes ---------------------------------------------------------------------------


@st.composite
def batches(draw):
    """A batch and how to cut it; lengths around the granularities."""
    block_size = draw(st.sampled_from([1, 1, 4]))
    kvlen = block_size * draw(st.sampled_from([1, 4]))
    is_causal = draw(st.booleans())
    ratio = draw(st.sampled_from([1, 2]))
    q_lens = draw(st.lists(st.integers(0, 21), min_size=1, max_size=5))
    context = [n + draw(st.integers(0, 33)) for n in q_lens]
    if not is_causal:
        context = [draw(st.integers(0, 40)) for _ in q_lens]
    return {
        "qo_indptr": np.cumsum([0, *q_lens]).tolist(),
        "kv_indptr": np.cumsum([0, *(-(-n // block_size) for n in context)]).tolist(),
        "context_lens": context,
        "num_head_k": draw(st.sampled_from([1, 2, 3])),
        "num_cu": draw(st.sampled_from([1, 2, 6, 15, 40])),
        "qhead_granularity": ratio,
        "qlen_granularity": draw(st.sampled_from([4, 8])),
        "kvlen_granularity": kvlen,
        "block_size": block_size,
        "is_causal": is_causal,
        "max_qlen": max(q_lens),
    }


def dense_attention(q, k, v, case, pages, scale):
    """One request at a time, whole matrices."""
    out, lse = torch.zeros(*q.shape[:2], v.shape[-1]).double(), torch.empty(q.shape[:2]).double()
    qo, kv = case["qo_indptr"], case["kv_indptr"]
    for b, length in enumerate(case["context_lens"]):
        rows = slice(qo[b], qo[b + 1])
        own = pages[kv[b] : kv[b + 1]].long()
        keys, values = (t[own].flatten(0, 1)[:length].double() for t in (k, v))
        keys, values = (t.repeat_interleave(case["qhead_granularity"], 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) * scale
        n = qo[b + 1] - qo[b]
        if case["is_causal"]:
            visible = torch.arange(length)[None, :] <= (torch.arange(n) + length - n)[:, None]
            scores = scores.masked_fill(~visible, float("-inf"))
        lse[rows] = torch.logsumexp(scores, -1).T
        weights = torch.exp(scores - lse[rows].T.clamp(min=-1e30)[..., None])
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
    return out, lse


def random_tensors(case, d=8, dv=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads_q = case["num_head_k"] * case["qhead_granularity"]
    num_pages = case["kv_indptr"][-1]
    pages = torch.randperm(num_pages + 2, generator=generator)[:num_pages]
    q = torch.randn(case["qo_indptr"][-1], heads_q, d, generator=generator)
    shape = (num_pages + 2, case["block_size"], case["num_head_k"])
    k = torch.randn(*shape, d, generator=generator)
    v = torch.randn(*shape, dv, generator=generator)
    return q, k, v, pages


@pytest.mark.parametrize("plan", [persistent.plan, persistent.plan_whole_tiles])
@settings(max_examples=150, deadline=None)
@given(case=batches())
def test_execution_and_reduction_equal_dense_attention(plan, case):
    """Every row of the output is written once, and no unwritten row of the partials is read."""
    work = planned(case, plan)
    assume(work is not None)
    q, k, v, pages = random_tensors(case)
    heads, rows = q.shape[1], max(work.partial_rows, 1)
    out, lse, partial_out, partial_lse = (
        torch.full(shape, torch.nan, dtype=torch.float64)
        for shape in ((len(q), heads, 4), (len(q), heads), (rows, heads, 4), (rows, heads))
    )
    persistent.execute(
        work,
        q,
        k,
        v,
        qo_indptr=case["qo_indptr"],
        kv_indptr=case["kv_indptr"],
        context_lens=case["context_lens"],
        kv_page_indices=pages,
        softmax_scale=0.3,
        is_causal=case["is_causal"],
        out=out,
        lse=lse,
        partial_out=partial_out,
        partial_lse=partial_lse,
    )
    persistent.reduce(work, partial_out, partial_lse, out, lse)
    want, want_lse = dense_attention(q, k, v, case, pages, 0.3)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_plans_stay_within_the_tight_bounds(case):
    work = planned(case)
    sizes = [_shape(size)[0] for size, _ in info_of(case, total_qlen=case["qo_indptr"][-1])]
    for name, size in zip(LISTS, sizes[1:], strict=True):
        assert len(getattr(work, name)) <= size, name
    assert work.partial_rows <= sizes[5] * case["qlen_granularity"]


@settings(max_examples=100, deadline=None)
@given(batches())
def test_work_is_dealt_out_evenly(case):
    """Compute units of a cluster differ by at most one unit of keys for each of its heads."""
    work = planned(case)
    _, per = persistent.clusters(case["num_head_k"], case["num_cu"])
    units = case["kvlen_granularity"] // case["block_size"]
    loads = []
    for cu in range(per):
        items = [
            Item(*row) for row in work.work_info[slice(*work.work_indptr[cu : cu + 2])].tolist()
        ]
        first = [i for i in items if i.heads == (items[0].heads if items else 0)]
        loads.append(sum(-(-(i.kv_end - i.kv_start) // units) for i in first))
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("q_lens", "k_lens", "heads", "causal"),
    [
        ((16384,), (16384,), 16, True),
        ((4096,) * 4, (4096,) * 4, 16, True),
        ((1, 5000, 30, 700), (300, 5000, 9000, 700), 16, True),
        ((2048,), (16384,), 16, False),
    ],
)
def test_whole_tiles_are_dealt_out_evenly(q_lens, k_lens, heads, causal):
    lists = [np.cumsum([0, *lens]) for lens in (q_lens, k_lens)]
    work = persistent.plan_whole_tiles(
        *lists,
        k_lens,
        num_heads_k=heads,
        num_cu=132,
        granularity=Granularity(1, 128, 128),
        is_causal=causal,
    )
    items = work.work_info
    units = -(-(items[:, 5] - items[:, 4]) // 128) * ((items[:, 7] >> 16) - (items[:, 7] & 0xFFFF))
    worker = np.repeat(np.arange(132), np.diff(work.work_indptr))
    load = np.bincount(worker, units, minlength=132)
    assert load.max() <= 1.1 * load.mean()
    assert work.partial_rows == 0


def test_few_long_tiles_are_cut():
    assert (
        persistent.plan_whole_tiles(
            [0, 128],
            [0, 100_000],
            [100_000],
            num_heads_k=16,
            num_cu=132,
            granularity=Granularity(1, 128, 128),
        )
        is None
    )


# --- refusals -------------------------------------------------------------------------------------------


def make_case(**changes):
    case = {
        "qo_indptr": [0, 4],
        "kv_indptr": [0, 8],
        "context_lens": [8],
        "num_head_k": 2,
        "num_cu": 4,
        "qhead_granularity": 1,
        "qlen_granularity": 8,
        "kvlen_granularity": 4,
        "block_size": 1,
        "is_causal": True,
        "max_qlen": 4,
    }
    return case | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_lens": [3]}, "4 query tokens and 3 keys in request 0.*is_causal=False"),
        ({"context_lens": [9]}, "8 pages of 1 for the 9 keys"),
        ({"kvlen_granularity": 6, "block_size": 4}, "multiple of block_size"),
        ({"qo_indptr": [0, -1]}, "ascending"),
        ({"qo_indptr": [0, 4, 5]}, r"B \+ 1"),
        ({"qlen_granularity": 0}, "at least 1"),
    ],
)
def test_wrong_lengths_are_refused(changes, said):
    with pytest.raises(InvalidInputError, match=said):
        planned(make_case(**changes))


def test_more_queries_than_keys_are_fine_without_a_causal_mask():
    assert len(planned(make_case(context_lens=[3], is_causal=False)).work_info) > 0


def test_small_buffer_is_refused_with_its_size():
    case = make_case()
    buffers = buffers_of(case)
    buffers[1] = buffers[1][:1]
    lengths = (torch.tensor(case[n]) for n in ("qo_indptr", "kv_indptr", "context_lens"))
    with pytest.raises(InvalidInputError, match=r"work_info: got int32 \(1, 8\); want .*\(4, 8\)"):
        mla.get_ps_metadata_v1(
            *lengths, 1, 2, torch.zeros(2, dtype=torch.uint64), *buffers, 1, 8, 4, 1, num_cu=4
        )
