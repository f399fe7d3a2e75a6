"""A plain decoder layer on a CPU, as :mod:`.fused_layer` has it for a GPU.

Four products with packed weights, two of which add to the residual; one compiled kernel for each norm and
for the rotary embedding; and no calls between modules, which at one token take as long as the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.engine.packing import PackedWeight
from headway.engine.trial import (
    FEED_FORWARD,
    PROJECTIONS,
    TRIAL_ROWS,
    LayerForward,
    LayerTrial,
    agree,
    random_like,
)
from headway.kernels.cpu.norm import RMSNorm
from headway.kernels.cpu.rotary import rotary
from headway.kernels.norm_style import NormStyle

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    lambda gate: functional.gelu(gate, approximate="tanh"),
    functional.gelu,
)


class CpuLayer(LayerForward):
    """Stands for a decoder layer's ``forward``.

    Args:
        norms: before attention, and before the feed-forward block.
        head_norms: of the heads of queries and keys, or None.
        options: what the layer's attention passes to the attention function besides tensors.
        repeats: how often the model's cos and sin hold each angle, 1 or 2.
    """

    def __init__(
        self,
        layer: nn.Module,
        products: Sequence[PackedWeight],
        norms: Sequence[RMSNorm],
        head_norms: tuple[RMSNorm, RMSNorm] | None,
        activation: Callable[[Tensor], Tensor],
        options: dict[str, Any],
        repeats: int,
    ) -> None:
        attention: Any = layer.self_attn
        self._attention = attention
        self._qkv, self._out, self._gate_up, self._down = products
        self._before, self._between = norms
        self._head_norms = head_norms
        self._activation = activation
        self._options = {**options, "rotary": None}
        self.repeats = repeats
        self._head_dim = int(attention.head_dim)
        self._sizes = [getattr(attention, name).out_features for name in PROJECTIONS[:3]]

    def __call__(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        headway: Any,
        **__: Any,
    ) -> Tensor:
        hidden = hidden_states[0]
        tokens, width = hidden.shape[0], self._head_dim
        qkv = self._qkv(self._before(hidden)).split(self._sizes, -1)
        q, k, v = [part.view(tokens, -1, width) for part in qkv]
        if self._head_norms is not None:
            q, k = self._head_norms[0](q), self._head_norms[1](k)
        q, k = self._turned(q, k, *position_embeddings)
        attended = headway(self._attention, q, k, v, self._options)
        hidden = self._out.plus(hidden, attended.view(tokens, -1))
        gate, up = self._gate_up(self._between(hidden)).chunk(2, -1)
        return self._down.plus(hidden, self._activation(gate).mul_(up)).unsqueeze(0)

    def _turned(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = 2 * (cos.shape[-1] // self.repeats)
        if turned == self._head_dim:
            return rotary(q, k, cos[0], sin[0])
        first = rotary(q[..., :turned], k[..., :turned], cos[0], sin[0])
        rest = q[..., turned:], k[..., turned:]
        turned_q, turned_k = (torch.cat(parts, -1) for parts in zip(first, rest, strict=True))
        return turned_q, turned_k


def take_over(layer: nn.Module, replacement: CpuLayer) -> None:
    """Make the replacement the layer's forward, and give up the weights that it has packed."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    for name in PROJECTIONS:
        delattr(attention, name)
    for name in FEED_FORWARD:
        delattr(mlp, name)
    layer.forward = replacement  # type: ignore[assignment]


def exchange_for(layer: nn.Module) -> CpuLayer | None:
    """The exchange for a layer that looks plain; None where none computes the same."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    parts: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        parts += [attention.q_norm, attention.k_norm]
    norms = [one for one in map(norm_of, parts) if one is not None]
    trial = LayerTrial(layer)
    if len(norms) != len(parts) or trial.options is None:
        return None
    products = [
        PackedWeight.of(attention.q_proj, attention.k_proj, attention.v_proj),
        PackedWeight.of(attention.o_proj),
        PackedWeight.of(mlp.gate_proj, mlp.up_proj),
        PackedWeight.of(mlp.down_proj),
    ]
    found = _candidates(layer, products, norms, trial.options)
    return next((one for one in found if trial.is_passed_by(one)), None)


def anywhere(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """A norm for tensors of any shape."""

    def forward(x: Tensor) -> Tensor:
        rows = x if x.dim() in (2, 3) and x.stride(-1) == 1 else x.reshape(-1, x.shape[-1])
        return norm(rows).view(x.shape)

    return forward


def norm_of(module: nn.Module) -> RMSNorm | None:
    """The RMS norm that a module computes, found by trying; None where it is another."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = random_like(TRIAL_ROWS, weight.shape[0], like=weight)
    want = module(x)
    found = (RMSNorm(weight, eps, style) for style in NormStyle)
    return next((norm for norm in found if agree(norm(x), want)), None)


def _candidates(
    layer: nn.Module,
    products: Sequence[PackedWeight],
    norms: Sequence[RMSNorm],
    options: dict[str, Any],
) -> Iterator[CpuLayer]:
    """The ways a plain layer may compute, to be tried."""
    heads = (norms[2], norms[3]) if len(norms) == 4 else None
    for repeats in (2, 1):
        for activation in ACTIVATIONS:
            yield CpuLayer(layer, products, norms[:2], heads, activation, options, repeats)
