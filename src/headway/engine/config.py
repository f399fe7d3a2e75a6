"""How an engine is set up. Every field is a flag of ``headway serve`` by the same name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from headway.errors import InvalidInputError

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
KVCacheDtype = Literal["auto", "fp8_e4m3"]


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
        kv_cache_dtype: auto stores keys and values in the model's dtype; fp8_e4m3 in float8, with scales
            from the checkpoint where it has them, else measured when the model is loaded.
        mla_prefill_dtype: bfloat16 or float8 products in the prefill of latent attention (DeepSeek); auto
            as HEADWAY_FP8_PREFILL says.
        mem_fraction: share of the free memory that the KV cache takes, once there is room for a full
            step; None: 0.4 on a CPU, 0.85 on a GPU.
        chunked_prefill_size: most new prompt tokens computed in one step; None: 512 on a CPU, 16384 on
            a GPU.
        max_running_requests: most requests decoded together; None: 64 on a CPU, 256 on a GPU.
        disable_prefix_cache: compute every prompt from its beginning, also what requests share.
        cuda_graphs: where there is a GPU, replay decode steps as CUDA graphs, and of small steps that
            prefill what lies between attention calls.
        overlap: prepare a step while the device computes the one before; None: on a GPU.
        tensor_parallel_size: processes that share every layer, with a GPU each.
        speculative: ngram guesses tokens from what the sequence has said before and checks several in
            one step, for greedy requests; off does not.
        num_draft_tokens: most tokens guessed in a step.
        acceleration: ``auto`` exchanges parts of the model for faster ones; ``off`` does not.
        attention_backend: provider pinned for every attention call; auto: HEADWAY_BACKEND's, or the
            fastest.
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
    kv_cache_dtype: KVCacheDtype = "auto"
    mla_prefill_dtype: Literal["auto", "bfloat16", "float8"] = "auto"
    mem_fraction: float | None = None
    chunked_prefill_size: int | None = None
    max_running_requests: int | None = None
    disable_prefix_cache: bool = False
    cuda_graphs: bool = True
    overlap: bool | None = None
    tensor_parallel_size: int = 1
    speculative: Literal["off", "ngram"] = "off"
    num_draft_tokens: int = 4
    acceleration: Literal["auto", "off"] = "auto"
    attention_backend: str = "auto"
    flash_attn_version: Literal[3, 4] | None = None
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("page_size", "num_draft_tokens", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, getattr(self, name), "at least 1")
        for name in (
            "max_model_len",
            "kv_cache_tokens",
            "kv_cache_memory_bytes",
            "chunked_prefill_size",
            "max_running_requests",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(name, value, "at least 1, or None")
        if self.max_model_len == 1:
            wanted = "at least 2: a token of a prompt and one that follows"
            raise InvalidInputError("max_model_len", 1, wanted)
        if self.attention_backend != "auto":
            from headway.providers import NAMES  # which imports torch: help does without

            if self.attention_backend not in NAMES:
                wanted = ", ".join(("auto", *NAMES))
                raise InvalidInputError("attention_backend", self.attention_backend, wanted)
        if self.mem_fraction is not None and not 0 < self.mem_fraction < 1:
            raise InvalidInputError("mem_fraction", self.mem_fraction, "between 0 and 1, or None")

    @property
    def most_guesses(self) -> int:
        """Tokens guessed in a step for each sequence, at most."""
        return self.num_draft_tokens if self.speculative == "ngram" else 0

    def resolved(self, device_type: str) -> EngineConfig:
        """The same with every setting that depends on the kind of device filled in."""
        gpu = device_type == "cuda"
        defaults: dict[str, Any] = {
            "mem_fraction": 0.85 if gpu else 0.4,
            "chunked_prefill_size": 16384 if gpu else 512,
            "max_running_requests": 256 if gpu else 64,
            "overlap": gpu,
        }
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, cuda_graphs=self.cuda_graphs and gpu, **missing)
