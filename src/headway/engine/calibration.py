"""What a stored 1 means in a float8 KV cache: from the checkpoint, or measured on a few tokens.

float8_e4m3 has the same relative precision over many powers of two, so a scale has to be right in order of
magnitude only: large enough that nothing saturates, with room for what the measurement has not seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from headway.engine.expansion import attend_plainly
from headway.serving.base import AttentionLayer, TokenRotary
from headway.serving.flash import encoded

#: Largest number of float8_e4m3.
LARGEST = 448.0
#: Measured magnitudes may be exceeded by this factor before values saturate.
ROOM = 2.0
#: Tokens that are measured.
TOKENS = 256

#: Names of scales in checkpoints: model.layers.3.self_attn.k_scale, .attn.k_scale, .k_proj.k_scale.
_NAME = re.compile(r"layers\.(\d+)\..*\b([kv])_scale$")

Scales = dict[int, tuple[Tensor, Tensor]]


def kv_scales(
    model: nn.Module, layers: Mapping[int, AttentionLayer], folder: Path, vocab_size: int
) -> Scales:
    """Scales (Hkv,) float32 of keys and values for every layer."""
    stored = checkpoint_scales(folder)
    device = next(model.parameters()).device
    if set(stored) >= set(layers):
        return {
            index: (
                stored[index][0].to(device).expand(layer.num_kv_heads).contiguous(),
                stored[index][1].to(device).expand(layer.num_kv_heads).contiguous(),
            )
            for index, layer in layers.items()
        }
    return measured_scales(model, layers, vocab_size)


def checkpoint_scales(folder: Path) -> Scales:
    """The scales that a folder of safetensors brings; only layers that have both."""
    found: dict[tuple[int, str], Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if match := _NAME.search(name):
                    found[int(match[1]), match[2]] = tensors.get_tensor(name).float().reshape(-1)
    numbers = {index for index, _ in found}
    return {
        i: (found[i, "k"], found[i, "v"])
        for i in numbers
        if (i, "k") in found and (i, "v") in found
    }


@torch.inference_mode()
def measured_scales(
    model: nn.Module, layers: Mapping[int, AttentionLayer], vocab_size: int
) -> Scales:
    """Scales from the keys and values of random tokens, attended to causally."""
    device = next(model.parameters()).device
    meter = _Meter(layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, TOKENS), generator=generator).to(device)
    positions = torch.arange(TOKENS, device=device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, headway=meter)
    return meter.scales


class _Meter:
    """A ``headway=`` that attends within the tokens given and measures keys and values by head."""

    def __init__(self, layers: Mapping[int, AttentionLayer]) -> None:
        self._layers = layers
        self.scales: Scales = {}

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        rotary: TokenRotary | None = options["rotary"]
        if rotary is not None:
            q, k = encoded(q, k, rotary)
        self.scales[index] = _scale(k), _scale(v)
        return attend_plainly(module, q, k, v, self._layers[index].softmax_scale)


def _scale(x: Tensor) -> Tensor:
    """(heads,) of (tokens, heads, width)."""
    largest = x.float().abs().amax(dim=(0, 2))
    return (largest * (ROOM / LARGEST)).clamp(min=1e-6)
