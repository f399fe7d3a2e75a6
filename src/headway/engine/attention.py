"""Where transformers' models meet Headway: the attention function they call, and what it needs.

The function is registered under one name and holds no state: the object that knows the current step
travels through the model call as the keyword argument ``headway``. Which layers a model has, and what
each stores and masks, is learnt by running it once on a few tokens: no model is known by name here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from headway.engine.expansion import expansion_of
from headway.engine.kv_cache import KVCache, KVShape
from headway.errors import HeadwayError, UnsupportedError
from headway.problem import Mask
from headway.serving.base import AttentionBackend, AttentionLayer
from headway.serving.mla import MLALayer

if TYPE_CHECKING:
    from headway.engine.pieces import Pieces

#: The name under which transformers finds :func:`paged_attention`. transformers builds no mask for a
#: name that has no mask function of its own, so the masks are Headway's alone.
ATTENTION_NAME = "headway_paged"

#: Attribute of a query or key that is still to be rotated: its :class:`TokenRotary`.
ROTARY_MARK = "headway_rotary"

#: Layers whose memory is keys and values of past tokens, in transformers' words.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class Attend(Protocol):
    """What travels as ``headway=``. q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv) -> (T, Hq, Dv), which is
    ``options["out"]`` where there is one."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor: ...


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    headway: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, Hq, T, D) -> (1, T, Hq, Dv).

    Queries and keys that carry a rotary mark are still to be rotated (:mod:`headway.engine.fusion`).
    """
    options["attention_mask"] = attention_mask
    rotary = getattr(query, ROTARY_MARK, None)
    if rotary is not getattr(key, ROTARY_MARK, None):
        raise UnsupportedError(f"{type(module).__name__} rotates queries or keys, but not both")
    options["rotary"] = rotary
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return headway(module, q, k, v, options).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class PagedAttention:
    """The ``headway=`` of the engine's steps: a backend, the layers, and their caches.

    ``pieces``: the captured pieces that the current step runs in, if it does (:mod:`.pieces`).
    """

    pieces: Pieces | None = None

    def __init__(
        self, backend: AttentionBackend, layers: dict[int, AttentionLayer], cache: KVCache
    ) -> None:
        self._backend = backend
        self._layers = {
            index: (layer, cache.layers[position])
            for position, (index, layer) in enumerate(sorted(layers.items()))
        }

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        layer, kv_cache = self._layers[module.layer_idx]  # type: ignore[index]
        return self._backend.forward(
            q, k, v, kv_cache, layer, options["rotary"], out=options.get("out")
        )


class LayerProbe:
    """A ``headway=`` that attends to nothing and writes down what each layer asks for."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.layers: dict[int, AttentionLayer] = {}
        self.dtypes: set[torch.dtype] = set()

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        index = getattr(module, "layer_idx", None)
        if index is None or index in self.layers:
            raise UnsupportedError(
                f"{type(module).__name__}: layer_idx {index}; every attention layer needs its own"
            )
        layer = attention_layer(self.config, module, q, k, v, options)
        self.layers[index] = layer
        self.dtypes.add(k.dtype)
        width = layer.value_dim if isinstance(layer, MLALayer) else layer.head_dim_v
        return q.new_zeros(*q.shape[:-1], width)

    def shapes(self) -> list[KVShape]:
        """What the layers store, in order."""
        layers = (self.layers[index] for index in sorted(self.layers))
        return [
            KVShape(one.num_kv_heads, one.head_dim, one.head_dim_v, isinstance(one, MLALayer))
            for one in layers
        ]


def attention_layer(
    config: PretrainedConfig,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
) -> AttentionLayer:
    """Translate one call of transformers' interface; UnsupportedError for what Headway would drop."""
    name, index = type(module).__name__, int(module.layer_idx)  # type: ignore[arg-type]
    for option in ("attention_mask", "position_bias"):
        if options.get(option) is not None:
            raise UnsupportedError(f"{name} (layer {index}) passes {option}: paged calls take none")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedError(f"{name} (layer {index}) is not causal: the engine runs decoders")
    scaling = options.get("scaling")
    layer = AttentionLayer(
        layer_id=index,
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=k.shape[2],
        head_dim_v=v.shape[2],
        softmax_scale=q.shape[2] ** -0.5 if scaling is None else float(scaling),
        mask=_mask(config, name, index, options.get("sliding_window")),
        softcap=float(options.get("softcap") or 0.0),
        sinks=None if options.get("s_aux") is None else options["s_aux"].detach(),
    )
    expansion = expansion_of(module)
    if expansion is None:
        return layer
    if layer.softcap or layer.sinks is not None or layer.mask != Mask(causal=True, window_right=0):
        raise UnsupportedError(f"{name} (layer {index}): latent attention is plain and causal")
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return MLALayer(**fields, w_uk=expansion.w_uk, w_uv=expansion.w_uv)


def _mask(config: PretrainedConfig, name: str, index: int, window: int | None) -> Mask:
    """transformers counts the token itself in a window's width; chunks are known to the config alone."""
    types = getattr(config, "layer_types", None)
    kind = types[index] if types is not None else None
    if kind is not None and kind not in LAYER_TYPES:
        raise UnsupportedError(f"{name} (layer {index}) is a {kind} layer: not an attention layer")
    if kind == "sliding_attention" and window is None:
        raise UnsupportedError(f"{name} (layer {index}) is sliding but passes no sliding_window")
    chunk = int(config.attention_chunk_size) if kind == "chunked_attention" else 0
    left = None if window is None else int(window) - 1
    return Mask(causal=True, window_left=left, window_right=0, attention_chunk=chunk)


def probe_layers(model: nn.Module, config: PretrainedConfig) -> LayerProbe:
    """Run the model on two tokens and report its attention layers.

    Raises:
        UnsupportedError: some layer keeps another memory than keys and values, or takes them elsewhere.
    """
    probe = LayerProbe(config)
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device)[None]
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False, headway=probe)
    except (HeadwayError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model does that was written for other attention
        raise UnsupportedError(
            f"{type(model).__name__} does not run on pages: {type(error).__name__}: {error}"
        ) from error
    expected = getattr(config, "num_hidden_layers", len(probe.layers))
    if len(probe.layers) != expected or not probe.layers:
        raise UnsupportedError(
            f"{type(model).__name__}: {len(probe.layers)} of {expected} layers are attention over "
            "keys and values of their own; the engine runs models in which all are"
        )
    return probe
