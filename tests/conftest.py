"""Kernels of tests run under Triton's interpreter where there is no GPU. Drawn calls are the same in every
run; ``HYPOTHESIS_PROFILE=explore`` draws others."""

import importlib.util
import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
        from tests import interpreter

        interpreter.quicken()

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
