"""How an engine is set up. Every field is a flag of ``headway serve`` by the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.errors import InvalidInputError

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Args:
        model: a local folder of safetensors, a GGUF file, or a hub name.
        load_format: dummy draws random weights from the config alone.
        tokenizer: another folder, file or hub name to take the tokenizer from.
        dtype: of weights and KV cache; auto takes the checkpoint's.
        device: cpu, cuda or cuda:N; auto takes the first GPU where there is one.
        max_model_len: longest prompt plus output, in tokens; None: the model's own limit.
        page_size: tokens a page of the KV cache holds.
        kv_cache_tokens: size of the paged KV cache, in tokens; None: from kv_cache_memory_bytes.
        kv_cache_memory_bytes: size of the paged KV cache; None: a share of the free memory.
        chunked_prefill_size: most new prompt tokens computed in one step.
        max_running_requests: most requests decoded together.
        enable_prefix_cache: compute prompt prefixes that requests share once.
        acceleration: ``auto`` exchanges parts of the model for faster ones on a CPU; ``off`` does not.
        attention_backend: provider pinned for every attention call; auto chooses.
        flash_attn_version: interface generation asked for, 3 or 4; None: the fastest.
        seed: of the sampling of requests that bring no seed, and of dummy weights.
        revision: branch, tag or commit of a hub name.
        trust_remote_code: run model code that comes with a hub model or folder.
    """

    model: str
    load_format: LoadFormat = "auto"
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    page_size: int = 16
    kv_cache_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    chunked_prefill_size: int = 512
    max_running_requests: int = 64
    enable_prefix_cache: bool = True
    acceleration: Literal["auto", "off"] = "auto"
    attention_backend: str = "auto"
    flash_attn_version: Literal[3, 4] | None = None
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("page_size", "chunked_prefill_size", "max_running_requests"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, getattr(self, name), "at least 1")
        for name in ("max_model_len", "kv_cache_tokens", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(name, value, "at least 1, or None")
