"""The prefill kernel's machine code: the inner loop is what docs/notes/hopper-prefill.md describes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = "tests.kernels.hopper_forward_compile"
#: One for each shape of the inner loop: three warpgroups, and softmax beside PV.
FEW = ("d64 causal", "d128 paged causal")
#: Rows that are not fenced by their producer cost the gathering kernel its overlap.
OVERLAPPED = (
    "d64 short causal",
    "d128 full",
    "d128 causal",
    "d128 short causal",
    "d128 page 16 causal",
    "d128 ragged causal",
    "d128 paged causal",
    "d128 widened causal",
    "d128 split paged",
    "d192/128 causal",
    "d256 causal",
)


def measured(*names: str) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", PROGRAM, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def check(name: str, kernel: dict[str, Any]) -> None:
    """wgmma is not serialised, shared memory suffices, and the inner loop keeps to registers; a warpgroup's
    warps meet in it once for each time that they hand something back."""
    assert kernel["serialised"] == [], name
    assert kernel["shared_bytes"] <= 227 * 1024, name
    inner = kernel["loops"][0]
    assert inner["local_memory"] == 0, (name, inner)
    assert inner["repacked"] == 0, (name, inner)
    assert inner["barriers"] <= (2 if name in OVERLAPPED or "gathered" in name else 1), (
        name,
        inner,
    )
    if name in OVERLAPPED:
        assert inner["softmax_beside_pv"], (name, inner)


def test_machine_code_of_a_few_kernels() -> None:
    for name, kernel in measured(*FEW).items():
        check(name, kernel)


@pytest.mark.slow
def test_machine_code_of_all_kernels() -> None:
    kernels = measured()
    assert set(OVERLAPPED) <= kernels.keys()
    for name, kernel in kernels.items():
        check(name, kernel)
