"""Kernels of tests run under Triton's interpreter where there is no GPU. Drawn calls are the same in every
run; ``HYPOTHESIS_PROFILE=explore`` draws others."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
