"""Cosines and sines of every position in one table, instead of a dozen operators in every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Rotary embeddings, in transformers' words, whose angles depend on nothing but the position.
STATIC = frozenset({"default", "linear", "llama3", "yarn"})

#: Bytes of a table, at most: 128k positions of 128 columns.
MOST_BYTES = 1 << 26

#: Positions that a table has at least: models are tried with more tokens than short contexts have.
AT_LEAST = 1024

#: What a model's rotary module computes: (1, T, width) each from hidden states and positions (1, T).
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class AngleTable:
    """Stands for the ``forward`` of a model's rotary module.

    Args:
        dtype: of the hidden states that the table is for. Angles may have another: some models keep
            them in float32.
        cos, sin: (1, positions, width) of all positions, as ``forward`` computes them.
    """

    def __init__(self, forward: Forward, dtype: torch.dtype, cos: Tensor, sin: Tensor) -> None:
        self._forward = forward
        self._dtype = dtype
        self._table = torch.cat((cos[0], sin[0]), dim=-1)
        self._width = cos.shape[-1]

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype != self._dtype or position_ids.dim() != 2:  # of several axes: mixed by the model
            return self._forward(x, position_ids)
        rows = self._table[position_ids]
        return rows[..., : self._width], rows[..., self._width :]


def table_for(module: nn.Module, count: int, like: Tensor) -> AngleTable | None:
    """The table of a rotary module; None where its angles depend on more, or take too much memory."""
    forward: Any = module.forward
    if list(inspect.signature(forward).parameters) != ["x", "position_ids"]:
        return None
    frequencies = getattr(module, "inv_freq", None)
    if getattr(module, "rope_type", None) not in STATIC or not isinstance(frequencies, Tensor):
        return None
    count = max(count, AT_LEAST)
    positions, x = torch.arange(count, device=like.device)[None], like.new_empty(1, 1, 1)
    first = forward(x, positions[:, :1])
    if not isinstance(first, tuple):  # complex numbers, say
        return None
    if count * sum(t.nbytes for t in first) > MOST_BYTES:
        return None
    return AngleTable(forward, like.dtype, *forward(x, positions))
