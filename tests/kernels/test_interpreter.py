"""Runs the tests of the portable kernels under Triton's interpreter, where there is no GPU.

The interpreter is chosen when Triton is imported, for a whole process: hence one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter")
@pytest.mark.parametrize("name", ["attention", "schedule"])
def test_portable_kernels_under_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    tests = HERE / f"test_portable_{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, "--timeout=1000", "-W", "ignore::RuntimeWarning", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
