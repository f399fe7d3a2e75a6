"""Tile choices of the forward kernel: a table of data, and where each row was measured."""

from __future__ import annotations

from dataclasses import dataclass

from headway.kernels._triton import cdiv

#: Key blocks of a piece where a tile's keys are cut into pieces, at least.
MIN_PIECE = 4

#: Boxes of fewer rows than this are slower than rows one by one; the copy engine takes none below 8.
MIN_BOX_ROWS = 8

_READING = "benchmarks/results/h200/hopper-prefill.json"


@dataclass(frozen=True)
class ForwardTile:
    """How one CTA works on one tile of query rows.

    Every 64 rows of ``block_m`` are a consumer warpgroup; K and V travel in blocks of ``block_n`` keys,
    ``stages`` of each in flight; ``q_slots`` tiles of Q are resident, so with 2 the next one is
    prefetched. QK runs in pieces of ``piece`` elements of the head dim, of which ``q_in_registers``
    are kept in registers. ``overlap``: softmax runs beside the PV product of the previous block in the
    same warpgroup, and not only beside the other warpgroups' products. Output passes through Q's buffer, or
    with ``out_columns`` through one of its own, so many columns at a time, and Q's is free for the next
    tile as soon as the last product with it is done.
    """

    block_m: int
    block_n: int
    stages: int
    q_slots: int
    piece: int
    q_in_registers: int
    overlap: bool
    reading: str
    out_columns: int = 0
    stages_v: int = 0  # of V, where they are not as many as K's


@dataclass(frozen=True)
class _Row:
    """A tile for calls with these head dims, as padded; None stands for any."""

    head_dim: int
    head_dim_v: int
    causal: bool | None
    max_seqlen_q: int | None
    tile: ForwardTile
    paged: bool | None = None


#: The first row that fits a call decides.
FORWARD_TILES: tuple[_Row, ...] = (
    _Row(64, 64, None, 2048, ForwardTile(128, 128, 4, 2, 64, 0, True, _READING)),
    _Row(64, 64, None, None, ForwardTile(192, 128, 5, 2, 64, 0, False, _READING, 0, 4)),
    _Row(128, 128, True, 4096, ForwardTile(128, 128, 2, 2, 128, 0, True, _READING, 0, 3), False),
    _Row(128, 128, None, None, ForwardTile(128, 128, 2, 2, 128, 0, True, _READING)),
    _Row(192, 128, None, None, ForwardTile(128, 128, 2, 1, 64, 0, True, _READING, 64)),
    _Row(256, 256, True, None, ForwardTile(128, 64, 2, 1, 256, 0, True, _READING, 128)),
    _Row(256, 256, None, None, ForwardTile(128, 64, 2, 1, 128, 1, False, _READING, 128)),
)


def padded_dims(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """The smallest head dims in :data:`FORWARD_TILES` that hold these two, or None."""
    dims = {(row.head_dim, row.head_dim_v) for row in FORWARD_TILES}
    return min((d for d in dims if d[0] >= head_dim and d[1] >= head_dim_v), key=sum, default=None)


def forward_tile(
    head_dim: int, head_dim_v: int, causal: bool, max_seqlen_q: int, paged: bool = False
) -> ForwardTile:
    """The tile for a call whose head dims, as padded, are in the table."""
    for row in FORWARD_TILES:
        if (
            (row.head_dim, row.head_dim_v) == (head_dim, head_dim_v)
            and row.causal in (None, causal)
            and row.paged in (None, paged)
            and (row.max_seqlen_q is None or max_seqlen_q <= row.max_seqlen_q)
        ):
            return row.tile
    raise KeyError((head_dim, head_dim_v))


#: What a piece costs beside its blocks, and what the merge costs, its launch included, in the time of one
#: block. Readings: docs/notes/hopper-prefill.md.
_PIECE_BLOCKS, _MERGE_BLOCKS = 4, 12
#: Pieces save nothing where tiles go round the card more often than this.
_MAX_ROUNDS = 2
#: Splitting must promise this much of the time without.
_WORTH = 0.9


def choose_splits(tiles: int, blocks: int, processors: int) -> int:
    """Pieces that the keys of ``tiles`` tiles, ``blocks`` long, are best cut into; 1: not at all."""
    if tiles > _MAX_ROUNDS * processors:
        return 1

    def time(splits: int) -> int:
        return cdiv(tiles * splits, processors) * (cdiv(blocks, splits) + _PIECE_BLOCKS)

    most = min(max(blocks // MIN_PIECE, 1), cdiv(_MAX_ROUNDS * processors, tiles))
    best = min(range(1, most + 1), key=time)
    return best if time(best) + _MERGE_BLOCKS < _WORTH * time(1) else 1
