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
    # Two workers to a multiprocessor leave float8 blocks just enough: what is used once per unit may spill,
    # and a gathering producer of head_dim 256 holds more addresses than registers.
    for name, kernel in measured.items():
        allowed = (
            300 if name == "head_dim 256, page 1, gathered" else 100 if "float8" in name else 0
        )
        assert kernel["spilled_bytes"] <= allowed, name
        assert kernel["spills_per_block"] == 0, name
