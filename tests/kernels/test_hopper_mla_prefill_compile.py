"""Machine code of float8 MLA prefill for Hopper: what docs/notes/mla.md says of its inner loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = "tests.kernels.hopper_mla_prefill_compile"


def test_machine_code_of_the_inner_loops() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout)
    assert kernels.keys() == {"cast here", "stored"}
    for name, kernel in kernels.items():
        check(kernel, scaled_by_blocks=name == "cast here")


def check(kernel: dict[str, Any], *, scaled_by_blocks: bool) -> None:
    assert kernel["serialised"] == []
    assert kernel["shared_bytes"] <= 227 * 1024
    loops = sorted(kernel["loops"], key=lambda loop: loop["instructions"])
    assert len(loops) == 4  # without and with a mask, for two warpgroups
    for i, loop in enumerate(loops):
        counts = loop["counts"]
        assert not counts.keys() & {"PRMT", "STS"}, counts
        assert counts.get("LDS", 0) == scaled_by_blocks  # a block's record, in one piece
        # Beside the mask an accumulator or two go to memory and back.
        assert counts.get("LDL", 0) == counts.get("STL", 0) <= (0 if i < 2 else 2), counts
        assert counts["SHFL"] == 4  # of the row maxima: none to make the weights an operand
        assert loop["softmax_beside_pv"], loop
