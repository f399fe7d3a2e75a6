"""Where the portable kernels are tested: a GPU if there is one, else Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

#: Random calls per test: the interpreter takes about a second for each, a GPU mostly compiles.
EXAMPLES = int(os.environ.get("HEADWAY_TEST_EXAMPLES", "16" if INTERPRETED else "120"))

requires_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU or TRITON_INTERPRET=1 (tests/conftest.py sets it where there is no GPU)",
)
