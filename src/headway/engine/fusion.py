"""Makes a transformers model fast on a GPU without touching its code: fewer, larger kernels.

:func:`fuse` exchanges parts of a loaded model for others that compute the same:

- linear layers that read the same input (q, k, v) become one matrix product;
- a gated feed-forward block becomes two products and one kernel between them;
- RMS norms become one kernel each;
- rotary embedding is left to the kernel that writes keys into the cache: queries and keys arrive at the
  attention function unrotated, with the angles beside them.

Every exchange is tried first, on random input, and stays only if original and replacement agree to
rounding. That nothing happens to queries and keys between their rotation and the attention function is
checked on the whole model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.engine.attention import ROTARY_MARK
from headway.kernels.portable.gated import ACTIVATIONS, Activation, gated
from headway.kernels.portable.norm import NormStyle, rms_norm
from headway.serving.base import TokenRotary

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"),)
"""Names of sibling linear layers that read the same input in the models of transformers."""

_ROPE = "apply_rotary_pos_emb"
_TRIAL_ROWS = 3


@dataclass
class Fusion:
    """What :func:`fuse` did: how many parts it exchanged, and what it left alone and why."""

    linears: int = 0
    feed_forwards: int = 0
    norms: int = 0
    rotaries: int = 0
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = (
            f"{self.linears} linear layers merged, {self.feed_forwards} feed-forward blocks, "
            f"{self.norms} norms and {self.rotaries} rotary embeddings exchanged"
        )
        return done + "".join(
            f"; left alone: {why}" for why in sorted(set(self.left_alone.values()))
        )


@torch.inference_mode()
def fuse(model: nn.Module) -> Fusion:
    """Exchange parts of a model in eval mode, in place. Merged layers give up their own weights, so it
    cannot be trained or saved afterwards. Its attention has to be ``headway_paged``."""
    report = Fusion()
    _exchange_norms(model, report)
    _exchange_feed_forwards(model, report)
    _merge_linears(model, report)
    _defer_rotaries(model, report)
    return report


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two results of the same computation differ by rounding only."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    bound = 16 * torch.finfo(theirs.dtype).eps * theirs.abs().max().float().item()
    return (mine.float() - theirs.float()).abs().max().item() <= bound


def _random(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


# --- norms ------------------------------------------------------------------------------------------


def _exchange_norms(model: nn.Module, report: Fusion) -> None:
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        named = "RMSNorm" in type(module).__name__ and "forward" not in vars(module)
        if not named or not isinstance(weight, Tensor) or not isinstance(eps, float):
            continue
        x = _random(1, _TRIAL_ROWS, weight.shape[0], like=weight)
        want = module(x)
        for style in NormStyle:
            candidate = _norm(weight.detach(), eps, style)
            if _agree(candidate(x), want):
                module.forward = candidate  # type: ignore[method-assign]
                report.norms += 1
                break
        else:
            report.left_alone[path] = f"{type(module).__name__} is no RMS norm known here"


def _norm(weight: Tensor, eps: float, style: NormStyle) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, weight, eps, style)


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
        weight, bias = _joined([gate, up])
        x = _random(1, _TRIAL_ROWS, gate.in_features, like=weight)
        want = module(x)
        for activation in ACTIVATIONS:
            forward = _feed_forward(weight, bias, down, activation)
            if _agree(forward(x), want):
                module.forward = forward  # type: ignore[method-assign]
                del module.gate_proj, module.up_proj
                report.feed_forwards += 1
                break
        else:
            report.left_alone[path] = f"{type(module).__name__} has no activation known here"


def _feed_forward(
    weight: Tensor, bias: Tensor | None, down: nn.Linear, activation: Activation
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = down(gated(functional.linear(x, weight, bias), activation))
        return out

    return forward


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat(tuple(layer.weight for layer in layers))
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None


# --- linear layers that read the same input ---------------------------------------------------------


class SharedProduct:
    """One matrix product for several linear layers that are called with the same input, in order.

    The first layer computes all outputs, the others take theirs. An input that is another tensor than
    the last one is a new product, so layers called with different inputs are right too, only slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self._weight = weight
        self._bias = bias
        self._sizes = list(sizes)
        self._last: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())

    def part(self, index: int, x: Tensor) -> Tensor:
        source, outputs = self._last
        if source is not x:
            product = functional.linear(x, self._weight, self._bias)
            outputs = product.split(self._sizes, dim=-1)
            self._last = (x, outputs)
        if index == len(self._sizes) - 1:
            self._last = (None, ())
        return outputs[index]


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
            product = SharedProduct(*_joined(linears), [one.out_features for one in linears])
            merged = [SharedLinear(one, product, index) for index, one in enumerate(linears)]
            x = _random(1, _TRIAL_ROWS, linears[0].in_features, like=linears[0].weight)
            if not all(_agree(new(x), old(x)) for new, old in zip(merged, linears, strict=True)):
                report.left_alone[path] = f"{'/'.join(names)}: the merged product differs"
                continue
            for name, layer in zip(names, merged, strict=True):
                setattr(parent, name, layer)
            report.linears += len(names)


