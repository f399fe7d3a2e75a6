"""Keys and values in float8 by scales of blocks, against torch, on a GPU or interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headway.kernels.hopper.quantise_blocks import quantise_blocks
from tests.kernels.portable_device import DEVICE, requires_device

pytestmark = requires_device

FLOAT8 = torch.float8_e4m3fn
BLOCK, LENGTHS, HEADS = 16, (40, 0, 16, 7), 2


def draw(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), HEADS, width, generator=generator).bfloat16().to(DEVICE)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)


def own_scale(x: Tensor) -> Tensor:
    size = x.float().abs()
    largest = torch.where(size < math.inf, size, 0).max()
    return torch.where(largest > 0, (largest / 448).clamp(min=2.0**-80), 1.0)


def in_float8(x: Tensor, scale: Tensor) -> Tensor:
    scaled = x.float() * (1 / scale)
    return torch.where(scaled.isnan(), scaled, scaled.clamp(-448, 448)).to(FLOAT8).float()


def in_order(values: Tensor) -> Tensor:
    """Transposed values (heads, Dv, keys) with keys in the order of the sequence."""
    return values.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.bfloat16), (16, torch.float16)])
@pytest.mark.parametrize("given", [(0, 0), (1, 0), (0, HEADS), (1, HEADS)])
def test_blocks_by_scales_given_or_their_own(
    given: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    k, v = draw(width, 1).to(dtype), draw(8, 2).to(dtype)
    k[3, 0, 2], k[5, 1, 1], v[4, 1, 7] = math.inf, math.nan, -math.inf
    k[16:32] *= 100
    v[16:32] = 0
    v[40:56] *= 1e-30 if dtype == torch.bfloat16 else 1e-4
    scales = tuple(torch.rand(n, device=DEVICE) + 0.01 if n else None for n in given)
    padded = [-(-n // BLOCK) * BLOCK for n in LENGTHS]
    first, place = starts(list(LENGTHS)), starts(padded)
    keys, values, records = quantise_blocks(
        k, v, scales, first, place, sum(padded), max(LENGTHS), FLOAT8, block_n=BLOCK, num_warps=4
    )
    assert (records is None) == all(given)
    for b, length in enumerate(LENGTHS):
        own_values = in_order(values[:, :, place[b] : place[b + 1]])
        assert not own_values[..., length:].any()
        for start, head in ((s, h) for s in range(0, length, BLOCK) for h in range(HEADS)):
            n = min(BLOCK, length - start)
            rows = slice(int(first[b]) + start, int(first[b]) + start + n)
            pieces = k[rows, head], v[rows, head]
            used = [
                own_scale(x) if s is None else s.expand(HEADS)[head]
                for x, s in zip(pieces, scales, strict=True)
            ]
            if records is not None:
                record = records[head, (int(place[b]) + start) // BLOCK]
                want = torch.stack([*used, 1 / used[1]])
                torch.testing.assert_close(record[:3], want, rtol=1e-6, atol=0)
                used = [record[0], record[1]]
            got = keys[rows, head].float(), own_values[head, :, start : start + n].T
            for x, scale, stored in zip(pieces, used, got, strict=True):
                torch.testing.assert_close(
                    stored, in_float8(x, scale), rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("heads", [1, HEADS])
def test_keys_in_two_pieces(heads: int) -> None:
    k, v, rope = draw(16, 1), draw(8, 2), draw(8, 3)[:, :heads]
    whole = torch.cat((k, rope.expand(-1, HEADS, -1)), dim=-1)
    padded = [-(-n // BLOCK) * BLOCK for n in LENGTHS]
    how = starts(list(LENGTHS)), starts(padded), sum(padded), max(LENGTHS), FLOAT8
    want = quantise_blocks(whole, v, (None, None), *how, block_n=BLOCK, num_warps=4)
    got = quantise_blocks(k, v, (None, None), *how, k_rope=rope, block_n=BLOCK, num_warps=4)
    assert torch.equal(got[0].float(), want[0].float())
    assert got[2] is not None
    assert want[2] is not None
    torch.testing.assert_close(got[2][..., :3], want[2][..., :3], rtol=0, atol=0, equal_nan=True)
