"""The kernels between attention calls: norms, gated activation, and norm + rotation + cache write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headway.kernels.norm_style import NormStyle
from headway.serving.base import HeadNorms, TokenRotary
from headway.serving.flash import normalised, rotated
from tests.kernels.portable_device import DEVICE, requires_device

pytest.importorskip("triton")

from headway.kernels.portable.argmax import argmax
from headway.kernels.portable.gated import Activation, gated
from headway.kernels.portable.norm import rms_norm
from headway.kernels.portable.store import store_tokens, token_slots

pytestmark = requires_device

DTYPE = torch.float16
ROUNDING = 2**-9  # of the largest value: an ulp or two of float16


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def close(mine: Tensor, theirs: Tensor, bound: float = ROUNDING) -> bool:
    error = (mine.float() - theirs.float()).abs().max()
    return bool(error <= bound * theirs.float().abs().max())


@pytest.mark.parametrize("style", list(NormStyle))
@pytest.mark.parametrize("shape", [(1, 5, 64), (1, 3, 4, 24), (7, 40), (1, 300, 16)])
def test_rms_norm(shape: tuple[int, ...], style: NormStyle) -> None:
    torch.manual_seed(0)
    whole = random(*shape[:-2], 3 * shape[-2], shape[-1])
    weight = random(shape[-1])
    for x in (random(*shape), whole[..., 1 : 1 + shape[-2], :]):  # also rows that lie apart
        wide = x.float()
        row = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        wanted = {
            NormStyle.ROUNDED: weight * row.to(DTYPE),
            NormStyle.OFFSET: (row * (1 + weight.float())).to(DTYPE),
            NormStyle.WIDE: (row * weight.float()).to(DTYPE),
        }[style]
        assert close(rms_norm(x, weight, 1e-6, style), wanted)


@pytest.mark.parametrize("width", [8, 1500])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated(activation: Activation, width: int) -> None:
    torch.manual_seed(1)
    x = random(1, 7, 2 * width)
    gate, up = x.chunk(2, dim=-1)
    function = {
        "silu": functional.silu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "gelu": functional.gelu,
    }[activation]
    assert close(gated(x, activation), function(gate.float()).to(DTYPE) * up)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 8, 16])
@pytest.mark.parametrize(("new", "before"), [([1, 1, 1], [3, 0, 18]), ([5, 1, 9], [0, 7, 2])])
def test_store(new: list[int], before: list[int], rotary_dim: int, norms: bool) -> None:
    torch.manual_seed(2)
    page_size, heads, kv_heads, d, dv = 4, 6, 2, 16, 8
    total, columns = sum(new), 8
    ends = torch.tensor([0, *new], device=DEVICE).cumsum(0).to(torch.int32)
    lengths = torch.tensor(before, dtype=torch.int32, device=DEVICE)
    table = torch.randperm(len(new) * columns).view(len(new), columns).to(DEVICE, torch.int32)
    slots = torch.full((total,), -1, dtype=torch.int64, device=DEVICE)
    token_slots(slots, ends, lengths, table, page_size, max(new))
    wanted_slots = [
        int(table[b, (before[b] + i) // page_size]) * page_size + (before[b] + i) % page_size
        for b, count in enumerate(new)
        for i in range(count)
    ]
    assert slots.tolist() == wanted_slots

    both = random(total, heads * d + kv_heads * d + kv_heads * dv)
    q, k, v = (
        part.unflatten(-1, (-1, width))
        for part, width in zip(
            both.split([heads * d, kv_heads * d, kv_heads * dv], dim=-1), (d, d, dv), strict=True
        )
    )
    k_cache = torch.zeros(table.numel(), page_size, kv_heads, d, dtype=DTYPE, device=DEVICE)
    v_cache = torch.zeros(table.numel(), page_size, kv_heads, dv, dtype=DTYPE, device=DEVICE)
    angles = torch.randn(total, rotary_dim // 2, device=DEVICE)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    weights = random(d), random(d)
    done = store_tokens(
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        cos=cos if rotary_dim else None,
        sin=sin if rotary_dim else None,
        q_weight=weights[0] if norms else None,
        k_weight=weights[1] if norms else None,
        eps=1e-6,
    )
    if norms:
        q, k = normalised(q, k, HeadNorms(*weights, 1e-6, int(NormStyle.ROUNDED)))
    if rotary_dim:
        turn = TokenRotary(cos, sin)
        q, k = (rotated(x.transpose(0, 1)[None], turn)[0].transpose(0, 1) for x in (q, k))
    assert close(done, q)
    assert close(k_cache.flatten(0, 1)[slots], k)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)
    others = torch.ones(k_cache.shape[0] * page_size, dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert not k_cache.flatten(0, 1)[others].any()
    assert not v_cache.flatten(0, 1)[others].any()


@pytest.mark.parametrize("width", [7, 4096, 9001])
def test_argmax(width: int) -> None:
    """The first of the largest, as rounded logits often are alike; no number where a row has NaN."""
    torch.manual_seed(2)
    x = random(5, 2 * width)[:, :width].mul(4).round()
    values, places = argmax(x)
    wanted = x.float().amax(-1)
    assert torch.equal(values, wanted)
    assert torch.equal(places, (x.float() == wanted[:, None]).int().argmax(-1))
    x[1, width // 2], x[2, width - 1], x[3] = float("nan"), float("inf"), float("-inf")
    values, places = argmax(x)
    assert torch.isfinite(values).tolist() == [True, False, False, False, True]
    assert ((places >= 0) & (places < width)).all()
    assert argmax(x[:0])[0].shape == (0,)
