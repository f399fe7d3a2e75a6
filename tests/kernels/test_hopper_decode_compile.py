"""The decode kernels compile for Hopper within the registers and shared memory they plan on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("hopper_decode_compile.py")

#: Shared memory of one worker where it is alone on a multiprocessor, and where two share it.
SHARED_LIMIT = {1: 227 * 1024, 2: 228 * 1024 // 2 - 1024}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_shared_memory_leaves_room_for_every_worker(measured: dict[str, dict[str, Any]]) -> None:
    for name, kernel in measured.items():
        assert kernel["shared_bytes"] <= SHARED_LIMIT[kernel["workers"]], name


def test_wgmma_is_never_serialised(measured: dict[str, dict[str, Any]]) -> None:
    assert not any(kernel["warnings"] for kernel in measured.values())


def test_registers_suffice(measured: dict[str, dict[str, Any]]) -> None:
    # An accumulator of 256 columns takes half of them, and widening float8 values takes its share: what
    # is used once per unit spills, and two numbers that every block reads back.
    for name, kernel in measured.items():
        tight = name.startswith(("head_dim 256", "float8"))
        assert kernel["spilled_bytes"] <= (300 if tight else 0), name
        assert kernel["spills_per_block"] <= (2 if tight else 0), name
