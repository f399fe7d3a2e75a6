"""Makes a transformers model fast on a CPU without touching its code.

:func:`accelerate` exchanges parts of a loaded model for faster ones that compute the same:

- linear layers keep their weights in the blocked layout of oneDNN, which otherwise converts them in
  every call; layers that read the same input (q, k, v; gate, up) become one matrix product;
- RMS norms become one compiled kernel instead of six operators;
- rotary embedding becomes one compiled kernel instead of a dozen operators;
- a plain decoder layer is exchanged as a whole (:mod:`.cpu_layer`).

Every exchange is tried first: the original part and its replacement run on random input, and the
replacement stays only if both agree to rounding. So a model that names its parts as others do but
computes something else keeps its own code, and the report says so.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.engine.packing import PackedWeight, packing_unavailable
from headway.engine.parts import ROPE, SharedProduct, with_rope
from headway.engine.trial import TRIAL_ROWS, agree, is_taken, looks_plain, random_like
from headway.errors import InvalidInputError

Level = Literal["auto", "off"]

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling linear layers that read the same input in the models of transformers."""


@dataclass
class Acceleration:
    """What :func:`accelerate` did: how many parts it exchanged, and what it left alone and why."""

    layers: int = 0
    packed_linears: int = 0
    merged_linears: int = 0
    norms: int = 0
    rotaries: int = 0
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = (
            f"{self.layers} layers exchanged whole; "
            f"{self.packed_linears} linear layers packed ({self.merged_linears} merged), "
            f"{self.norms} norms and {self.rotaries} rotary embeddings exchanged"
        )
        reasons = sorted(set(self.left_alone.values()))
        return done + "".join(f"; left alone: {reason}" for reason in reasons)


@torch.inference_mode()
def accelerate(model: nn.Module, *, level: Level = "auto") -> Acceleration:
    """Exchange parts of a model, in place, for faster ones that compute the same to rounding.

    The linear layers' own weights are given up (a packed copy takes their place), so the model
    cannot be trained, saved or moved to another device afterwards.

    Args:
        model: a model in eval mode. One that is not on a CPU is left as it is.
        level: "off" does nothing.

    Raises:
        InvalidInputError: unknown level, or a model in training mode.
    """
    if level not in ("auto", "off"):
        raise InvalidInputError("level", level, '"auto" or "off"')
    report = Acceleration()
    if level == "off":
        return report
    if model.training:
        raise InvalidInputError("model", "in training mode", "model.eval() first")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        report.left_alone[""] = "the model is not on a CPU"
        return report
    if _has_compiler():
        _exchange_layers(model, report)
    _exchange_rotaries(model, report)
    _exchange_norms(model, report)
    _exchange_linears(model, report)
    return report


def _has_compiler() -> bool:
    return importlib.util.find_spec("numba") is not None


# --- whole layers -----------------------------------------------------------------------------------


def _exchange_layers(model: nn.Module, report: Acceleration) -> None:
    from headway.engine.cpu_layer import exchange_for, take_over

    for _, layer in model.named_modules():
        if not looks_plain(layer) or packing_unavailable(next(layer.parameters()).dtype):
            continue
        replacement = exchange_for(layer)
        if replacement is not None:
            take_over(layer, replacement)
            report.layers += 1


