"""Tiny models with random weights, saved as transformers saves them, and one small real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headway.engine.config import EngineConfig
from headway.engine.llm import LLM

VOCABULARY = 256
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    # Large enough for two random continuations to differ, small enough for attention to matter.
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=12),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=24,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0,
    ),
    # Layers of different head dims.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **SMALL,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=32,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    ),
    # Chunked attention, and layers without positions.
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL,
        attention_chunk_size=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
    ),
    # Keys and values of different head dims.
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL,
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A folder that holds a model, and the same model as transformers runs it."""

    name: str
    path: Path
    model: transformers.PreTrainedModel

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """transformers' own greedy continuation of one prompt, in float32."""
        return greedy(self.model, prompt, max_tokens)


def greedy(
    model: transformers.PreTrainedModel, prompt: Sequence[int], max_tokens: int
) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
    return out[0, len(prompt) :].tolist()


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, so that any token sequence has a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(name: str, folder: Path) -> TinyModel:
    """Build the tiny model of that family, with every parameter random, and save it."""
    torch.manual_seed(sum(name.encode()))
    config = CONFIGS[name]()
    # transformers has sinks and softcap in eager attention alone.
    attention = "eager" if name in ("gpt_oss", "gemma2") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks are constants as initialised
                parameter.add_(torch.randn_like(parameter) * 0.3)
    path = folder / name
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return TinyModel(name, path, model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """``tiny("llama")``: the tiny model of a family, built on first use."""
    folder = tmp_path_factory.mktemp("models")
    built: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in built:
            built[name] = save_tiny(name, folder)
        return built[name]

    return get


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], TinyModel]) -> TinyModel:
    return tiny("llama")


def engine(model: TinyModel | Path, **settings: Any) -> LLM:
    """An engine over a model's folder with a cache of 1,024 tokens, in float32 on the CPU."""
    path = model.path if isinstance(model, TinyModel) else model
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_tokens": 1024}
    return LLM(EngineConfig(model=str(path), **{**defaults, **settings}))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """GGUF file of SmolLM2-135M-Instruct."""
    script = Path(__file__).parents[2] / "script" / "fetch_model.py"
    spec = importlib.util.spec_from_file_location("fetch_model", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch_model()
