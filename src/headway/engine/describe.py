"""Which attention calls a model makes, found out without its weights, and who would run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headway import devices, dispatch
from headway.engine import loader
from headway.engine.attention import LayerProbe, probe_layers
from headway.engine.config import EngineConfig
from headway.engine.latent import keep_latent
from headway.errors import InvalidInputError
from headway.problem import KVLayout, Problem, Scores, check
from headway.serving.base import AttentionLayer, ForwardBatch
from headway.serving.flash import FlashAttentionBackend
from headway.serving.mla import MLALayer


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
        if isinstance(one, MLALayer):
            expanded = one.nope_dim + one.head_dim - one.latent_dim
            parts.append(f"latent, expanded to {expanded}/{one.value_dim}")
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
    """The attention layers of a model, of whose checkpoint only the configuration is read; its dtype.

    ``config.model`` may also be the path of a config.json.
    """
    model, dtype = model_without_weights(config)
    return probe_layers(model, model.config.get_text_config()), dtype


def model_without_weights(config: EngineConfig) -> tuple[PreTrainedModel, torch.dtype]:
    """A model on the meta device, of whose checkpoint only the configuration is read; the latter's dtype.

    ``config.model`` may also be the path of a config.json.
    """
    path = Path(config.model)
    if path.name == "config.json" and path.is_file():
        config = dataclasses.replace(config, model=str(path.parent))
    source = loader.find(config)
    model_config = loader.load_config(config, source)
    dtype = loader.checkpoint_dtype(config, source, model_config)
    # bfloat16, whatever the model's own: torch's grouped matmul has shapes for nothing else.
    bare = dataclasses.replace(config, load_format="dummy", dtype="bfloat16")
    with torch.device("meta"):
        model = loader.load_model(bare, source, model_config)
    keep_latent(model)
    return model, dtype


@dataclass(frozen=True)
class Step:
    """Sequences of a step, all alike: ``seqlen_q`` new tokens each, ``seqlen_k`` with them."""

    batch_size: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1024

    def __post_init__(self) -> None:
        if self.seqlen_q > self.seqlen_k:
            given = f"{self.seqlen_q} new tokens of {self.seqlen_k}"
            raise InvalidInputError("seqlen_q", given, "at most seqlen_k, which counts them too")

    def __str__(self) -> str:
        kind = "decode" if self.seqlen_q == 1 else f"{self.seqlen_q} new tokens"
        if self == Step(seqlen_q=self.seqlen_q):
            return kind
        return f"{kind}, {self.batch_size} sequences of {self.seqlen_k}"


def problem_of(
    config: EngineConfig, layer: AttentionLayer, dtype: torch.dtype, step: Step
) -> Problem:
    """The attention call that a layer makes in a step, on tensors nobody fills.

    On a CPU it appends to the cache, elsewhere the cache has been written before, and so it has for latent
    layers. Where these have several new tokens, it is the call over the new tokens, expanded.
    """
    device = devices.choose(config.device)
    b, new = step.batch_size, step.seqlen_q
    if isinstance(layer, MLALayer) and new > 1:
        return _expanded(config, layer, dtype, step, device)
    pages = -(-step.seqlen_k // config.page_size)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    batch = ForwardBatch(
        cu_seqlens_q=torch.arange(0, b * new + 1, new, **int32),
        seqlens_k=torch.full((b,), step.seqlen_k - new, **int32),
        page_table=torch.arange(b * pages, **int32).view(b, pages),
        max_seqlen_q=new,
        max_seqlen_k=step.seqlen_k,
    )

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    if layer.sinks is not None:
        # Their values are looked at, where they can be.
        layer = dataclasses.replace(layer, sinks=empty(layer.num_q_heads).zero_())
    kv_dtype = dtype
    if config.kv_cache_dtype == "fp8_e4m3":
        kv_dtype = torch.float8_e4m3fn
        ones = torch.ones(layer.num_kv_heads, device=device)
        layer = dataclasses.replace(layer, k_descale=ones, v_descale=ones)
    cache = b * pages, config.page_size, layer.num_kv_heads
    backend = FlashAttentionBackend(config.attention_backend, config.flash_attn_version)
    backend.init_forward_metadata(batch)
    keys = empty(*cache, layer.head_dim, of=kv_dtype)
    latent = isinstance(layer, MLALayer)
    values = empty(*cache, layer.head_dim_v, of=kv_dtype)
    problem = backend.problem(
        empty(b * new, layer.num_q_heads, layer.head_dim),
        empty(b * new, layer.num_kv_heads, layer.head_dim),
        empty(b * new, layer.num_kv_heads, layer.head_dim_v),
        (keys, keys[..., : layer.head_dim_v] if latent else values),
        layer,
    )
    if device.type == "cpu" and not latent:
        return check(problem)
    lengths = torch.full_like(batch.seqlens_k, step.seqlen_k)
    problem = dataclasses.replace(problem, append=None, seqlens_k=lengths)
    if new == 1:
        problem = dataclasses.replace(problem, q=problem.q[:, None], cu_seqlens_q=None)
    return check(problem)


def _expanded(
    config: EngineConfig, layer: MLALayer, dtype: torch.dtype, step: Step, device: torch.device
) -> Problem:
    b, new, heads = step.batch_size, step.seqlen_q, layer.num_q_heads
    width = layer.nope_dim + layer.head_dim - layer.latent_dim
    ends = torch.arange(0, b * new + 1, new, dtype=torch.int32, device=device)
    q, k = (torch.empty(b * new, heads, width, dtype=dtype, device=device) for _ in range(2))
    problem = Problem(
        q=q,
        k=k,
        v=torch.empty(b * new, heads, layer.value_dim, dtype=dtype, device=device),
        kv_layout=KVLayout.RAGGED,
        batch_size=b,
        max_seqlen_q=new,
        max_seqlen_k=new,
        mask=layer.mask,
        scores=Scores(layer.softmax_scale),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        ver=config.flash_attn_version,
        backend=None if config.attention_backend == "auto" else config.attention_backend,
    )
    return check(problem)


def explain(
    config: EngineConfig, probe: LayerProbe, dtype: torch.dtype, step: Step | None = None
) -> list[tuple[LayerKind, dispatch.Explanation]]:
    """For each kind of layer, what each provider says of its call in a step (default: decode)."""
    step = Step() if step is None else step
    return [
        (kind, dispatch.explain(problem_of(config, kind.layer, dtype, step)))
        for kind in kinds(probe)
    ]


def chosen(explanations: Iterable[tuple[LayerKind, dispatch.Explanation]]) -> str:
    """The providers that run a model's layers, in one line."""
    found = list(explanations)
    names = {explanation.chosen or "none" for _, explanation in found}
    if len(names) == 1:
        return f"{names.pop()} ({found[0][1].why})"
    return "; ".join(f"{explanation.chosen or 'none'} for {kind}" for kind, explanation in found)
