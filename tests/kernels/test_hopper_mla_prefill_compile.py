"""Machine code of float8 MLA prefill for Hopper: what docs/notes/mla.md says of its inner loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = "tests.kernels.hopper_mla_prefill_compile"


def test_machine_code_of_the_inner_loops() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernel = json.loads(run.stdout)
    assert kernel["serialised"] == []
    assert kernel["shared_bytes"] <= 227 * 1024
    assert len(kernel["loops"]) == 4  # with and without a mask, for two warpgroups
    for loop in kernel["loops"]:
        counts = loop["counts"]
        assert not counts.keys() & {"LDL", "STL", "PRMT", "LDS", "STS"}, counts
        assert counts["SHFL"] == 4  # of the row maxima: none to make the weights an operand
        assert loop["softmax_beside_pv"], loop
