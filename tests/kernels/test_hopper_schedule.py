"""The order of ragged tiles: every tile once, longest first, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from headway.kernels.hopper.schedule import HEADER, order_tiles
from tests.kernels.portable_device import DEVICE, requires_device

pytestmark = requires_device


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).to(
        DEVICE
    )


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 128, 700]), st.sampled_from([0, 3, 128, 2000])),
        min_size=1,
        max_size=140,
    ),
    block_m=st.sampled_from([128, 192]),
    pack=st.sampled_from([1, 4]),
    causal=st.booleans(),
    window=st.sampled_from([None, 300]),
)
def test_every_tile_comes_once_and_longest_first(
    lengths: list[tuple[int, int]], block_m: int, pack: int, causal: bool, window: int | None
) -> None:
    rows, keys = (list(side) for side in zip(*lengths, strict=True))
    schedule = order_tiles(
        batch_size=len(rows),
        total_rows=sum(rows) * pack,
        block_m=block_m,
        pack=pack,
        max_seqlen_q=max(*rows, 1),
        max_seqlen_k=max(*keys, 1),
        cu_seqlens_q=cumulative(rows),
        seqused_q=None,
        cu_seqlens_k=cumulative(keys),
        seqused_k=None,
        causal=causal,
        window_tokens=window,
        device=torch.device(DEVICE),
    ).tolist()

    def cost(sequence: int, tile: int) -> int:
        limit = keys[sequence] if window is None else min(keys[sequence], window)
        if not causal:
            return limit
        visible = keys[sequence] - rows[sequence] + (tile + 1) * (block_m // pack)
        return min(max(visible, 0), limit)

    expected = {(b, m) for b, n in enumerate(rows) for m in range(-(-n * pack // block_m))}
    assert schedule[:2] == [0, 0]
    assert schedule[2] == len(expected)
    tiles = list(zip(schedule[HEADER::2], schedule[HEADER + 1 :: 2], strict=False))[: len(expected)]
    assert set(tiles) == expected
    costs = [cost(*tile) for tile in tiles]
    assert costs == sorted(costs, reverse=True)
