"""The ways in which RMS norms of models differ."""

from __future__ import annotations

import enum


class NormStyle(enum.IntEnum):
    """What the weight does to a normalised row."""

    ROUNDED = 0  # weight * row.to(dtype): Llama, Qwen, Mistral
    OFFSET = 1  # ((1 + weight) * row).to(dtype), in float32: Gemma
    WIDE = 2  # (weight * row).to(dtype), in float32: gpt-oss, OLMo
