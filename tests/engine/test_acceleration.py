"""Accelerated models compute what the untouched ones do, and say what they left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headway.engine.acceleration import Acceleration, MergedLinear, PackedLinear, accelerate
from headway.errors import InvalidInputError
from tests.engine.conftest import TinyModel, engine

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=4),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=4, sliding_window=4),
}


def random_model(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones or zeros, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 131, (1, 13), generator=torch.Generator().manual_seed(1))
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_models_agree_to_rounding(name: str) -> None:
    model = random_model(name, torch.float32)
    want = logits(model)
    report = accelerate(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert report.packed_linears > 0
    assert report.norms > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_models_are_as_exact_as_the_untouched_ones(name: str) -> None:
    exact = logits(random_model(name, torch.bfloat16).float())
    model = random_model(name, torch.bfloat16)
    before = (logits(model) - exact).abs()
    accelerate(model)
    after = (logits(model) - exact).abs()
    assert after.max() <= 2 * before.max()
    assert after.mean() <= 1.5 * before.mean()


def test_every_part_of_a_llama_is_exchanged() -> None:
    pytest.importorskip("numba")
    model = random_model("llama", torch.float32)
    report = accelerate(model)
    assert not [layer for layer in model.modules() if type(layer) is nn.Linear]
    assert (report.packed_linears, report.merged_linears) == (2 * 7 + 1, 2 * 5)
    assert (report.norms, report.rotaries) == (2 * 2 + 1, 2)
    assert report.left_alone == {}
    assert "15 linear layers packed (10 merged)" in str(report)


def test_a_second_call_finds_nothing_to_do() -> None:
    model = random_model("llama", torch.float32)
    accelerate(model)
    again = accelerate(model)
    assert (again.packed_linears, again.norms, again.rotaries) == (0, 0, 0)


def test_other_models_keep_their_rotary_function() -> None:
    pytest.importorskip("numba")
    untouched = random_model("llama", torch.float32)
    module = untouched.model.layers[0].self_attn
    function = type(module).forward.__globals__["apply_rotary_pos_emb"]
    accelerate(random_model("llama", torch.float32))
    assert type(module).forward.__globals__["apply_rotary_pos_emb"] is function
    assert "forward" not in vars(module)


def test_siblings_called_with_different_inputs_are_right() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n) for n in (8, 4, 4))

    torch.manual_seed(0)
    layer = Cross().eval()
    a, b = torch.randn(2, 3, 8).unbind(0)
    want = [layer.q_proj(a), layer.k_proj(b), layer.v_proj(b)]
    accelerate(layer)
    assert isinstance(layer.q_proj, MergedLinear)
    with torch.inference_mode():
        got = [layer.q_proj(a), layer.k_proj(b), layer.v_proj(b)]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    model = nn.Sequential(OddRMSNorm()).eval()
    x = torch.randn(2, 8)
    want = model(x)
    report = accelerate(model)
    assert report.norms == 0
    assert report.left_alone == {"0": "OddRMSNorm is no RMS norm known here"}
    assert torch.equal(model(x), want)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)).eval()
    accelerate(model)
    assert type(model[0]) is Doubled
    assert type(model[1]) is PackedLinear


def test_float64_models_keep_their_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double().eval()
    report = accelerate(model)
    assert report.left_alone == {"0": "linear layers of torch.float64"}


def test_off_does_nothing_and_bad_arguments_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    accelerate(model, level="off")
    assert type(model[0]) is nn.Linear
    with pytest.raises(InvalidInputError, match="level"):
        accelerate(model, level="max")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="training"):
        accelerate(model.train())


def test_a_model_elsewhere_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta")).eval()
    assert accelerate(model).left_alone == {"": "the model is not on a CPU"}


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", 2), ("qwen3", 2), ("mistral", 2), ("gemma3", 0), ("gpt_oss", 0)],
)
def test_plain_layers_of_an_engine_are_exchanged_whole(
    name: str, layers: int, tiny: Callable[[str], TinyModel]
) -> None:
    """That they compute the same is shown by every test that compares an engine with transformers."""
    pytest.importorskip("numba")
    report = engine(tiny(name)).acceleration
    assert isinstance(report, Acceleration)
    assert report.layers == layers
    assert f"{layers} layers exchanged whole" in str(report)


def test_a_plain_layer_that_computes_something_else_is_kept(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual that is doubled, say, is seen by no name and no shape: only by trying."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, x, *a, **k: original(self, 2 * x, *a, **k)
    )
    report = engine(llama).acceleration
    assert isinstance(report, Acceleration)
    assert report.layers == 0
