"""What ``headway compile`` compiles for a model is what its engine launches: no first request waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

pytest.importorskip("triton")

from headway.engine import fusion
from headway.engine.blocks import norms_of, style_of
from headway.engine.config import EngineConfig
from headway.engine.describe import model_without_weights
from headway.kernels.norm_style import NormStyle

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
SLIDING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 4}),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 64, "num_local_experts": 4, "sliding_window": 128, "layer_types": SLIDING},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 256, "sliding_window": 512, "layer_types": SLIDING}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **EXPERTS,
            "head_dim": 64,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


class Served(NamedTuple):
    """How a model is served, and kernels that its steps cannot do without."""

    model: str
    settings: dict[str, Any]
    kernels: set[str]
    target: str = "sm90"


HOPPER = {"forward_kernel", "decode_kernel", "plan_kernel"}
SERVED = {
    "dense": Served("llama", {}, {*HOPPER, "merge_kernel", "norm_kernel", "gated_kernel"}),
    "float8 cache": Served("llama", {"kv_cache_dtype": "fp8_e4m3"}, {"decode_kernel"}),
    "windows and sinks": Served("gpt_oss", {}, HOPPER),
    "latent": Served("deepseek_v3", {}, {*HOPPER, "states_kernel"}),
}
MORE = {
    "dense, gfx942": Served("llama", {}, {"attention_kernel", "schedule_kernel"}, "gfx942"),
    "guesses, page 24": Served("llama", {"speculative": "ngram", "page_size": 24}, HOPPER),
    "no graphs, page 1": Served("llama", {"cuda_graphs": False, "page_size": 1}, HOPPER),
    "experts, norms of heads": Served("qwen3_moe", {}, {*HOPPER, "norm_kernel"}),
    "windows, 256 wide": Served("gemma3", {}, {*HOPPER, "gated_kernel"}),
    "latent, float8 products": Served(
        "deepseek_v3",
        {"mla_prefill_dtype": "float8"},
        {"mla_prefill_kernel", "states_kernel"},
    ),
    "latent, float8 cache": Served(
        "deepseek_v3", {"kv_cache_dtype": "fp8_e4m3"}, {"forward_kernel", "states_kernel"}
    ),
    "latent, sm80": Served("deepseek_v3", {}, {"attention_kernel", "states_kernel"}, "sm80"),
    "windows and sinks, gfx950": Served("gpt_oss", {}, {"attention_kernel"}, "gfx950"),
}
if os.environ.get("HEADWAY_TEST_EXHAUSTIVE"):
    SERVED |= MORE


def save_config(name: str, folder: Path) -> Path:
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | fields))
    config.architectures = [f"{kind.removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the engine launches with each of the settings, and what of it would not be compiled."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_config(name, folder)
    sizes = {"kv_cache_tokens": 20000, "max_running_requests": 20}
    given = [
        json.dumps((one.target, {"model": str(folder / one.model), **sizes, **one.settings}))
        for one in SERVED.values()
    ]
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.recorded_run", "compared", *given],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return dict(zip(SERVED, lines, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SERVED)
def test_what_the_engine_launches_is_compiled(
    recorded: dict[str, dict[str, Any]], name: str
) -> None:
    found = recorded[name]
    assert set(found["names"]) >= SERVED[name].kernels
    assert found["missing"] == []


@pytest.mark.parametrize(
    ("name", "style"), [("llama", NormStyle.ROUNDED), ("gemma3", NormStyle.OFFSET)]
)
def test_the_style_of_norms_is_known_without_weights(
    name: str, style: NormStyle, tmp_path: Path
) -> None:
    model, _ = model_without_weights(EngineConfig(model=str(save_config(name, tmp_path))))
    assert {kind.style for kind in norms_of(model)} == {style}
    module = next(m for m in model.modules() if "RMSNorm" in type(m).__name__)
    assert style_of(module) is style
    # What the engine finds, by its kernels and with weights.
    module.to_empty(device="cpu").weight.data.normal_()  # type: ignore[union-attr, operator]
    found = fusion._norm_of(module)
    assert found is not None
    assert found.style is style
