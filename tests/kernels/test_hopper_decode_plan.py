"""The decode kernel's plan: the planning kernel's own source, run on NumPy, and workers that follow it."""

from __future__ import annotations

import random
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from headway.kernels.hopper import decode_plan, masks
from headway.kernels.hopper.decode_config import WHOLE_KEYS


@dataclass(frozen=True)
class Pointer:
    buffer: np.ndarray
    at: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.buffer, self.at + offset)


def load(pointer: Pointer, mask: Any = None, other: int = 0) -> Any:
    if mask is None:
        return pointer.buffer[pointer.at]
    return np.where(mask, pointer.buffer[np.where(mask, pointer.at, 0)], other)


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    at, value, mask = np.broadcast_arrays(pointer.at, value, mask)
    pointer.buffer[at[mask]] = value[mask]


#: What the kernel calls, for one program with one value in each place.
GLUON = SimpleNamespace(
    load=load,
    store=store,
    arange=lambda start, stop, layout: np.arange(start, stop),
    where=np.where,
    minimum=np.minimum,
    maximum=np.maximum,
    min=np.min,
    max=np.max,
    sum=np.sum,
    cdiv=lambda a, b: -(-a // b),
    associative_scan=lambda values, axis, add: np.cumsum(values, axis),
    static_range=range,
    BlockedLayout=lambda *_: None,
    constexpr=None,
)


def plainly(module: Any) -> dict[str, Any]:
    """A module's names, with its kernels as functions on NumPy and its constants as numbers."""
    names: dict[str, Any] = {}
    for name, x in vars(module).items():
        if hasattr(x, "fn"):
            defaults = x.fn.__defaults__
            names[name] = types.FunctionType(x.fn.__code__, names, name, defaults)
        else:
            names[name] = x.value if x.__class__.__name__ == "constexpr" else x
    names |= {"gl": GLUON, "cta_barrier": lambda: None}
    return names


NAMES = plainly(decode_plan)
NAMES["row_limits"] = plainly(masks)["row_limits"]
NAMES["Limits"] = lambda left, right, chunk: SimpleNamespace(
    window_left=left, window_right=right, chunk=chunk
)
FIELDS, BLOCKS, FIRST_BLOCK = (NAMES[name] for name in ("FIELDS", "BLOCKS", "FIRST_BLOCK"))
LO, HI, BATCH, UNIT = (NAMES[name] for name in ("LO", "HI", "BATCH", "UNIT"))
WITHIN, LEFT = NAMES["WITHIN"], NAMES["LEFT"]


@dataclass
class Planned:
    units: int
    spans: np.ndarray
    works: np.ndarray
    share: int
    starts: np.ndarray
    unit_cost: int

    def cost(self, blocks: int) -> int:
        return self.unit_cost if blocks < NAMES["LONG"] else 0


def planned(
    lengths: list[int],
    units: int,
    *,
    workers: int = 264,
    per_multiprocessor: int = 2,
    block_n: int = 64,
    whole_keys: int = WHOLE_KEYS,
    merge_parts: int = 16,
    window: int | None = None,
    pads: list[int] | None = None,
    rows_q: int = 1,
) -> Planned:
    batch = len(lengths)
    cfg = decode_plan.PlanConfig(
        block_n=block_n,
        unit_cost=1,
        at_once=256,
        workers=512,
        per_multiprocessor=per_multiprocessor,
        whole=whole_keys // block_n,
        merge_parts=merge_parts,
        has_left=window is not None,
        has_right=True,
        has_chunk=False,
    )
    spans, works = np.zeros((batch + 256) * FIELDS, int), np.zeros(512 * FIELDS, int)
    share, starts = np.zeros(1, int), np.zeros(batch + 256, int)
    given = None if pads is None else Pointer(np.array(pads))
    plan_kernel: Any = NAMES["plan_kernel"]
    plan_kernel(
        Pointer(np.array(lengths)), given, None, None, None, None,
        *map(Pointer, (spans, works, share, starts)),
        batch, rows_q, max(lengths), units, workers, 1, 0, window or 0, 0, 1, cfg, 8,
    )  # fmt: skip
    shaped = spans.reshape(-1, FIELDS)[:batch], works.reshape(-1, FIELDS)[:workers]
    return Planned(units, *shaped, int(share[0]), starts[:batch], 1)


def follow(plan: Planned) -> tuple[int, dict[tuple[int, int], int]]:
    """Go the workers' ways: (the most blocks that one takes, parts of units that were cut). Every block is
    taken once, and what finds parts finds all of a unit's."""
    seen: set[tuple[int, int, int]] = set()
    left_by: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    most = 0
    for worker, record in enumerate(plan.works):
        batch, unit, within, left = (int(record[i]) for i in (BATCH, UNIT, WITHIN, LEFT))
        assert (record[:BATCH] == plan.spans[batch][:BATCH]).all()
        line, taken = worker * plan.share, 0
        while left > 0:
            blocks = int(plan.spans[batch][BLOCKS])
            cost = plan.cost(blocks)
            take = min(left, blocks + cost - within)
            first = max(within - cost, 0)
            count = max(within + take - cost, 0) - first
            mine = {(batch, unit, i) for i in range(first, first + count)}
            assert not mine & seen
            seen |= mine
            taken += count
            if 0 < count < blocks:
                at = line - within + cost
                first_worker = at // plan.share
                parts = (at + blocks - 1) // plan.share - first_worker + 1
                slot = 2 * worker + (first == 0)
                left_by.setdefault((batch, unit), []).append((slot, first_worker, parts))
            left, line, within, unit = left - take, line + take, 0, unit + 1
            if unit == plan.units:
                batch, unit = batch + 1, 0
        most = max(most, taken)
    assert len(seen) == plan.units * plan.spans[:, BLOCKS].sum()
    slots = [slot for parts in left_by.values() for slot, _, _ in parts]
    assert len(slots) == len(set(slots))
    for of_unit in left_by.values():
        (first,) = {first for _, first, _ in of_unit}
        assert {parts for _, _, parts in of_unit} == {len(of_unit)}
        later = [2 * (first + i) for i in range(1, len(of_unit))]
        assert [slot for slot, _, _ in of_unit] == [2 * first + 1, *later]
    return most, {unit: len(of_unit) for unit, of_unit in left_by.items()}


def test_every_block_is_taken_once_whatever_the_lengths() -> None:
    draw = random.Random(5)
    for _ in range(150):
        batch, base = draw.choice([1, 2, 3, 16, 40]), draw.choice([60, 1000, 5000])
        spread = draw.choice([0, 1, 64, base])
        lengths = [max(base - draw.randint(0, spread), 0) for _ in range(batch)]
        window = draw.choice([None, 127, 1023])
        pads = [draw.randint(0, min(n, 90)) for n in lengths] if draw.random() < 0.3 else None
        block_n = draw.choice([64, 128])
        plan = planned(
            lengths,
            draw.choice([1, 4, 8]),
            workers=draw.choice([264, 132, 30]),
            per_multiprocessor=draw.choice([1, 2]),
            block_n=block_n,
            merge_parts=draw.choice([0, 16]),
            window=window,
            pads=pads,
            rows_q=draw.choice([1, 4]),
        )
        follow(plan)
        first, blocks = plan.spans[:, FIRST_BLOCK], plan.spans[:, BLOCKS]
        assert (first >= 0).all()
        assert (first * block_n <= plan.spans[:, LO]).all()
        assert ((first + blocks) * block_n >= plan.spans[:, HI]).all()


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ([32768] * 16, 16),
        ([32768 - 64 * i for i in range(16)], 16),
        ([32700] * 16, 17),  # a block is cut at both ends
        ([1024] * 16, 16),
    ],
)
def test_short_windows_are_left_whole(lengths: list[int], most: int) -> None:
    """16 sequences, 8 KV heads, windows of 1,024: 132 multiprocessors of two workers each read them."""
    plan = planned(lengths, 8, window=1023)
    assert (plan.spans[:, BLOCKS] == most).all()
    assert follow(plan) == (most, {})
    assert sum(plan.works[:, LEFT] > 0) == 128


def test_float8_blocks_keep_two_workers_busy() -> None:
    most, cut = follow(planned([1024] * 16, 8, block_n=128, whole_keys=0))
    assert most < 8
    assert len(cut) > 0


@pytest.mark.parametrize(
    ("batch", "units", "keys", "share"),
    [(1, 8, 131072, 64), (16, 8, 4096, 32), (128, 1, 8192, 64), (1, 8, 8192, 8), (1, 8, 1024, 1)],
)
def test_long_units_are_shared_evenly(batch: int, units: int, keys: int, share: int) -> None:
    plan = planned([keys] * batch, units)
    assert plan.share == share
    follow(plan)
