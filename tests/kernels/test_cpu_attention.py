"""The compiled CPU attention kernel against a float64 reference, over its features together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from headway.kernels.cpu.attention import AttentionCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One call: plain per-sequence tensors, and how they are laid out for the kernel."""

    lengths_q: list[int]
    lengths_k: list[int]
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "paged"
    page_size: int = 16
    ragged_q: bool = True
    leftpads: list[int] | None = None
    reorder_rows: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk: int = 0
    softcap: float = 0.0
    use_sinks: bool = False
    seed: int = 0
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        self.q = [random(n, self.heads_q, self.head_dim) for n in self.lengths_q]
        self.k = [random(n, self.heads_k, self.head_dim) for n in self.lengths_k]
        self.v = [random(n, self.heads_k, self.head_dim_v) for n in self.lengths_k]
        if self.use_sinks:
            self.sinks = torch.randn(self.heads_q, generator=generator)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


def visible(case: Case, length_q: int, length_k: int) -> Tensor:
    position = torch.arange(length_q)[:, None] + length_k - length_q
    key = torch.arange(length_k)[None, :]
    seen = torch.ones(length_q, length_k, dtype=torch.bool)
    left, right = case.window
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    if case.chunk:
        same = torch.div(key, case.chunk, rounding_mode="floor")
        seen &= same == torch.div(position, case.chunk, rounding_mode="floor")
    return seen


