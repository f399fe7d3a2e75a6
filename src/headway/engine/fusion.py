"""Makes a transformers model fast on a GPU without touching its code: fewer, larger kernels.

:func:`fuse` exchanges parts of a loaded model for others that compute the same. A plain decoder layer is
exchanged as a whole (:mod:`.fused_layer`); in others,

- linear layers that read the same input (q, k, v) become one matrix product;
- a gated feed-forward block becomes two products and one kernel between them;
- RMS norms become one kernel each;
- rotary embedding is left to the kernel that writes keys into the cache: queries and keys arrive at the
  attention function unrotated, with the angles beside them;
- the angles themselves are looked up in a table.

Every exchange is tried first, on random input, and stays only if original and replacement agree to
rounding. That nothing happens to queries and keys between their rotation and the attention function is
checked on the whole model.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headway.engine.angles import table_for
from headway.engine.attention import ROTARY_MARK
from headway.engine.fused_layer import FusedLayer, Linear, Norm, candidates
from headway.engine.parts import ROPE, SharedProduct, with_rope
from headway.engine.trial import (
    TRIAL_ROWS,
    LayerTrial,
    agree,
    grown_alike,
    is_taken,
    looks_plain,
    queries_and_keys,
    random_like,
)
from headway.kernels.portable.gated import ACTIVATIONS, Activation, gated
from headway.kernels.portable.norm import NormStyle
from headway.serving.base import HeadNorms, TokenRotary
from headway.serving.flash import rotated

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"),)
"""Names of sibling linear layers that read the same input in the models of transformers."""


@dataclass
class Fusion:
    """What :func:`fuse` did: how many parts it exchanged, and what it left alone and why."""

    layers: int = 0
    linears: int = 0
    feed_forwards: int = 0
    norms: int = 0
    rotaries: int = 0
    tables: int = 0
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = (
            f"{self.layers} layers exchanged whole; "
            f"{self.linears} linear layers merged, {self.feed_forwards} feed-forward blocks, "
            f"{self.norms} norms and {self.rotaries} rotary embeddings exchanged, "
            f"{self.tables} tables of angles"
        )
        return done + "".join(
            f"; left alone: {why}" for why in sorted(set(self.left_alone.values()))
        )


@torch.inference_mode()
def fuse(model: nn.Module, positions: int) -> Fusion:
    """Exchange parts of a model in eval mode, in place. Merged layers give up their own weights, so it
    cannot be trained or saved afterwards. Its attention has to be ``headway_paged``, and no token will
    be at ``positions`` or beyond."""
    report = Fusion()
    _exchange_layers(model, report)
    _exchange_norms(model, report)
    _exchange_feed_forwards(model, report)
    _merge_linears(model, report)
    _defer_rotaries(model, report)
    _tabulate_angles(model, positions, report)
    return report


# --- whole layers -----------------------------------------------------------------------------------


def _exchange_layers(model: nn.Module, report: Fusion) -> None:
    for path, layer in model.named_modules():
        if not looks_plain(layer):
            continue
        fused = _fused(layer)
        if fused is None:
            report.left_alone[path] = f"{type(layer).__name__} is no plain layer"
            continue
        fused.take_over(layer)
        report.layers += 1


def _fused(layer: nn.Module) -> FusedLayer | None:
    """The exchange for a plain layer; None where none computes the same."""
    attention: Any = layer.self_attn
    parts: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    norms = [_norm_of(one) for one in parts]
    head_norms = None
    if hasattr(attention, "q_norm"):
        heads = [_norm_of(one) for one in (attention.q_norm, attention.k_norm)]
        q_norm, k_norm = heads
        if q_norm is None or k_norm is None:
            return None
        if (q_norm.eps, q_norm.style) != (k_norm.eps, k_norm.style):
            return None
        if q_norm.weight.shape[0] != attention.head_dim:
            return None
        head_norms = HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps, int(q_norm.style))
    before, between = norms
    if before is None or between is None:
        return None
    trial = LayerTrial(layer)
    if trial.options is None:
        return None
    found = candidates(layer, [before, between], head_norms, trial.options)
    return next((one for one in found if trial.is_passed_by(one)), None)


# --- norms ------------------------------------------------------------------------------------------


def _exchange_norms(model: nn.Module, report: Fusion) -> None:
    for path, module in model.named_modules():
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):
            continue
        if not isinstance(getattr(module, "weight", None), Tensor) or is_taken(path, model):
            continue
        norm = _norm_of(module)
        if norm is None:
            report.left_alone[path] = f"{type(module).__name__} is no RMS norm known here"
            continue
        module.forward = norm  # type: ignore[assignment]
        report.norms += 1


def _norm_of(module: nn.Module) -> Norm | None:
    """The RMS norm that a module computes, found by trying; None where it is another."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    if len(inspect.signature(module.forward).parameters) > 1:  # a gate, say
        return None
    x = random_like(1, TRIAL_ROWS, weight.shape[0], like=weight)
    want = module(x)
    found = (Norm(weight.detach(), eps, style) for style in NormStyle)
    return next((norm for norm in found if agree(norm(x), want)), None)


# --- feed-forward blocks ----------------------------------------------------------------------------


