"""Tile sizes: rows of data per op, head dimension, element width and architecture.

``source`` says which reading a row comes from. A row without one was chosen for zero register spills and
for shared memory, by compiling, and waits for a device of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Op = Literal["forward", "decode", "mla"]

COMPILED = "chosen by compiling"


@dataclass(frozen=True)
class Tile:
    """Query rows and keys per step of a program, and how the compiler spreads and pipelines it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 2  # per multiprocessor, that the planner of a decode step counts on
    hoist: bool = True  # False: registers are short, so nothing is kept that can be computed again


@dataclass(frozen=True)
class Row:
    """Applies to calls of ``op`` up to ``max_dim`` (of head_dim and head_dim_v, as padded) on ``archs``."""

    op: Op
    archs: tuple[str, ...]  # architecture names, or prefixes of them
    max_dim: int
    max_rows: int  # packed query rows
    tile: Tile
    source: str = COMPILED
    max_key_bytes: int = 2
    max_cache_bytes: int = 1 << 62  # of the keys and values of all sequences together


ANY_ROWS = 1 << 30

_SM9_10 = ("sm90", "sm100", "sm103")
H200 = "benchmarks/results/h200/portable_tiles.json"

#: Float8 caches on Hopper: steps too short to fill the device want few steps per program, long ones many
#: keys in flight.
_FLOAT8_128 = (
    Row("decode", ("sm90",), 128, 16, Tile(16, 64, 4, 3, 2), H200, 1, 24 << 20),
    Row("decode", ("sm90",), 128, 16, Tile(16, 16, 1, 4, 8), H200, 1, 192 << 20),
    Row("decode", ("sm90",), 128, 16, Tile(16, 64, 2, 3, 4), H200, 1),
)

