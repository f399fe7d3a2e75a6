"""What stands around attention in a model without weights, as :mod:`headway.engine.fusion` exchanges it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.engine.trial import FEED_FORWARD, TRIAL_ROWS, agree, random_like
from headway.kernels.norm_style import NormStyle
from headway.serving.base import HeadNorms
from headway.serving.flash import normalised

#: Attributes of attention modules that hold the norms of their heads.
HEAD_NORMS = ("q_norm", "k_norm")


class NormKind(NamedTuple):
    """An RMS norm as far as its kernel depends on it."""

    width: int
    style: NormStyle


def norms_of(model: nn.Module) -> list[NormKind]:
    """The norms of a model."""
    return _kinds(model.modules())


def head_norms_of(model: nn.Module) -> list[NormKind]:
    """The norms that attention modules have for the heads of queries and keys."""
    found = (getattr(module, name, None) for module in model.modules() for name in HEAD_NORMS)
    return _kinds(norm for norm in found if isinstance(norm, nn.Module))


def _kinds(modules: Iterable[nn.Module]) -> list[NormKind]:
    """Every kind of norm among modules, once."""
    norms: dict[tuple[Any, ...], nn.Module] = {}
    for module in modules:
        weight = getattr(module, "weight", None)
        if "RMSNorm" in type(module).__name__ and isinstance(weight, Tensor):
            norms.setdefault((type(module), weight.shape), module)
    styles = ((shape[0], style_of(norm)) for (_, shape), norm in norms.items())
    return sorted({NormKind(width, style) for width, style in styles if style is not None})


@torch.inference_mode()
def style_of(norm: nn.Module) -> NormStyle | None:
    """The style that an RMS norm is exchanged in, found by trying on a CPU; None: in none of them."""
    weight, eps = norm.weight, getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    alone = copy.deepcopy(norm).to_empty(device="cpu")
    given = random_like(*weight.shape, like=torch.empty(0, dtype=weight.dtype, device="cpu"))
    alone.load_state_dict({"weight": given}, strict=False)
    x = random_like(1, TRIAL_ROWS, weight.shape[0], like=given)
    want = alone(x)
    for style in NormStyle:
        if agree(normalised(x, x, HeadNorms(given, given, eps, style))[0], want):
            return style
    return None


def feed_forward_widths(model: nn.Module) -> set[int]:
    """Inner widths of gated feed-forward blocks."""
    widths = set()
    for module in model.modules():
        layers = [getattr(module, name, None) for name in FEED_FORWARD]
        gate = layers[0]
        if isinstance(gate, nn.Linear) and all(type(layer) is nn.Linear for layer in layers):
            widths.add(gate.out_features)
    return widths
