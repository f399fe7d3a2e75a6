"""Makes a transformers model fast on a CPU without touching its code.

:func:`accelerate` exchanges parts of a loaded model for faster ones that compute the same:

- linear layers keep their weights in the blocked layout of oneDNN, which otherwise converts them in
  every call; layers that read the same input (q, k, v; gate, up) become one matrix product;
- RMS norms become one torch operator instead of six;
- rotary embedding becomes one compiled kernel instead of a dozen operators.

Every exchange is tried first: the original part and its replacement run on random input, and the
replacement stays only if both agree to rounding. So a model that names its parts as others do but
computes something else keeps its own code, and the report says so.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.errors import InvalidInputError

Level = Literal["auto", "off"]

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling linear layers that read the same input in the models of transformers."""

_TRIAL_ROWS = 3
_ROPE = "apply_rotary_pos_emb"


@dataclass
class Acceleration:
    """What :func:`accelerate` did: how many parts it exchanged, and what it left alone and why."""

    packed_linears: int = 0
    merged_linears: int = 0
    norms: int = 0
    rotaries: int = 0
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = (
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
    _exchange_rotaries(model, report)
    _exchange_norms(model, report)
    _exchange_linears(model, report)
    return report


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two results of the same computation differ by rounding only."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    size = theirs.abs().max().float().item()
    bound = 16 * torch.finfo(theirs.dtype).eps * size
    return (mine.float() - theirs.float()).abs().max().item() <= bound


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(*shape, generator=generator).to(dtype)


# --- linear layers ----------------------------------------------------------------------------------


class PackedWeight:
    """A weight (out, in) in oneDNN's blocked layout, and the product with it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


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


class SharedProduct:
    """One matrix product for several linear layers that are called with the same input, in order.

    The first layer computes all outputs, the others take theirs. An input that is another tensor
    than the last one is a new product, so layers called with different inputs are right too, only
    slower. The outputs are let go when the last layer has taken its own.
    """

    def __init__(self, weight: PackedWeight, sizes: Sequence[int]) -> None:
        self._weight = weight
        self._sizes = list(sizes)
        self._last: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())

    def part(self, index: int, x: Tensor) -> Tensor:
        source, outputs = self._last
        if source is not x:
            outputs = self._weight(x).split(self._sizes, dim=-1)
            self._last = (x, outputs)
        if index == len(self._sizes) - 1:
            self._last = (None, ())
        return outputs[index]


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


def _packing_unavailable(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch has no oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN computes no bfloat16 on this CPU"
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN computes no float16 on this CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"linear layers of {dtype}"
    return None


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
    if not (same_input and same_bias and same_dtype) or _packing_unavailable(first.weight.dtype):
        return
    weight = PackedWeight(
        torch.cat([layer.weight for layer in linears]),
        None if first.bias is None else torch.cat([layer.bias for layer in linears]),
    )
    product = SharedProduct(weight, [layer.out_features for layer in linears])
    merged = [
        MergedLinear(layer.in_features, layer.out_features, product, index)
        for index, layer in enumerate(linears)
    ]
    x = _random(1, _TRIAL_ROWS, first.in_features, dtype=first.weight.dtype)
    if not all(_agree(new(x), old(x)) for new, old in zip(merged, linears, strict=True)):
        report.left_alone[path] = f"{'/'.join(names)}: the merged product differs"
        return
    for name, layer in zip(names, merged, strict=True):
        setattr(parent, name, layer)
    report.packed_linears += len(names)
    report.merged_linears += len(names)


def _pack_child(
    path: str, parent: nn.Module, name: str, child: nn.Linear, report: Acceleration
) -> None:
    reason = _packing_unavailable(child.weight.dtype)
    if reason is not None:
        report.left_alone[path] = reason
        return
    weight = PackedWeight(child.weight, child.bias)
    packed = PackedLinear(child.in_features, child.out_features, weight)
    x = _random(1, _TRIAL_ROWS, child.in_features, dtype=child.weight.dtype)
    if not _agree(packed(x), child(x)):
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
    """One-operator forms of the RMS norms that models use: weight, or 1 + weight in float32."""
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
        x = _random(1, _TRIAL_ROWS, weight.shape[0], dtype=weight.dtype)
        want = module(x)
        for candidate in _norm_candidates(weight.detach(), eps):
            if _agree(candidate(x), want):
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
    tried = 0
    for repeats in (2, 1):
        q, k = _random(1, 4, 5, 16, dtype=torch.float32), _random(1, 2, 5, 16, dtype=torch.float32)
        angles = _random(1, 5, 8, dtype=torch.float32).repeat(1, 1, repeats)
        try:
            want = original(q, k, angles.cos(), angles.sin())
        except (RuntimeError, ValueError):
            continue
        got = fast(q, k, angles.cos(), angles.sin())
        if not all(_agree(a, b) for a, b in zip(got, want, strict=True)):
            return False
        tried += 1
    return tried > 0


def _exchange_rotaries(model: nn.Module, report: Acceleration) -> None:
    if importlib.util.find_spec("numba") is None:
        report.left_alone[_ROPE] = "rotary embedding (numba is not installed)"
        return
    forwards: dict[type, Any] = {}
    for path, module in model.named_modules():
        kind = type(module)
        forward = kind.forward
        if "forward" in vars(module) or not inspect.isfunction(forward):
            continue
        if _ROPE not in forward.__code__.co_names or _ROPE not in forward.__globals__:
            continue
        if kind not in forwards:
            original = forward.__globals__[_ROPE]
            fast = _fast_rope(original)
            forwards[kind] = _with_global(forward, fast) if _rope_agrees(original, fast) else None
        if forwards[kind] is None:
            report.left_alone[path] = f"{kind.__name__} rotates in another way"
            continue
        module.forward = types.MethodType(forwards[kind], module)  # type: ignore[method-assign]
        report.rotaries += 1


def _with_global(function: Any, rope: Callable[..., Any]) -> Any:
    """A copy of a function that sees another ``apply_rotary_pos_emb``; its module stays as it is."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, _ROPE: rope},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
