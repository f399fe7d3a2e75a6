"""The specification against torch's own attention where both define the result, and by hand elsewhere."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import headway
from headway import reference
from headway.problem import Mask

F64 = torch.float64
INF = float("inf")


def attend(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return headway.flash_attn_func(*args, **kwargs, return_lse=True, backend="reference")  # type: ignore


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    sq=st.integers(1, 40),
    sk=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dims=st.sampled_from([(16, 16), (8, 24), (40, 16)]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_torch_sdpa(
    batch: int,
    sq: int,
    sk: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    causal: bool,
    scale: float,
) -> None:
    q, k, v = (
        random(batch, n, h, d)
        for n, h, d in ((sq, heads[0], dims[0]), (sk, heads[1], dims[0]), (sk, heads[1], dims[1]))
    )
    out, lse = attend(q, k, v, causal=causal, softmax_scale=scale)
    visible = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq) if causal else None
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    empty = torch.zeros(sq, dtype=torch.bool) if visible is None else ~visible.any(-1)
    torch.testing.assert_close(out[:, ~empty], want[:, ~empty])
    assert (out[:, empty] == 0).all()
    assert (lse[:, :, empty] == -INF).all()
    assert torch.isfinite(lse[:, :, ~empty]).all()


def test_lse_is_the_natural_logarithm_of_the_sum_of_exponentials() -> None:
    q, k, v = random(1, 2, 1, 4), random(1, 3, 1, 4), random(1, 3, 1, 4)
    _, lse = attend(q, k, v, softmax_scale=0.7)
    want = torch.logsumexp(0.7 * q[0, :, 0] @ k[0, :, 0].T, dim=-1)
    torch.testing.assert_close(lse[0, 0].double(), want, atol=1e-6, rtol=1e-6)


VISIBLE = [
    # mask, sq, sk, rows of visible keys: the tables of FlashAttention's documentation, and more
    (Mask(causal=True, window_right=0), 2, 5, ["11110", "11111"]),
    (Mask(causal=True, window_right=0), 5, 2, ["00", "00", "00", "10", "11"]),
    (Mask(window_left=1, window_right=0), 3, 3, ["100", "110", "011"]),
    (Mask(window_left=1), 3, 3, ["111", "111", "011"]),
    (Mask(window_right=1), 3, 3, ["110", "111", "111"]),
    (Mask(window_left=0, window_right=0), 2, 4, ["0010", "0001"]),
    (Mask(attention_chunk=2), 4, 4, ["1100", "1100", "0011", "0011"]),
    (
        Mask(causal=True, window_right=0, attention_chunk=2),
        2,
        5,
        ["0011 0".replace(" ", ""), "00001"],
    ),
    (Mask(attention_chunk=3), 3, 1, ["0", "0", "1"]),
]


@pytest.mark.parametrize(("mask", "sq", "sk", "rows"), VISIBLE)
def test_which_keys_are_visible(mask: Mask, sq: int, sk: int, rows: list[str]) -> None:
    positions = torch.arange(sq) + sk - sq
    seen = reference.visible_by_position(mask, positions, torch.arange(sk))
    assert ["".join(str(int(x)) for x in row) for row in seen] == rows


@pytest.mark.parametrize("window", [(3, -1), (3, None), [3, -1], (3, 3)])
def test_an_unbounded_side_is_minus_one_or_none(window: tuple[int | None, int | None]) -> None:
    q, k, v = random(1, 6, 1, 8), random(1, 9, 1, 8), random(1, 9, 1, 8)
    out, _ = attend(q, k, v, window_size=window)
    pos = torch.arange(6) + 3
    distance = torch.arange(9)[None] - pos[:, None]
    keep = distance >= -3
    if window[1] == 3:
        keep &= distance <= 3
    scores = (q[0, :, 0] @ k[0, :, 0].T / math.sqrt(8)).masked_fill(~keep, -INF)
    torch.testing.assert_close(out[0, :, 0], scores.softmax(-1) @ v[0, :, 0])


def test_softcap_and_sinks() -> None:
    q, k, v = random(1, 3, 2, 8), random(1, 5, 2, 8), random(1, 5, 2, 8)
    sinks = torch.tensor([0.5, -INF], dtype=F64)
    out, lse = attend(q, k, v, softcap=2.0, sinks=sinks)
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) / math.sqrt(8)
    scores = 2.0 * torch.tanh(scores / 2.0)
    weights = torch.cat((scores, sinks[:, None, None].expand(2, 3, 1)), dim=-1).softmax(-1)
    torch.testing.assert_close(out[0], torch.einsum("hqk,khd->qhd", weights[..., :-1], v[0]))
    with_sink = torch.cat((scores, sinks[:, None, None].expand(2, 3, 1)), -1).logsumexp(-1)
    torch.testing.assert_close(lse[0].double(), with_sink, atol=1e-6, rtol=1e-6)


def test_a_row_without_keys_returns_the_sink_as_its_lse() -> None:
    sinks = torch.tensor([0.25], dtype=F64)
    out, lse = attend(random(1, 1, 1, 8), random(1, 0, 1, 8), random(1, 0, 1, 8), sinks=sinks)
    assert (out == 0).all()
    assert lse.item() == 0.25


def test_mods_see_absolute_positions_and_join_the_causal_mask() -> None:
    q, k, v = random(2, 3, 2, 8), random(2, 7, 2, 8), random(2, 7, 2, 8)
    seen: dict[str, torch.Tensor] = {}

    def score_mod(score, b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
        seen["q_idx"], seen["kv_idx"] = q_idx, kv_idx
        return score + aux[0][b, h]

    def mask_mod(b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
        return kv_idx != 2

    bias = random(2, 2)
    out, _ = attend(
        q, k, v, causal=True, score_mod=score_mod, mask_mod=mask_mod, aux_tensors=[bias]
    )
    assert seen["q_idx"].flatten().tolist() == [4, 5, 6]
    assert seen["kv_idx"].flatten().tolist() == list(range(7))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8) + bias[:, :, None, None]
    keep = torch.ones(3, 7, dtype=torch.bool).tril(4)
    keep[:, 2] = False
    weights = scores.masked_fill(~keep, -INF).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_qv_adds_a_second_product_and_widens_the_default_scale() -> None:
    q, qv, k, v = random(1, 2, 4, 8), random(1, 2, 4, 24), random(1, 5, 1, 8), random(1, 5, 1, 24)
    out, _ = attend(q, k, v, qv=qv)
    scores = q[0].transpose(0, 1) @ k[0, :, 0].T + qv[0].transpose(0, 1) @ v[0, :, 0].T
    want = (scores / math.sqrt(32)).softmax(-1) @ v[0, :, 0]
    torch.testing.assert_close(out[0].transpose(0, 1), want)
    only, _ = attend(q, k, v, qv=qv, only_qv=True)
    want = (qv[0].transpose(0, 1) @ v[0, :, 0].T / math.sqrt(24)).softmax(-1) @ v[0, :, 0]
    torch.testing.assert_close(only[0].transpose(0, 1), want)


def test_scores_of_qv_alone_are_with_values_as_they_are_meant() -> None:
    """only_qv is qv where q·k is zero: what a stored value means is said by v_descale alone."""
    f8 = torch.float8_e4m3fn
    qv, v = random(2, 3, 4, 16).bfloat16(), random(2, 5, 2, 16).to(f8)
    q, k = torch.zeros_like(qv), v
    scales = {"v_descale": torch.rand(2, 2) + 0.5, "softmax_scale": 0.3}
    want, want_lse = attend(q, k, v, qv=qv, **scales)
    out, lse = attend(q, k, v, qv=qv, only_qv=True, **scales)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    out, _ = attend(q, k, v, qv=qv, only_qv=True, **scales, k_descale=torch.full((2, 2), 9.0))
    torch.testing.assert_close(out, want)


def test_float8_descales_are_per_sequence_and_key_value_head() -> None:
    q, k, v = random(2, 1, 4, 16), random(2, 6, 2, 16), random(2, 6, 2, 16)
    f8 = torch.float8_e4m3fn
    scales = {name: torch.rand(2, 2) + 0.5 for name in ("q", "k", "v")}
    wide = {
        "q": q.to(f8).to(F64) * scales["q"].double().repeat_interleave(2, 1)[:, None, :, None],
        "k": k.to(f8).to(F64) * scales["k"].double()[:, None, :, None],
        "v": v.to(f8).to(F64) * scales["v"].double()[:, None, :, None],
    }
    out, _ = attend(
        q.to(f8),
        k.to(f8),
        v.to(f8),
        q_descale=scales["q"],
        k_descale=scales["k"],
        v_descale=scales["v"],
    )
    want, _ = attend(wide["q"], wide["k"], wide["v"])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.to(torch.bfloat16))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_by_pairs(interleaved: bool) -> None:
    x, angle = random(3, 1, 6), torch.rand(9, 2, dtype=F64)
    positions = torch.tensor([4, 0, 8])
    turned = reference.rotate(x, angle.cos(), angle.sin(), positions, interleaved)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    for row, position in enumerate(positions.tolist()):
        for i, (a, b) in enumerate(pairs):
            z = complex(x[row, 0, a], x[row, 0, b]) * complex(
                math.cos(angle[position, i]), math.sin(angle[position, i])
            )
            assert turned[row, 0, a].item() == pytest.approx(z.real)
            assert turned[row, 0, b].item() == pytest.approx(z.imag)
    assert torch.equal(turned[..., 4:], x[..., 4:])


@pytest.mark.parametrize("causal", [True, False])
def test_append_rotates_writes_and_attends(causal: bool) -> None:
    q, k, v = random(2, 3, 2, 16), random(2, 3, 2, 16), random(2, 3, 2, 16)
    k_cache, v_cache = random(2, 10, 2, 16), random(2, 10, 2, 16)
    angle = torch.rand(32, 8, dtype=F64) * 6
    old = torch.tensor([4, 0], dtype=torch.int32)
    want_k, want_q = k_cache.clone(), q.clone()
    for b, start in enumerate(old.tolist()):
        at = start + torch.arange(3)
        want_k[b, start : start + 3] = reference.rotate(k[b], angle.cos(), angle.sin(), at, False)
        own = at if causal else torch.full((3,), start)  # FA3's rule for full attention
        want_q[b] = reference.rotate(q[b], angle.cos(), angle.sin(), own, False)
    out = headway.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        cache_seqlens=old,
        rotary_cos=angle.cos(),
        rotary_sin=angle.sin(),
        rotary_interleaved=False,
        causal=causal,
        backend="reference",
    )
    torch.testing.assert_close(k_cache, want_k)
    assert torch.equal(v_cache[0, 4:7], v[0])
    for b, n in enumerate((7, 3)):
        want, _ = attend(
            want_q[b : b + 1], want_k[b : b + 1, :n], v_cache[b : b + 1, :n], causal=causal
        )
        torch.testing.assert_close(out[b : b + 1], want)


def test_appending_wider_values_to_a_float8_cache_scales_and_saturates() -> None:
    cache = torch.zeros(1, 4, 1, 8).to(torch.float8_e4m3fn)
    values = cache.clone()
    k = torch.full((1, 1, 1, 8), 3000.0)
    descale = torch.full((1, 1), 2.0)
    headway.flash_attn_with_kvcache(
        torch.zeros(1, 1, 1, 8),
        cache,
        values,
        k=k,
        v=torch.full_like(k, 6.0),
        cache_seqlens=0,
        k_descale=descale,
        v_descale=descale,
        backend="reference",
    )
    assert (cache[0, 0].float() == 448.0).all()
    assert (values[0, 0].float() == 3.0).all()


def test_rotated_float8_saturates() -> None:
    x = torch.full((1, 1, 4), 448.0).to(torch.float8_e4m3fn)
    ones = torch.ones(1, 1)
    turned = reference.rotate(x, ones, ones, torch.tensor([0]), True)
    assert turned.dtype == x.dtype
    assert turned.float().tolist() == [[[0.0, 448.0, 448.0, 448.0]]]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), min_size=0, max_size=3), causal=st.booleans())
def test_merging_parts_equals_the_whole(cuts: list[int], causal: bool) -> None:
    q, k, v = random(2, 3, 2, 8), random(2, 12, 2, 8), random(2, 12, 2, 8)
    want, want_lse = attend(q, k, v)
    edges = [0, *sorted(cuts), 12]
    parts = [attend(q, k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(edges)]
    out, lse = headway.merge_states([o for o, _ in parts], [x for _, x in parts])
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", [-INF, INF, float("nan")])
def test_combine_reads_every_convention_of_an_empty_part(empty: float) -> None:
    out_partial = torch.randn(3, 2, 4, 2, 8)
    lse_partial = torch.randn(3, 2, 4, 2)
    lse_partial[1], out_partial[1] = empty, float("nan")
    out, lse = headway.flash_attn_combine(out_partial, lse_partial)
    weights = torch.softmax(lse_partial[[0, 2]], dim=0)[..., None]
    torch.testing.assert_close(out, (weights * out_partial[[0, 2]]).sum(0))
    torch.testing.assert_close(lse, lse_partial[[0, 2]].logsumexp(0))
    nothing, none = headway.flash_attn_combine(out_partial[1:2], lse_partial[1:2])
    assert (nothing == 0).all()
    assert (none == -INF).all()