def attend(case: Case, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (Sq, Hq, Dv) and lse (Hq, Sq) of sequence i, computed in ``dtype``."""
    group = case.heads_q // case.heads_k
    q, k, v = (t[i].to(dtype).transpose(0, 1) for t in (case.q, case.k, case.v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~visible(case, q.shape[1], k.shape[1]), float("-inf"))
    if case.sinks is not None:
        logits = case.sinks.to(dtype)[:, None, None].expand(-1, q.shape[1], 1)
        scores = torch.cat((scores, logits), dim=-1)
        v = torch.cat(
            (
                v,
                torch.zeros_like(v[:, :1])
                if v.shape[1]
                else v.new_zeros(v.shape[0], 1, v.shape[2]),
            ),
            1,
        )
    lse = (
        torch.logsumexp(scores, -1)
        if scores.shape[-1]
        else scores.new_full(scores.shape[:2], float("-inf"))
    )
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return (weights @ v).transpose(0, 1), lse


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def lay_out(case: Case) -> dict[str, Any]:
    """The kernel's keyword arguments; rows that are no key hold NaN, unused page entries junk."""
    batch = len(case.lengths_k)
    pads = case.leftpads or [0] * batch
    ends = [pad + n for pad, n in zip(pads, case.lengths_k, strict=True)]
    arguments: dict[str, Any] = {"seqlens_k": torch.tensor(ends, dtype=torch.int32)}
    if case.leftpads is not None:
        arguments["leftpad_k"] = torch.tensor(pads, dtype=torch.int32)
    if case.layout == "ragged":
        starts = [0, *torch.tensor(case.lengths_k).cumsum(0).tolist()]
        arguments = {"cu_seqlens_k": torch.tensor(starts, dtype=torch.int32)}
        arguments |= {"k": torch.cat(case.k), "v": torch.cat(case.v)}
        return arguments
    order = list(range(batch))
    rows = batch
    if case.reorder_rows:
        order = [batch - i for i in range(batch)]
        rows = batch + 1
        arguments["cache_batch_idx"] = torch.tensor(order, dtype=torch.int32)
    longest = max(ends) + 3
    if case.layout == "dense":
        k = poisoned(rows, longest, case.heads_k, case.head_dim, dtype=case.dtype)
        v = poisoned(rows, longest, case.heads_k, case.head_dim_v, dtype=case.dtype)
        for i in range(batch):
            k[order[i], pads[i] : ends[i]] = case.k[i]
            v[order[i], pads[i] : ends[i]] = case.v[i]
        return arguments | {"k": k, "v": v}
    size = case.page_size
    per_row = -(-longest // size)
    free = torch.randperm(rows * per_row + 2, generator=torch.Generator().manual_seed(case.seed))
    k = poisoned(len(free), size, case.heads_k, case.head_dim, dtype=case.dtype)
    v = poisoned(len(free), size, case.heads_k, case.head_dim_v, dtype=case.dtype)
    table = torch.full((rows, per_row + 1), 1 << 30, dtype=torch.int32)
    for i in range(batch):
        for position in range(pads[i], ends[i]):
            page = int(free[i * per_row + position // size])
            table[order[i], position // size] = page
            k[page, position % size] = case.k[i][position - pads[i]]
            v[page, position % size] = case.v[i][position - pads[i]]
    return arguments | {"k": k, "v": v, "page_table": table}


def run(case: Case) -> list[tuple[Tensor, Tensor]]:
    """The kernel's out (Sq, Hq, Dv) and lse (Hq, Sq) for each sequence."""
    arguments = lay_out(case)
    if case.ragged_q:
        starts = [0, *torch.tensor(case.lengths_q).cumsum(0).tolist()]
        arguments["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
        q = torch.cat(case.q)
        lse = torch.full((case.heads_q, q.shape[0]), 7.0)
    else:
        longest = max(case.lengths_q)
        q = poisoned(len(case.q), longest, case.heads_q, case.head_dim, dtype=case.dtype)
        for i, rows in enumerate(case.q):
            q[i, : rows.shape[0]] = rows
        arguments["seqused_q"] = torch.tensor(case.lengths_q, dtype=torch.int32)
        lse = torch.full((len(case.q), case.heads_q, longest), 7.0)
    out = torch.full((*q.shape[:-1], case.head_dim_v), 7.0, dtype=case.dtype)
    AttentionCall(
        q,
        arguments.pop("k"),
        arguments.pop("v"),
        out,
        lse,
        softmax_scale=case.scale,
        window_left=case.window[0],
        window_right=case.window[1],
        attention_chunk=case.chunk,
        softcap=case.softcap,
        sinks=case.sinks,
        **arguments,
    ).run()
    if case.ragged_q:
        return list(zip(out.split(case.lengths_q), lse.split(case.lengths_q, dim=1), strict=True))
    assert all((out[i, n:] == 7).all() for i, n in enumerate(case.lengths_q))
    return [(out[i, :n], lse[i, :, :n]) for i, n in enumerate(case.lengths_q)]


def check(case: Case) -> None:
    """Errors at most twice those of torch at the same precision, as FlashAttention's own tests ask."""
    for i, (out, lse) in enumerate(run(case)):
        exact, exact_lse = attend(case, i, torch.float64)
        same, same_lse = attend(case, i, case.dtype)
        rounding = torch.finfo(case.dtype).eps * (exact.abs().max().item() if exact.numel() else 0)
        allowed = 2 * (same.double() - exact).abs().max().item() + rounding if exact.numel() else 0
        assert torch.isfinite(out).all()
        assert exact.numel() == 0 or (out.double() - exact).abs().max().item() <= allowed + 1e-6
        empty = exact_lse == float("-inf")
        assert torch.equal(lse == float("-inf"), empty)
        bound = (
            2 * (same_lse.double() - exact_lse)[~empty].abs().max().item() if (~empty).any() else 0
        )
        error = (lse.double() - exact_lse)[~empty].abs()
        assert error.numel() == 0 or error.max().item() <= min(bound, 1e-3) + 1e-5


lengths = st.sampled_from([0, 1, 2, 5, 17, 63, 64, 65, 130, 200])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 4))
    heads_k = draw(st.sampled_from([1, 2, 3]))
    layout = draw(st.sampled_from(["paged", "dense", "ragged"]))
    side = st.one_of(st.none(), st.integers(0, 70))
    return Case(
        lengths_q=[draw(lengths) for _ in range(batch)],
        lengths_k=[draw(lengths) for _ in range(batch)],
        heads_k=heads_k,
        heads_q=heads_k * draw(st.sampled_from([1, 2, 3, 4, 7, 70])),
        head_dim=draw(st.sampled_from([8, 16, 24, 64, 128])),
        head_dim_v=draw(st.sampled_from([8, 16, 40, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layout,
        page_size=draw(st.sampled_from([1, 7, 16, 64])),
        ragged_q=draw(st.booleans()),
        leftpads=None
        if layout == "ragged" or draw(st.booleans())
        else [draw(st.integers(0, 20)) for _ in range(batch)],
        reorder_rows=draw(st.booleans()),
        window=(draw(side), draw(st.one_of(st.just(0), side))),
        chunk=draw(st.sampled_from([0, 0, 16, 50])),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        use_sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_agrees_with_the_reference_over_all_features(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_sequence_is_split_over_threads(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case([1], [5000], heads_q=4, heads_k=1, head_dim=64, head_dim_v=64, dtype=dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_mixed_batch_of_prefill_chunks_and_decodes(page_size: int) -> None:
    check(
        Case(
            lengths_q=[1, 300, 0, 1, 33],
            lengths_k=[1000, 300, 50, 1, 700],
            window=(None, 0),
            page_size=page_size,
            dtype=torch.bfloat16,
            head_dim=64,
            head_dim_v=64,
            heads_q=9,
            heads_k=3,
        )
    )


def test_rows_that_see_nothing_are_zero_with_an_empty_lse() -> None:
    case = Case([5], [2], window=(None, 0))
    ((out, lse),) = run(case)
    assert (out[:3] == 0).all()
    assert (lse[:, :3] == float("-inf")).all()
    assert torch.isfinite(lse[:, 3:]).all()


def test_rows_that_see_only_the_sink_have_its_value_as_lse() -> None:
    case = Case([3], [0], use_sinks=True)
    ((out, lse),) = run(case)
    assert case.sinks is not None
    assert (out == 0).all()
    torch.testing.assert_close(lse, case.sinks[:, None].expand(-1, 3))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32, None])
def test_float8_caches_are_descaled(kv_dtype: torch.dtype, q_dtype: torch.dtype | None) -> None:
    torch.manual_seed(1)
    k, v = (torch.randn(2, 90, 2, 32).to(kv_dtype) for _ in range(2))
    q = torch.randn(2, 1, 6, 32).to(q_dtype or kv_dtype)
    k_descale, v_descale = torch.rand(2, 2) + 0.5, torch.rand(2, 2) + 0.5
    q_descale = torch.rand(1, 1).add(0.5).expand(2, 2) if q_dtype is None else None
    out = torch.empty(2, 1, 6, 32)
    AttentionCall(
        q,
        k,
        v,
        out,
        softmax_scale=0.2,
        k_descale=k_descale,
        v_descale=v_descale,
        q_descale=q_descale,
    ).run()
    wide_q = q.double() * (1 if q_descale is None else q_descale.double()[0, 0])
    wide_k = k.double() * k_descale.double()[:, None, :, None]
    wide_v = v.double() * v_descale.double()[:, None, :, None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        wide_q.transpose(1, 2),
        wide_k.transpose(1, 2),
        wide_v.transpose(1, 2),
        scale=0.2,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_views_of_a_fused_projection_are_read_in_place() -> None:
    torch.manual_seed(2)
    fused = torch.randn(3, 20, 4 + 2 + 2, 16)
    q, k, v = fused.split([4, 2, 2], dim=2)
    out = torch.empty(3, 20, 4, 16)
    AttentionCall(q, k, v, out, softmax_scale=0.25, window_right=0).run()
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)),
        scale=0.25,
        is_causal=True,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
