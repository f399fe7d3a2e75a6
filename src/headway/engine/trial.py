"""Trying a replacement of a model's part before it takes the part's place: both run on random input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headway.engine.expansion import expansion_of
from headway.serving.base import TokenRotary
from headway.serving.flash import normalised, rotated

TRIAL_ROWS = 3

PARTS = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two results of the same computation differ by rounding only."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    bound = 16 * torch.finfo(theirs.dtype).eps * theirs.abs().max().float().item()
    return (mine.float() - theirs.float()).abs().max().item() <= bound


def random_like(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(len(shape) + shape[-1])
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like.device, like.dtype)


def looks_plain(layer: nn.Module) -> bool:
    """Whether a module has the parts of a plain decoder layer, and no parameters besides."""
    if {name for name, _ in layer.named_children()} != PARTS or "forward" in vars(layer):
        return False
    attention: Any = layer.self_attn
    linears = [getattr(attention, name, None) for name in PROJECTIONS]
    linears += [getattr(layer.mlp, name, None) for name in FEED_FORWARD]
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    others = [one for one in head_norms if isinstance(one, nn.Module)]
    known = [*linears, *others, layer.input_layernorm, layer.post_attention_layernorm]
    if not all(type(one) is nn.Linear for one in linears) or len(others) == 1:
        return False
    held = {id(p) for module in known for p in module.parameters()}  # type: ignore[union-attr]
    return all(id(p) in held for p in layer.parameters()) and isinstance(
        getattr(attention, "head_dim", None), int
    )


class LayerForward(ABC):
    """What may take the place of a decoder layer's ``forward``.

    ``repeats``: how often the model's cos and sin hold each angle, 1 or 2.
    """

    repeats: int

    @abstractmethod
    def __call__(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        headway: Any,
        **__: Any,
    ) -> Tensor:
        """Hidden states (1, tokens, width) in and out."""


def is_taken(path: str, model: nn.Module) -> bool:
    """Whether a module is part of a layer that was exchanged as a whole, and never called again."""
    parents = path.split(".")
    above = (".".join(parents[:n]) for n in range(1, len(parents)))
    return any(isinstance(vars(model.get_submodule(p)).get("forward"), LayerForward) for p in above)


class LayerTrial:
    """A layer's own answers on random input: what it hands to attention, and its output."""

    def __init__(self, layer: nn.Module) -> None:
        weight: Tensor = layer.input_layernorm.weight  # type: ignore[assignment, union-attr]
        self._x = random_like(1, TRIAL_ROWS, weight.shape[0], like=weight)
        width = int(layer.self_attn.head_dim)  # type: ignore[union-attr, arg-type]
        self._angles = {
            repeats: random_like(1, TRIAL_ROWS, width // 2, like=weight).repeat(1, 1, repeats)
            for repeats in (1, 2)
        }
        self.options: dict[str, Any] | None = None
        self._want: dict[int, list[Tensor]] = {}
        for repeats in self._angles:
            witness = Witness()
            try:
                out = self._run(layer, repeats, witness)
            except (RuntimeError, ValueError, TypeError):
                continue
            if isinstance(out, Tensor) and len(witness.seen) == 3:
                self._want[repeats] = [*witness.seen, out]
                self.options = witness.options

    def is_passed_by(self, fused: LayerForward) -> bool:
        want = self._want.get(fused.repeats)
        if want is None:
            return False
        witness = Witness()
        out = self._run(fused, fused.repeats, witness)
        return all(agree(x, y) for x, y in zip([*witness.seen, out], want, strict=True))

    def _run(self, layer: Any, repeats: int, witness: Witness) -> Any:
        angles = self._angles[repeats]
        return layer(
            self._x.clone(),
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            use_cache=False,
            position_embeddings=(angles.cos(), angles.sin()),
            headway=witness,
        )


class Witness:
    """A ``headway=`` that writes down what it is given, encoded, and hands values on.

    ``pieces``: captured pieces that the model's layers run in.
    """

    def __init__(self, pieces: Any = None) -> None:
        self.pieces = pieces
        self.seen: list[Tensor] = []
        self.options: dict[str, Any] = {}

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        rotary: TokenRotary | None = options.get("rotary")
        out: Tensor | None = options.get("out")
        self.options = {name: options[name] for name in options if name not in ("rotary", "out")}
        if rotary is not None and rotary.norms is not None:
            q, k = normalised(q, k, rotary.norms)
        for x in (q, k):
            heads_first = x.transpose(0, 1)[None]
            self.seen.append(
                heads_first.clone() if rotary is None else rotated(heads_first, rotary)
            )
        self.seen.append(v.clone())  # the memory may be the next layer's too
        expansion = expansion_of(module)
        if expansion is not None:
            return expansion.values(v)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return values if out is None else out.copy_(values)


def queries_and_keys(model: nn.Module, pieces: Any = None) -> list[Tensor]:
    """What every attention layer attends with, for a few tokens at positions that differ: q, k, v of each.

    ``pieces``: captured pieces (:mod:`.pieces`) to run the model in.
    """
    device = next(model.parameters()).device
    witness = Witness(pieces)
    tokens = [0, 1, 2, 3]
    positions = [0, 1, 5, 11]
    if pieces is not None:
        pieces.begin(len(tokens))
        padding = [0] * (pieces.rows_for(len(tokens)) - len(tokens))
        tokens, positions = tokens + padding, positions + padding
    model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        headway=witness,
    )
    return witness.seen


def grown_alike(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Equal but for what roundings grow to over a model's layers; a rotation too many is far beyond."""

    def errors() -> Iterator[float]:
        for a, b in zip(before, after, strict=True):
            yield ((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-20)).item()

    return len(before) == len(after) and all(error < 0.1 for error in errors())