# --- rotary embedding -------------------------------------------------------------------------------


def rotated(x: Tensor, rotary: TokenRotary) -> Tensor:
    """x (1, heads, tokens, D) as the append kernel rotates it; what a trial compares with."""
    half = rotary.cos.shape[-1]
    cos, sin = (t.float()[None, None] for t in (rotary.cos, rotary.sin))
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


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
        q, k = _random(1, 4, 5, 32, like=like), _random(1, 2, 5, 32, like=like)
        angles = _random(1, 5, 16, like=like).repeat(1, 1, repeats)
        cos, sin = angles.cos(), angles.sin()
        try:
            want = original(q, k, cos, sin)
        except (RuntimeError, ValueError, TypeError):
            continue
        mark = TokenRotary(cos[0, :, :16], sin[0, :, :16])
        if all(_agree(rotated(x, mark), y) for x, y in zip((q, k), want, strict=True)):
            return repeats
    return None


def _defer_rotaries(model: nn.Module, report: Fusion) -> None:
    like = next(model.parameters())
    exchanged: list[nn.Module] = []
    before = _queries_and_keys(model)
    forwards: dict[type, Any] = {}
    for path, module in model.named_modules():
        kind = type(module)
        forward = kind.forward
        if "forward" in vars(module) or not isinstance(forward, types.FunctionType):
            continue
        if _ROPE not in forward.__code__.co_names or _ROPE not in forward.__globals__:
            continue
        if kind not in forwards:
            original = forward.__globals__[_ROPE]
            repeats = _repeats(original, like)
            rope = None if repeats is None else _deferred(original, repeats)
            forwards[kind] = rope and _with_global(forward, rope)
        if forwards[kind] is None:
            report.left_alone[path] = f"{kind.__name__} rotates in another way"
            continue
        module.forward = types.MethodType(forwards[kind], module)  # type: ignore[method-assign]
        exchanged.append(module)
    if exchanged and not _same(before, _queries_and_keys(model)):
        for module in exchanged:
            del module.forward
        report.left_alone[_ROPE] = (
            "rotary embedding: something happens to queries or keys behind it"
        )
        return
    report.rotaries = len(exchanged)


def _with_global(function: types.FunctionType, rope: Callable[..., Any]) -> types.FunctionType:
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


class _Witness:
    """A ``headway=`` that writes down queries and keys, rotated, and hands values on."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        rotary = options.get("rotary")
        for x in (q, k):
            heads_first = x.transpose(0, 1)[None]
            self.seen.append(heads_first if rotary is None else rotated(heads_first, rotary))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def _queries_and_keys(model: nn.Module) -> list[Tensor]:
    """What every attention layer attends with, for a few tokens at positions that differ."""
    device = next(model.parameters()).device
    witness = _Witness()
    ids = torch.arange(4, device=device)[None]
    positions = torch.tensor([[0, 1, 5, 11]], device=device)
    model(input_ids=ids, position_ids=positions, use_cache=False, headway=witness)
    return witness.seen


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Equal but for what roundings grow to over a model's layers; a rotation too many is far beyond."""

    def errors() -> Iterator[float]:
        for a, b in zip(before, after, strict=True):
            yield ((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-20)).item()

    return len(before) == len(after) and all(error < 0.1 for error in errors())