# --- linear layers ----------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference with its weight packed: (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, weight: PackedWeight) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._packed = weight

    def forward(self, x: Tensor) -> Tensor:
        return self._packed(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class MergedLinear(nn.Module):
    """One of the linear layers of a :class:`SharedProduct`."""

    def __init__(self, in_features: int, out_features: int, product: SharedProduct, index: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._product = product
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._product.part(self._index, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _exchange_linears(model: nn.Module, report: Acceleration) -> None:
    # Parents only: a reference to each layer would keep all old weights until the last is packed.
    parents = [
        (path, m) for path, m in model.named_modules() if next(m.children(), None) is not None
    ]
    for path, parent in parents:
        for names in SHARED_INPUT:
            _merge_siblings(path, parent, names, report)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                _pack_child(f"{path}.{name}".lstrip("."), parent, name, child, report)


def _merge_siblings(
    path: str, parent: nn.Module, names: tuple[str, ...], report: Acceleration
) -> None:
    layers = [getattr(parent, name, None) for name in names]
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    if len(linears) != len(names):
        return
    first = linears[0]
    same_input = all(layer.in_features == first.in_features for layer in linears)
    same_bias = len({layer.bias is None for layer in linears}) == 1
    same_dtype = all(layer.weight.dtype == first.weight.dtype for layer in linears)
    if not (same_input and same_bias and same_dtype) or packing_unavailable(first.weight.dtype):
        return
    weight = PackedWeight.of(*linears)
    product = SharedProduct(weight, [layer.out_features for layer in linears])
    merged = [
        MergedLinear(layer.in_features, layer.out_features, product, index)
        for index, layer in enumerate(linears)
    ]
    x = random_like(1, TRIAL_ROWS, first.in_features, like=first.weight)
    if not all(agree(new(x), old(x)) for new, old in zip(merged, linears, strict=True)):
        report.left_alone[path] = f"{'/'.join(names)}: the merged product differs"
        return
    for name, layer in zip(names, merged, strict=True):
        setattr(parent, name, layer)
    report.packed_linears += len(names)
    report.merged_linears += len(names)


def _pack_child(
    path: str, parent: nn.Module, name: str, child: nn.Linear, report: Acceleration
) -> None:
    reason = packing_unavailable(child.weight.dtype)
    if reason is not None:
        report.left_alone[path] = reason
        return
    weight = PackedWeight.of(child)
    packed = PackedLinear(child.in_features, child.out_features, weight)
    x = random_like(1, TRIAL_ROWS, child.in_features, like=child.weight)
    if not agree(packed(x), child(x)):
        report.left_alone[path] = "a packed linear layer differs"
        return
    setattr(parent, name, packed)
    report.packed_linears += 1


# --- norms ------------------------------------------------------------------------------------------


def _plain_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    shape = tuple(weight.shape)
    return lambda x: functional.rms_norm(x, shape, weight, eps)


def _float32_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    shape, wide = tuple(weight.shape), weight.float()
    return lambda x: functional.rms_norm(x.float(), shape, wide, eps).to(x.dtype)


def _norm_candidates(weight: Tensor, eps: float) -> Iterator[Callable[[Tensor], Tensor]]:
    """The RMS norms that models use as one kernel, or where that cannot be, as one torch operator."""
    if _has_compiler() and weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from headway.engine.cpu_layer import anywhere
        from headway.kernels.cpu.norm import RMSNorm
        from headway.kernels.norm_style import NormStyle

        for style in NormStyle:
            yield anywhere(RMSNorm(weight, eps, style))
        return
    yield _plain_norm(weight, eps)
    if weight.dtype is torch.float32:
        yield _plain_norm(1 + weight, eps)
    else:
        yield _float32_norm(1 + weight.float(), eps)


def _exchange_norms(model: nn.Module, report: Acceleration) -> None:
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        named = "RMSNorm" in type(module).__name__ and "forward" not in vars(module)
        if not named or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        if is_taken(path, model):
            continue
        x = random_like(1, TRIAL_ROWS, weight.shape[0], like=weight)
        want = module(x)
        for candidate in _norm_candidates(weight.detach(), eps):
            if agree(candidate(x), want):
                module.forward = candidate  # type: ignore[method-assign]
                report.norms += 1
                break
        else:
            report.left_alone[path] = f"{type(module).__name__} is no RMS norm known here"


# --- rotary embedding -------------------------------------------------------------------------------


def _fast_rope(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The compiled rotary embedding under the signature of a model's own, which takes the rest."""
    from headway.kernels.cpu.rotary import DTYPE_CODES, rotary

    @functools.wraps(original)
    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        dim = q.shape[-1]
        if (
            args
            or kwargs
            or q.dim() != 4
            or q.shape[0] != 1
            or cos.dim() != 3
            or cos.shape[0] != 1
            or cos.shape[-1] not in (dim, dim // 2)
            or not q.dtype == k.dtype == cos.dtype == sin.dtype
            or q.dtype not in DTYPE_CODES
            or not q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        ):
            return original(q, k, cos, sin, *args, **kwargs)
        q_out, k_out = rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]

    return rope


def _rope_agrees(original: Callable[..., Any], fast: Callable[..., Any]) -> bool:
    """Tried with both forms of cos and sin; the one a model does not use may fail in its function."""
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False  # rotates one tensor at a time, say
    tried, like = 0, torch.zeros(1, dtype=torch.float32, device="cpu")
    for repeats in (2, 1):
        q, k = random_like(1, 4, 5, 16, like=like), random_like(1, 2, 5, 16, like=like)
        angles = random_like(1, 5, 8, like=like).repeat(1, 1, repeats)
        try:
            want = original(q, k, angles.cos(), angles.sin())
        except (RuntimeError, ValueError):
            continue
        got = fast(q, k, angles.cos(), angles.sin())
        if not all(agree(a, b) for a, b in zip(got, want, strict=True)):
            return False
        tried += 1
    return tried > 0


def _exchange_rotaries(model: nn.Module, report: Acceleration) -> None:
    if not _has_compiler():
        report.left_alone[ROPE] = "rotary embedding (numba is not installed)"
        return
    forwards: dict[type, Any] = {}
    for path, module in model.named_modules():
        kind = type(module)
        forward = kind.forward
        if "forward" in vars(module) or not inspect.isfunction(forward):
            continue
        if ROPE not in forward.__code__.co_names or ROPE not in forward.__globals__:
            continue
        if is_taken(path, model):
            continue
        if kind not in forwards:
            original = forward.__globals__[ROPE]
            fast = _fast_rope(original)
            forwards[kind] = with_rope(forward, fast) if _rope_agrees(original, fast) else None
        if forwards[kind] is None:
            report.left_alone[path] = f"{kind.__name__} rotates in another way"
            continue
        module.forward = types.MethodType(forwards[kind], module)  # type: ignore[method-assign]
        report.rotaries += 1
