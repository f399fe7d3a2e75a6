"""Models with latent attention keep one vector per token, and say what they said with expanded keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from headway.engine.config import EngineConfig
from headway.engine.describe import explain, kinds, probe_without_weights
from headway.engine.expansion import expansion_of
from headway.engine.latent import keep_latent
from headway.engine.request import SamplingParams
from headway.serving.mla import MLABackend, MLALayer
from tests.engine.conftest import CONFIGS, SMALL, TinyModel, engine

GREEDY = SamplingParams(max_tokens=16, temperature=0)


def random_model(kind: str, **fields: object) -> nn.Module:
    torch.manual_seed(1)
    shape = {
        **SMALL,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = getattr(transformers, kind)(**{**shape, **fields})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def test_a_token_is_one_vector_in_the_cache(tiny: Callable[[str], TinyModel]) -> None:
    llm = engine(tiny("deepseek_v3"))
    config = CONFIGS["deepseek_v3"]()
    assert isinstance(llm.backend, MLABackend)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for keys, values in llm._kv.layers:
        assert keys.shape[2:] == (1, width)
        assert values.data_ptr() == keys.data_ptr()
        assert values.shape[-1] == config.kv_lora_rank


@pytest.mark.parametrize("kind", ["DeepseekV2Config", "DeepseekV3Config"])
@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
def test_the_family(
    kind: str, fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind == "DeepseekV2Config" and "rope_interleave" in fields:
        pytest.skip("DeepSeek V2 rotates in one way")
    path = tmp_path_factory.mktemp("latent")
    model = random_model(kind, **{"q_lora_rank": 16, **fields})
    model.save_pretrained(path)  # type: ignore[operator]
    llm = engine(path, chunked_prefill_size=7)
    assert isinstance(llm.backend, MLABackend)
    prompts = [[(5 * i + n) % 256 for i in range(n)] for n in (1, 9, 30)]
    for prompt, one in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert list(one.token_ids) == TinyModel(kind, path, model).greedy(prompt, 16)  # type: ignore[arg-type]


def test_a_module_that_expands_otherwise_is_left_alone() -> None:
    model = random_model("DeepseekV3Config", q_lora_rank=16)
    odd, plain = attentions(model)
    original = type(odd).expand_kv
    odd.expand_kv = lambda latent, rope: original(odd, 2 * latent, rope)  # type: ignore[assignment]
    assert keep_latent(model) == 1
    assert expansion_of(odd) is None
    assert expansion_of(plain) is not None
    assert not hasattr(plain, "kv_b_proj")


def test_float8_cache_is_close(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("deepseek_v3")
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (20, 33)]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    differences = []
    for chunk in (8, 512):  # what is attended to comes from the cache, or has never been there
        wide, narrow = (
            engine(model, kv_cache_dtype=dtype, chunked_prefill_size=chunk).generate(
                prompts, params
            )
            for dtype in ("auto", "fp8_e4m3")
        )
        pairs = [
            (x.logprob, y.logprob)
            for a, b in zip(wide, narrow, strict=True)
            for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
        ]
        differences.append(sum(abs(x - y) for x, y in pairs) / len(pairs))
    assert 0 < differences[0] < 0.5
    assert differences[1] < 1e-4


def test_explained_without_weights(tiny: Callable[[str], TinyModel]) -> None:
    config = EngineConfig(model=str(tiny("deepseek_v3").path), device="cpu")
    probe, dtype = probe_without_weights(config)
    (kind,) = kinds(probe)
    assert isinstance(kind.layer, MLALayer)
    assert "latent" in str(kind)
    ((_, explanation),) = explain(config, probe, dtype)
    assert explanation.chosen is not None
