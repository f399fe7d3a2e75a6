"""``headway bench cpu``: both sides of a case compute the same thing, and the reading says how long."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headway.bench.cpu import CASES, Case, measure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_headway_and_torch_agree_and_are_timed(case: Case) -> None:
    small = dataclasses.replace(
        case, new=min(case.new, 16), context=64 if case.new < case.context else 16, heads=(4, 2)
    )
    row = measure(small, torch.float32, repeats=2)
    assert row["max_difference"] < 1e-5
    assert row["speedup"] == pytest.approx(row["torch_ms"] / row["headway_ms"])
