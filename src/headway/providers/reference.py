"""The specification as a provider: float64, any device, every feature, no speed. Pinned only."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from headway import reference
from headway.problem import FLOAT8_DTYPES, FLOAT_DTYPES, Problem
from headway.providers.base import ALL_FEATURES, Capabilities, HeadDims, Provider


class ReferenceProvider(Provider):
    name = "reference"

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def capabilities(self, device: torch.device) -> Capabilities:
        dtypes = FLOAT_DTYPES + FLOAT8_DTYPES
        return Capabilities(
            device_types=frozenset({device.type}),
            dtypes=frozenset(itertools.product(dtypes, dtypes)),
            features=ALL_FEATURES,
            head_dims=HeadDims(maximum=1 << 20, multiple_of=1),
            traces_mods=False,
        )

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return reference.attention(problem)


PROVIDER = ReferenceProvider()
