"""Attention on a CPU, every feature: compiled kernels where numba is installed, torch operations else."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from headway import reference
from headway.kernels.cpu import blockwise
from headway.problem import FLOAT8_DTYPES, FLOAT_DTYPES, Problem
from headway.providers.base import ALL_FEATURES, Capabilities, HeadDims, Provider


class CpuProvider(Provider):
    name = "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "runs on CPU tensors"

    def capabilities(self, device: torch.device) -> Capabilities:
        dtypes = FLOAT_DTYPES + FLOAT8_DTYPES
        return Capabilities(
            device_types=frozenset({"cpu"}),
            dtypes=frozenset(itertools.product(dtypes, dtypes)),
            features=ALL_FEATURES,
            head_dims=HeadDims(maximum=1 << 20, multiple_of=1),
        )

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        q = problem.q
        if problem.append is not None:
            q = reference.append(problem, problem.append)
        return blockwise.attention(problem, q)


PROVIDER = CpuProvider()
