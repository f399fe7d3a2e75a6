"""What exchanged parts of a model need on every kind of device."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: The function by which models of transformers rotate queries and keys.
ROPE = "apply_rotary_pos_emb"


class SharedProduct:
    """One matrix product for several linear layers that are called with the same input, in order.

    The first layer computes all outputs, the others take theirs. An input that is another tensor than
    the last one is a new product, so layers called with different inputs are right too, only slower.
    The outputs are let go when the last layer has taken its own.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        self._product = product
        self._sizes = list(sizes)
        self._last: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())

    def part(self, index: int, x: Tensor) -> Tensor:
        source, outputs = self._last
        if source is not x:
            outputs = self._product(x).split(self._sizes, dim=-1)
            self._last = (x, outputs)
        if index == len(self._sizes) - 1:
            self._last = (None, ())
        return outputs[index]


def with_rope(function: types.FunctionType, rope: Callable[..., Any]) -> types.FunctionType:
    """A copy of a function that sees another ``apply_rotary_pos_emb``; its module stays as it is."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, ROPE: rope},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
