"""The prefill kernel's machine code: the inner loop is what docs/notes/hopper-prefill.md describes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("hopper_forward_compile.py")
OVERLAPPED = (
    "d128 full",
    "d128 causal",
    "d128 ragged causal",
    "d128 paged causal",
    "d192/128 causal",
)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_wgmma_is_never_serialised(measured: dict[str, dict[str, Any]]) -> None:
    assert not {
        name: kernel["serialised"] for name, kernel in measured.items() if kernel["serialised"]
    }


def test_shared_memory_fits(measured: dict[str, dict[str, Any]]) -> None:
    assert max(kernel["shared_bytes"] for kernel in measured.values()) <= 227 * 1024


def test_the_inner_loop_keeps_to_registers(measured: dict[str, dict[str, Any]]) -> None:
    for name, kernel in measured.items():
        inner = kernel["loops"][0]
        # With paged keys the consumers leave eight registers to the producer's page numbers.
        assert inner["local_memory"] <= (4 if "paged" in name else 0), (name, inner)
        assert inner["repacked"] == 0, (name, inner)


@pytest.mark.parametrize("name", OVERLAPPED)
def test_softmax_runs_beside_pv(measured: dict[str, dict[str, Any]], name: str) -> None:
    assert measured[name]["loops"][0]["softmax_beside_pv"]
