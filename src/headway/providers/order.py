"""Which provider is tried first, by device and kind of work: measured orders, as data.

A row says where its order comes from: readings in benchmarks/results (the files' paths in the repository),
or in words why there are none yet. Unmeasured rows put Headway's own kernels first, because they keep every
promise of the interface, and packages behind them in the order of their publishers' claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Work = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Order:
    """``kinds`` of devices (see :mod:`headway.devices`; a name may end in *) and the providers for them.

    A provider that this build does not have is skipped; one that the row does not name runs only when it
    is asked for.
    """

    kinds: tuple[str, ...]
    work: tuple[Work, ...]
    providers: tuple[str, ...]
    reading: str


_BOTH: tuple[Work, ...] = ("prefill", "decode")

ORDERS = (
    Order(
        ("cpu",),
        _BOTH,
        ("cpu", "portable"),
        "not a race: portable runs on a CPU under Triton's interpreter alone, for tests",
    ),
    # FA4 and FlashInfer prefill faster than portable, but stand behind it: the one compiles for seconds and
    # refuses much of what is refused by hopper, the other waits for the device in every step.
    Order(
        ("sm90",),
        ("prefill",),
        ("hopper", "fa3", "portable", "fa4", "flashinfer", "fa2"),
        "benchmarks/results/h200/hopper-prefill.json",
    ),
    Order(
        ("sm90",),
        ("decode",),
        ("hopper", "portable", "flashinfer", "fa3", "fa4", "fa2"),
        "benchmarks/results/h200/hopper-decode.json",
    ),
    Order(
        ("sm100", "sm103", "sm110"),
        _BOTH,
        ("portable", "fa4", "flashinfer", "fa2"),
        "not measured: no such device was at hand",
    ),
    Order(
        ("sm*",),
        _BOTH,
        ("portable", "fa2", "flashinfer", "fa3", "fa4"),
        "not measured: no such device was at hand",
    ),
    Order(("gfx*",), _BOTH, ("portable", "aiter"), "not measured: no such device was at hand"),
    Order(("mp*",), _BOTH, ("mate",), "the only provider on these devices"),
    Order(
        ("meta",),
        _BOTH,
        ("hopper", "portable"),
        "nothing runs: compiled for the target that is named",
    ),
)


def order_for(kind: str, work: Work) -> Order | None:
    """The first row for a device kind; None where there is none."""
    return next(
        (row for row in ORDERS if work in row.work and any(_names(n, kind) for n in row.kinds)),
        None,
    )


def _names(pattern: str, kind: str) -> bool:
    return kind.startswith(pattern[:-1]) if pattern.endswith("*") else kind == pattern