#: First match wins.
TABLE: tuple[Row, ...] = (
    Row("forward", ("interpreter",), 512, ANY_ROWS, Tile(32, 32, 4, 1)),
    Row("decode", ("interpreter",), 512, 16, Tile(16, 32, 4, 1)),
    Row("decode", ("interpreter",), 512, ANY_ROWS, Tile(32, 32, 4, 1)),
    Row("mla", ("interpreter",), 1024, ANY_ROWS, Tile(32, 32, 4, 1)),
    # Hopper and data-centre Blackwell: 227 KiB of shared memory; Blackwell's compiler keeps more there.
    Row("forward", ("sm10",), 64, ANY_ROWS, Tile(128, 64, 8, 4, hoist=False)),
    Row("forward", ("sm10",), 128, ANY_ROWS, Tile(128, 64, 8, 3)),
    Row("mla", ("sm10",), 1024, ANY_ROWS, Tile(16, 32, 4, 2, 1)),
    Row("forward", _SM9_10, 64, ANY_ROWS, Tile(128, 64, 8, 4), H200),
    Row("forward", _SM9_10, 128, ANY_ROWS, Tile(128, 128, 8, 3, hoist=False), H200),
    Row("forward", ("sm90",), 192, ANY_ROWS, Tile(128, 64, 8, 3), H200),
    Row("forward", _SM9_10, 256, ANY_ROWS, Tile(128, 32, 8, 3), H200),
    Row("decode", ("sm90",), 64, 16, Tile(16, 16, 1, 3, 11), H200, max_key_bytes=1),
    Row("decode", _SM9_10, 64, 16, Tile(16, 128, 4, 3, 1), H200),
    *_FLOAT8_128,
    Row("decode", _SM9_10, 128, 16, Tile(16, 16, 1, 4, 8), H200, max_key_bytes=1),
    Row("decode", _SM9_10, 128, 16, Tile(16, 64, 4, 3, 2), H200, max_cache_bytes=256 << 20),
    Row("decode", _SM9_10, 128, 16, Tile(16, 64, 4, 4, 2), H200),
    Row("decode", ("sm90",), 128, 32, Tile(32, 64, 2, 3, 3), H200, max_key_bytes=1),
    Row("decode", _SM9_10, 128, 32, Tile(32, 64, 4, 3, 2), H200),
    Row("decode", _SM9_10, 128, ANY_ROWS, Tile(64, 64, 4, 3, 2), H200),
    Row("decode", ("sm90",), 256, 16, Tile(16, 32, 2, 3, 4), H200, max_key_bytes=1),
    Row("decode", _SM9_10, 256, 16, Tile(16, 32, 4, 3, 2), H200),
    Row("decode", _SM9_10, 256, 32, Tile(32, 32, 4, 3, 2)),
    Row("decode", _SM9_10, 256, ANY_ROWS, Tile(64, 32, 8, 3, 1)),
    Row(
        "mla", ("sm90",), 1024, ANY_ROWS, Tile(16, 64, 4, 3, 2, hoist=False), H200, max_key_bytes=1
    ),
    Row("mla", _SM9_10, 1024, 16, Tile(16, 32, 4, 3, 2), H200),
    Row("mla", _SM9_10, 1024, 32, Tile(32, 32, 4, 3, 2), H200),
    Row("mla", _SM9_10, 1024, ANY_ROWS, Tile(64, 64, 8, 2, 1, hoist=False), H200),
    # A100: 163 KiB. Other Ampere, Ada and consumer Blackwell: 99 KiB.
    Row("forward", ("sm80",), 64, ANY_ROWS, Tile(128, 64, 8, 3)),
    Row("forward", ("sm80",), 128, ANY_ROWS, Tile(128, 32, 8, 3), max_key_bytes=1),
    Row("forward", ("sm80",), 128, ANY_ROWS, Tile(128, 64, 8, 3)),
    Row("forward", ("sm80",), 256, ANY_ROWS, Tile(64, 32, 8, 2)),
    Row("forward", ("sm",), 64, ANY_ROWS, Tile(128, 64, 8, 2)),
    Row("forward", ("sm",), 128, ANY_ROWS, Tile(128, 32, 8, 2)),
    Row("forward", ("sm",), 256, ANY_ROWS, Tile(64, 32, 8, 1)),
    Row("decode", ("sm",), 128, 16, Tile(16, 32, 2, 2), max_key_bytes=1),
    Row("decode", ("sm",), 128, 16, Tile(16, 64, 4, 2)),
    Row("decode", ("sm",), 128, 32, Tile(32, 32, 4, 2)),
    Row("decode", ("sm",), 128, ANY_ROWS, Tile(64, 32, 4, 2)),
    Row("decode", ("sm",), 256, 16, Tile(16, 16, 4, 3)),
    Row("decode", ("sm",), 256, ANY_ROWS, Tile(32, 32, 4, 2)),
    Row("mla", ("sm",), 1024, ANY_ROWS, Tile(16, 32, 8, 1)),
    # CDNA and RDNA: 64 KiB of shared memory, gfx950 160 KiB; no async copies to hide, one stage.
    Row("forward", ("gfx9",), 64, ANY_ROWS, Tile(128, 64, 4, 1)),
    Row("forward", ("gfx9",), 128, ANY_ROWS, Tile(128, 32, 4, 1)),
    Row("forward", ("gfx9",), 256, ANY_ROWS, Tile(64, 32, 4, 1)),
    Row("decode", ("gfx9",), 128, 16, Tile(16, 64, 4, 1)),
    Row("decode", ("gfx9",), 128, ANY_ROWS, Tile(32, 32, 4, 1)),
    Row("decode", ("gfx9",), 256, ANY_ROWS, Tile(16, 32, 4, 1)),
    Row("mla", ("gfx9",), 1024, ANY_ROWS, Tile(16, 16, 4, 1)),
    # RDNA's matrix instructions want queries and keys twice in registers: small tiles, many warps.
    Row("forward", ("gfx",), 128, ANY_ROWS, Tile(64, 16, 16, 1), max_key_bytes=1),
    Row("forward", ("gfx",), 128, ANY_ROWS, Tile(64, 32, 8, 1)),
    Row("forward", ("gfx",), 256, ANY_ROWS, Tile(32, 16, 16, 1)),
    Row("decode", ("gfx",), 128, 16, Tile(16, 16, 8, 1)),
    Row("decode", ("gfx",), 128, ANY_ROWS, Tile(32, 16, 4, 1)),
    Row("decode", ("gfx",), 256, ANY_ROWS, Tile(16, 16, 16, 1)),
    Row("mla", ("gfx",), 1024, ANY_ROWS, Tile(16, 16, 8, 1)),
)


def tile_for(
    op: Op, arch: str, dim: int, rows: int, key_bytes: int, cache_bytes: int = 1 << 62
) -> Tile:
    """The tile of a call.

    Args:
        dim: its widest padded head dimension. rows: its packed query rows.
        key_bytes: of an element of keys and values. cache_bytes: bound of those of all sequences.
    """
    for row in TABLE:
        if (
            row.op == op
            and arch.startswith(row.archs)
            and dim <= row.max_dim
            and rows <= row.max_rows
            and key_bytes <= row.max_key_bytes
            and cache_bytes <= row.max_cache_bytes
        ):
            return row.tile
    raise KeyError(f"no {op} tile for {arch}, head_dim {dim}, {rows} rows, {key_bytes}-byte keys")