def _exchange_feed_forwards(model: nn.Module, report: Fusion) -> None:
    for path, module in model.named_modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = layers
        if not all(type(layer) is nn.Linear for layer in layers) or "forward" in vars(module):
            continue
        assert isinstance(gate, nn.Linear)
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        if gate.weight.shape != up.weight.shape or (gate.bias is None) != (up.bias is None):
            continue
        both = Linear.of(gate, up)
        x = random_like(1, TRIAL_ROWS, gate.in_features, like=both.weight)
        want = module(x)
        for activation in ACTIVATIONS:
            forward = _feed_forward(both, down, activation)
            if agree(forward(x), want):
                module.forward = forward  # type: ignore[method-assign]
                del module.gate_proj, module.up_proj
                report.feed_forwards += 1
                break
        else:
            report.left_alone[path] = f"{type(module).__name__} has no activation known here"


def _feed_forward(
    gate_up: Linear, down: nn.Linear, activation: Activation
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = down(gated(gate_up(x), activation))
        return out

    return forward


# --- linear layers that read the same input ---------------------------------------------------------


class SharedLinear(nn.Module):
    """One of the linear layers of a :class:`SharedProduct`."""

    def __init__(self, layer: nn.Linear, product: SharedProduct, index: int) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self._product = product
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._product.part(self._index, x)


def _merge_linears(model: nn.Module, report: Fusion) -> None:
    for path, parent in model.named_modules():
        for names in SHARED_INPUT:
            layers = [getattr(parent, name, None) for name in names]
            linears = [layer for layer in layers if type(layer) is nn.Linear]
            alike = len({(one.in_features, one.bias is None) for one in linears}) == 1
            if len(linears) != len(names) or not alike:
                continue
            product = SharedProduct(Linear.of(*linears), [one.out_features for one in linears])
            merged = [SharedLinear(one, product, index) for index, one in enumerate(linears)]
            x = random_like(1, TRIAL_ROWS, linears[0].in_features, like=linears[0].weight)
            if not all(agree(new(x), old(x)) for new, old in zip(merged, linears, strict=True)):
                report.left_alone[path] = f"{'/'.join(names)}: the merged product differs"
                continue
            for name, layer in zip(names, merged, strict=True):
                setattr(parent, name, layer)
            report.linears += len(names)


# --- rotary embedding -------------------------------------------------------------------------------


def _deferred(original: Callable[..., Any], repeats: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model's rotary function that leaves the rotation to the attention function.

    ``repeats``: how often the model's cos and sin hold each angle, 1 or 2.
    """

    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs or q.dim() != 4 or cos.dim() != 3 or cos.shape[0] != 1:
            out: tuple[Tensor, Tensor] = original(q, k, cos, sin, *args, **kwargs)
            return out
        half = cos.shape[-1] // repeats
        mark = TokenRotary(cos[0, :, :half], sin[0, :, :half])
        setattr(q, ROTARY_MARK, mark)
        setattr(k, ROTARY_MARK, mark)
        return q, k

    return rope


def _repeats(original: Callable[..., Any], like: Tensor) -> int | None:
    """How the function wants its angles, found by trying; None where it rotates in another way."""
    for repeats in (2, 1):
        q, k = random_like(1, 4, 5, 32, like=like), random_like(1, 2, 5, 32, like=like)
        angles = random_like(1, 5, 16, like=like).repeat(1, 1, repeats)
        cos, sin = angles.cos(), angles.sin()
        try:
            want = original(q, k, cos, sin)
        except (RuntimeError, ValueError, TypeError):
            continue
        mark = TokenRotary(cos[0, :, :16], sin[0, :, :16])
        if all(agree(rotated(x, mark), y) for x, y in zip((q, k), want, strict=True)):
            return repeats
    return None


def _defer_rotaries(model: nn.Module, report: Fusion) -> None:
    like = next(model.parameters())
    exchanged: list[nn.Module] = []
    before = queries_and_keys(model)
    forwards: dict[type, Any] = {}
    for path, module in model.named_modules():
        kind = type(module)
        forward = kind.forward
        if "forward" in vars(module) or not isinstance(forward, types.FunctionType):
            continue
        if ROPE not in forward.__code__.co_names or ROPE not in forward.__globals__:
            continue
        if is_taken(path, model):
            continue
        if kind not in forwards:
            original = forward.__globals__[ROPE]
            repeats = _repeats(original, like)
            rope = None if repeats is None else _deferred(original, repeats)
            forwards[kind] = rope and with_rope(forward, rope)
        if forwards[kind] is None:
            report.left_alone[path] = f"{kind.__name__} rotates in another way"
            continue
        module.forward = types.MethodType(forwards[kind], module)  # type: ignore[method-assign]
        exchanged.append(module)
    if exchanged and not grown_alike(before, queries_and_keys(model)):
        for module in exchanged:
            del module.forward
        report.left_alone[ROPE] = "rotary embedding: something happens to queries or keys behind it"
        return
    report.rotaries = len(exchanged)


# --- angles -----------------------------------------------------------------------------------------


def _tabulate_angles(model: nn.Module, positions: int, report: Fusion) -> None:
    like = next(model.parameters())
    for module in model.modules():
        if "RotaryEmbedding" not in type(module).__name__ or "forward" in vars(module):
            continue
        table = table_for(module, positions, like)
        if table is None:
            continue
        some = torch.arange(0, positions, max(1, positions // TRIAL_ROWS), device=like.device)[None]
        x = like.new_empty(1, 1, 1)
        if all(agree(a, b) for a, b in zip(table(x, some), module(x, some), strict=True)):
            module.forward = table  # type: ignore[assignment]
            report.tables += 1
