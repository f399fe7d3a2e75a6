"""A decoder layer as nine kernels: the plain layer of Llama, Mistral, Qwen and many others, rearranged.

Norm, one product for q, k and v, one kernel that normalises, rotates and writes, attention, a product
that adds to the residual; norm, one product for gate and up, the activation, a product that adds again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.engine.trial import PROJECTIONS, LayerForward
from headway.kernels.portable.gated import ACTIVATIONS, Activation, gated
from headway.kernels.portable.norm import NormStyle, rms_norm
from headway.serving.base import HeadNorms, TokenRotary


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight, and how it is applied."""

    weight: Tensor
    eps: float
    style: NormStyle

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.style)


@dataclass(frozen=True)
class Linear:
    """A product of rows with a weight (out, in), and its bias."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(*layers: nn.Linear) -> Linear:
        """Layers that read the same input, as one; a bias of 0 where others alone have one."""
        if len(layers) == 1:
            return Linear(layers[0].weight, layers[0].bias)
        weight = torch.cat(tuple(one.weight for one in layers))
        if all(one.bias is None for one in layers):
            return Linear(weight, None)
        biases = (
            one.weight.new_zeros(one.out_features) if one.bias is None else one.bias
            for one in layers
        )
        return Linear(weight, torch.cat(tuple(biases)))

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def into(self, out: Tensor, x: Tensor) -> None:
        """out = the product."""
        if self.bias is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual += the product, in the product's own kernel."""
        residual.addmm_(x, self.weight.T)
        if self.bias is not None:
            residual += self.bias


class FusedLayer(LayerForward):
    """Stands for a decoder layer's ``forward``. The hidden states given to it are its memory to write to.

    Args:
        options: what the layer's attention passes to the attention function besides tensors.
        repeats: how often the model's cos and sin hold each angle, 1 or 2.
    """

    def __init__(
        self,
        layer: nn.Module,
        norms: Sequence[Norm],
        head_norms: HeadNorms | None,
        activation: Activation,
        options: dict[str, Any],
        repeats: int,
    ) -> None:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self._attention = attention
        self._options = options
        self._before, self._between = norms
        self._head_norms = head_norms
        self._activation = activation
        self.repeats = repeats
        self._head_dim = int(attention.head_dim)
        self._sizes = [getattr(attention, name).out_features for name in PROJECTIONS[:3]]
        self._qkv = Linear.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Linear.of(attention.o_proj)
        self._gate_up = Linear.of(mlp.gate_proj, mlp.up_proj)
        self._down = Linear.of(mlp.down_proj)

    @property
    def weight(self) -> Tensor:
        """Of the first product, for what else lies where it lies."""
        return self._qkv.weight

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of hidden states, of queries with keys and values, and of what attention returns."""
        return self._qkv.weight.shape[1], self._qkv.weight.shape[0], self._out.weight.shape[1]

    @property
    def row_bytes(self) -> int:
        """What a row takes in pieces: columns that they share, and what a piece has in between."""
        width, *others = self.sizes
        inner = self._down.weight.shape[1]
        return (2 * width + sum(others) + 3 * inner) * self.weight.itemsize

    def __call__(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        headway: Any,
        **__: Any,
    ) -> Tensor:
        pieces = getattr(headway, "pieces", None)
        if pieces is not None:
            hidden_states, qkv, attended = pieces.before(self, hidden_states)
            self._attended(qkv, position_embeddings, headway, attended)
            pieces.after(self)
            return hidden_states
        hidden = hidden_states[0]
        qkv = self._qkv(self._before(hidden))
        self.finish(hidden, self._attended(qkv, position_embeddings, headway))
        return hidden_states

    def project(self, hidden: Tensor, qkv: Tensor) -> None:
        """What comes before attention: hidden states (tokens, width) to queries, keys and values."""
        self._qkv.into(qkv, self._before(hidden))

    def finish(self, hidden: Tensor, attended: Tensor) -> None:
        """What comes after attention, whose results (tokens, heads * head_dim) are given."""
        self._out.add_to(hidden, attended)
        self._down.add_to(hidden, gated(self._gate_up(self._between(hidden)), self._activation))

    def _attended(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        headway: Any,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention's results (tokens, heads * head_dim), in ``out`` where that is given."""
        parts = qkv.split(self._sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in parts)
        tokens, half = qkv.shape[0], angles[0].shape[-1] // self.repeats
        cos, sin = (angle[0, :tokens, :half] for angle in angles)
        rotary = TokenRotary(cos, sin, norms=self._head_norms)
        options = {**self._options, "rotary": rotary}
        if out is not None:
            options["out"] = out.unflatten(-1, (-1, self._head_dim))
        attended: Tensor = headway(self._attention, q, k, v, options)
        return attended.flatten(1)

    def take_over(self, layer: nn.Module) -> None:
        """Become the layer's forward; weights that are joined here are given up there."""
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        layer.forward = self  # type: ignore[assignment]


def candidates(
    layer: nn.Module, norms: Sequence[Norm], head_norms: HeadNorms | None, options: dict[str, Any]
) -> Iterator[FusedLayer]:
    """The ways a plain layer may compute, to be tried."""
    for repeats in (2, 1):
        for activation in ACTIVATIONS:
            yield FusedLayer(layer, norms, head_norms, activation, options, repeats)
