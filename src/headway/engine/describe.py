"""Which attention calls a model makes, found out without its weights, and who would run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from headway import dispatch
from headway.engine import loader
from headway.engine.attention import LayerProbe, probe_layers
from headway.engine.config import EngineConfig
from headway.problem import Problem, check
from headway.serving.base import AttentionLayer, ForwardBatch
from headway.serving.flash import FlashAttentionBackend


@dataclass(frozen=True)
class LayerKind:
    """Layers of a model whose attention calls are alike: one of them, and how many there are."""

    layer: AttentionLayer
    count: int

    def __str__(self) -> str:
        one = self.layer
        dims = {one.head_dim, one.head_dim_v}
        parts = [
            f"{self.count} layers",
            f"{one.num_q_heads}/{one.num_kv_heads} heads",
            f"head_dim {'/'.join(map(str, sorted(dims, reverse=True)))}",
        ]
        if one.mask.window_left is not None:
            parts.append(f"window {one.mask.window_left + 1}")
        if one.mask.attention_chunk:
            parts.append(f"chunk {one.mask.attention_chunk}")
        if one.softcap:
            parts.append(f"softcap {one.softcap:g}")
        if one.sinks is not None:
            parts.append("sinks")
        return ", ".join(parts)


def kinds(probe: LayerProbe) -> list[LayerKind]:
    """The probed layers, those alike together, in the model's order."""
    found: dict[object, list[AttentionLayer]] = {}
    for _, layer in sorted(probe.layers.items()):
        found.setdefault(layer.kind, []).append(layer)
    return [LayerKind(layers[0], len(layers)) for layers in found.values()]


def probe_without_weights(config: EngineConfig) -> tuple[LayerProbe, torch.dtype]:
    """The attention layers of a model, of whose checkpoint only the configuration is read; its dtype."""
    source = loader.find(config)
    model_config = loader._load_config(config, source)
    dtype = loader._dtype(config, source, model_config)
    # bfloat16, whatever the model's own: torch's grouped matmul has shapes for nothing else.
    bare = dataclasses.replace(config, load_format="dummy", dtype="bfloat16")
    with torch.device("meta"):
        model = loader._load_model(bare, source, model_config)
    return probe_layers(model, model.config.get_text_config()), dtype


def decode_problem(
    config: EngineConfig,
    layer: AttentionLayer,
    dtype: torch.dtype,
    *,
    batch_size: int = 1,
    seqlen_k: int = 1024,
) -> Problem:
    """The call such a layer makes in a decode step of ``batch_size`` sequences of ``seqlen_k`` tokens."""
    device = loader.choose_device(config.device)
    pages = -(-seqlen_k // config.page_size)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    batch = ForwardBatch(
        cu_seqlens_q=torch.arange(batch_size + 1, **int32),
        seqlens_k=torch.full((batch_size,), seqlen_k - 1, **int32),
        page_table=torch.arange(batch_size * pages, **int32).view(batch_size, pages),
        max_seqlen_q=1,
        max_seqlen_k=seqlen_k,
    )

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if layer.sinks is not None:
        layer = dataclasses.replace(layer, sinks=empty(layer.num_q_heads))
    cache = batch_size * pages, config.page_size, layer.num_kv_heads
    backend = FlashAttentionBackend(config.attention_backend, config.flash_attn_version)
    backend.init_forward_metadata(batch)
    problem = backend.problem(
        empty(batch_size, layer.num_q_heads, layer.head_dim),
        empty(batch_size, layer.num_kv_heads, layer.head_dim),
        empty(batch_size, layer.num_kv_heads, layer.head_dim_v),
        (empty(*cache, layer.head_dim), empty(*cache, layer.head_dim_v)),
        layer,
    )
    return check(problem)


def explain(
    config: EngineConfig, probe: LayerProbe, dtype: torch.dtype
) -> list[tuple[LayerKind, dispatch.Explanation]]:
    """For each kind of layer, what each provider says of its decode call."""
    return [
        (kind, dispatch.explain(decode_problem(config, kind.layer, dtype))) for kind in kinds(probe)
    ]


def chosen(explanations: Iterable[tuple[LayerKind, dispatch.Explanation]]) -> str:
    """The providers that run a model's layers, in one line."""
    found = list(explanations)
    names = {explanation.chosen or "none" for _, explanation in found}
    if len(names) == 1:
        return f"{names.pop()} ({found[0][1].why})"
    return "; ".join(f"{explanation.chosen or 'none'} for {kind}" for kind, explanation in found)
