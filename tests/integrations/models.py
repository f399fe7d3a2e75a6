"""Write the models that engines are tested with: SmolLM2, and tiny random ones of two kinds.

    python -m tests.integrations.models FOLDER GGUF

``smollm2`` is the real one, in bfloat16. ``gemma3`` has windows in two of three layers, ``deepseek`` latent
attention of the only size that vLLM has CPU kernels for. All share SmolLM2's tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from headway.engine.config import EngineConfig
from headway.engine.loader import load

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TINY: dict[str, type[transformers.PretrainedConfig]] = {
    "gemma3": transformers.Gemma3TextConfig,
    "deepseek": transformers.DeepseekV2Config,
}
OWN: dict[str, dict[str, Any]] = {
    "gemma3": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "first_k_dense_replace": 3,  # all layers: none has experts
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    },
}


def save_smollm2(gguf: Path, folder: Path) -> Any:
    """Unpack the GGUF file; returns the tokenizer."""
    loaded = load(EngineConfig(model=str(gguf), dtype="float32", device="cpu"))
    loaded.model.to(torch.bfloat16).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return loaded.tokenizer


def save_tiny(name: str, folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = TINY[name](**SMALL, **OWN[name], vocab_size=len(tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(folder: Path, gguf: Path) -> None:
    tokenizer = save_smollm2(gguf, folder / "smollm2")
    for name in TINY:
        save_tiny(name, folder / name, tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
