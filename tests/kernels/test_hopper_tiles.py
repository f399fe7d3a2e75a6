"""What the prefill launcher decides before it launches: tiles, the order of heads, pieces of keys."""

from __future__ import annotations

import heapq

import pytest

pytest.importorskip("triton")

from headway.kernels.hopper.forward import section_of
from headway.kernels.hopper.tiles import MIN_PIECE, choose_splits, forward_tile, padded_dims

PROCESSORS = 132


@pytest.mark.parametrize(
    ("given", "padded"),
    [
        ((40, 40), (64, 64)),
        ((64, 128), (128, 128)),
        ((96, 96), (128, 128)),
        ((192, 128), (192, 128)),
        ((192, 192), (256, 256)),
        ((264, 64), None),
    ],
)
def test_head_dims_take_the_smallest_tile_that_holds_them(
    given: tuple[int, int], padded: tuple[int, int] | None
) -> None:
    assert padded_dims(*given) == padded


def test_short_causal_calls_keep_three_stages_of_v_unless_paged() -> None:
    stages = {
        (causal, rows, paged): forward_tile(128, 128, causal, rows, paged).stages_v
        for causal in (False, True)
        for rows in (4096, 4097)
        for paged in (False, True)
    }
    assert [call for call, of_v in stages.items() if of_v == 3] == [(True, 4096, False)]


def busy(heads: int, seqlen: int, block_m: int, section: int) -> float:
    """The share of the time that processors work on causal tiles, each taken by the first that is free."""
    longest_first = list(range(-(-seqlen // block_m), 0, -1))
    costs = []
    for first in range(0, heads, section):
        costs += [cost for cost in longest_first for _ in range(first, min(first + section, heads))]
    free = [0.0] * PROCESSORS
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return sum(costs) / PROCESSORS / max(free)


@pytest.mark.parametrize("seqlen", [1024, 4096, 16384])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_sections_of_heads_keep_the_card_busy_to_the_end(
    dims: tuple[int, int], seqlen: int
) -> None:
    """Sixteen heads in sections of three would leave one for the end, and 4% of the card idle."""
    heads = (16 if dims[0] == 192 else 2048 // dims[0]) * 16384 // seqlen
    section = section_of(heads, seqlen, sum(dims), 1, longest_first=True)
    assert busy(heads, seqlen, forward_tile(*dims, True, seqlen).block_m, section) > 0.95


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("heads", [8, 40, 64, 256])
@pytest.mark.parametrize("seqlen", [1, 3000, 40000, 1000000])
def test_sections_keep_heads_that_share_keys_together(heads: int, group: int, seqlen: int) -> None:
    section = section_of(heads, seqlen, 256, group, longest_first=True)
    assert 0 < section <= heads
    assert section % group == 0
    # K and V of a section fit in L2, unless those of one KV head alone do not.
    assert section == group or section // group * seqlen * 512 <= 32 << 20
    assert section_of(heads, seqlen, 256, group, longest_first=False) == group


@pytest.mark.parametrize("tiles", [132, 256, 1000])
def test_tiles_that_fill_the_card_are_not_cut(tiles: int) -> None:
    assert choose_splits(tiles, 260, PROCESSORS) == 1


def test_few_tiles_over_many_keys_are_cut_until_the_card_is_full() -> None:
    assert choose_splits(32, 260, PROCESSORS) == 4
    assert choose_splits(8, 260, PROCESSORS) == 16


@pytest.mark.parametrize("tiles", [1, 8, 32, 100])
@pytest.mark.parametrize("blocks", [1, 4, 9, 30, 260, 8000])
def test_pieces_are_never_short(tiles: int, blocks: int) -> None:
    splits = choose_splits(tiles, blocks, PROCESSORS)
    assert splits == 1 or blocks // splits >= MIN_PIECE
    assert tiles * splits <= 2 * PROCESSORS + tiles
