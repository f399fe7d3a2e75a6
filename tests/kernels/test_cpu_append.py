"""The compiled append: where rows go, how they are rotated, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from headway.kernels.cpu.append import AppendCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, position: int, interleaved: bool) -> Tensor:
    """One (H, D) row of heads at a position, in float64."""
    half = cos.shape[1]
    c, s = cos[position].double(), sin[position].double()
    out = x.double().clone()
    pairs = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    a, b = x[:, pairs[0]].double(), x[:, pairs[1]].double()
    out[:, pairs[0]], out[:, pairs[1]] = a * c - b * s, a * s + b * c
    return out


def tolerance(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


@settings(max_examples=120, deadline=None)
@given(
    old=st.lists(st.sampled_from([0, 1, 7, 30]), min_size=1, max_size=4),
    new=st.sampled_from([0, 1, 5, 40]),
    page_size=st.sampled_from([None, 1, 7, 16, 64]),
    ragged=st.booleans(),
    rotary=st.sampled_from([None, "all", "half"]),
    interleaved=st.booleans(),
    own=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_land_rotated_at_their_places(
    old: list[int],
    new: int,
    page_size: int | None,
    ragged: bool,
    rotary: str | None,
    interleaved: bool,
    own: bool,
    shifted: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    batch, heads_q, heads_k, d, dv = len(old), 3, 2, 32, 24
    lengths = [(new + i) % 41 if ragged else new for i in range(batch)]
    k_new = [torch.randn(n, heads_k, d).to(dtype) for n in lengths]
    v_new = [torch.randn(n, heads_k, dv).to(dtype) for n in lengths]
    q = [torch.randn(n, heads_q, d).to(dtype) for n in lengths]
    half = {None: 0, "all": d // 2, "half": d // 4}[rotary]
    angles = torch.randn(200, half)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    starts = [3 + i for i in range(batch)]
    base = starts if shifted else old
    capacity = max(old) + 45
    size = page_size or capacity
    per_row = -(-capacity // size)
    table = torch.randperm(batch * per_row).view(batch, per_row).int()
    if page_size is None:
        table = torch.arange(batch).view(batch, 1).int()
    k = torch.full((batch * per_row, size, heads_k, d), 9.0, dtype=dtype)
    v = torch.full((batch * per_row, size, heads_k, dv), 9.0, dtype=dtype)

    def pack(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows) if ragged else torch.stack(rows)

    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q_out = torch.empty_like(pack(q))
    AppendCall(
        pack(k_new),
        pack(v_new),
        k,
        v,
        seqlens_k=torch.tensor(old, dtype=torch.int32),
        cu_seqlens_new=cu if ragged else None,
        page_table=None if page_size is None else table,
        rotary_cos=cos if rotary else None,
        rotary_sin=sin if rotary else None,
        rotary_interleaved=interleaved,
        rotary_seqlens=torch.tensor(starts, dtype=torch.int32) if shifted else None,
        q=pack(q),
        q_out=q_out,
        cu_seqlens_q=cu if ragged else None,
        q_at_own_positions=own,
    ).run()
    touched = torch.zeros(k.shape[:2], dtype=torch.bool)
    for b in range(batch):
        q_rows = q_out[cu[b] : cu[b + 1]] if ragged else q_out[b]
        for i in range(lengths[b]):
            page, offset = int(table[b, (old[b] + i) // size]), (old[b] + i) % size
            touched[page, offset] = True
            assert torch.equal(v[page, offset], v_new[b][i])
            if rotary is None:
                assert torch.equal(k[page, offset], k_new[b][i])
                continue
            want_k = rotated(k_new[b][i], cos, sin, base[b] + i, interleaved)
            want_q = rotated(q[b][i], cos, sin, base[b] + (i if own else 0), interleaved)
            bound = tolerance(dtype)
            torch.testing.assert_close(k[page, offset].double(), want_k, rtol=bound, atol=bound)
            torch.testing.assert_close(q_rows[i].double(), want_q, rtol=bound, atol=bound)
    assert (k[~touched] == 9).all()
    assert (v[~touched] == 9).all()


def test_cache_batch_idx_picks_the_row_and_dtypes_may_differ() -> None:
    k = torch.zeros(4, 8, 1, 16, dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    new = torch.randn(2, 3, 1, 16)
    AppendCall(
        new,
        -new,
        k,
        v,
        seqlens_k=torch.tensor([0, 5], dtype=torch.int32),
        cache_batch_idx=torch.tensor([3, 1], dtype=torch.int32),
    ).run()
    assert torch.equal(k[3, :3], new[0].bfloat16())
    assert torch.equal(v[1, 5:8], -new[1].bfloat16())
    assert (k[[0, 2]] == 0).all()


def test_many_tokens_are_shared_out_over_threads() -> None:
    k = torch.zeros(100, 16, 4, 64)
    v = torch.zeros_like(k)
    new = torch.randn(1000, 4, 64)
    table = torch.randperm(100).int()[None]
    AppendCall(
        new,
        new + 1,
        k,
        v,
        seqlens_k=torch.tensor([17], dtype=torch.int32),
        cu_seqlens_new=torch.tensor([0, 1000], dtype=torch.int32),
        page_table=table,
    ).run()
    rows = k[table[0].long()].flatten(0, 1)[17:1017]
    assert torch.equal(rows, new)
    assert torch.equal(v[table[0].long()].flatten(0, 1)[17:1017], new + 1)
