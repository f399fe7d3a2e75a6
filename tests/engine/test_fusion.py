"""Parts exchanged for a GPU compute what they stand for. The kernels themselves are stood in for by torch
here, and tested on their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Olmo2Config, Qwen3_5TextConfig
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from headway.engine import angles, fused_layer, fusion
from headway.engine.attention import ROTARY_MARK
from headway.kernels.portable.norm import NormStyle
from tests.engine.conftest import CONFIGS, VOCABULARY, TinyModel, engine
from tests.engine.test_overlap import GREEDY, PROMPTS, replaying


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    """What kernels/portable/norm.py says of itself."""
    wide = x.float()
    row = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if style is NormStyle.ROUNDED:
        return weight * row.to(x.dtype)
    return (row * (weight.float() + (style is NormStyle.OFFSET))).to(x.dtype)


def gated(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "gelu": functional.gelu,
    }
    return functions[activation](gate) * up


@pytest.fixture(autouse=True)
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "rms_norm", rms_norm)
    monkeypatch.setattr(fused_layer, "gated", gated)
    monkeypatch.setattr(fusion, "gated", gated)


#: whole layers; linear layers merged, feed-forward blocks, norms and rotary embeddings in two layers
EXCHANGED = {
    "llama": (2, 0, 0, 1, 0),
    "qwen3": (2, 0, 0, 1, 0),
    "mistral": (2, 0, 0, 1, 0),
    "gemma3": (0, 6, 2, 13, 2),
    "gemma2": (0, 6, 2, 9, 2),
    "gpt_oss": (0, 6, 0, 5, 2),
}


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, replay: bool, tiny: Callable[[str], TinyModel]) -> None:
    model = tiny(name)
    llm = engine(model, acceleration="off", overlap=True)
    done = fusion.fuse(llm.model, llm.max_model_len)
    if name in EXCHANGED:
        found = (done.layers, done.linears, done.feed_forwards, done.norms, done.rotaries)
        assert found == EXCHANGED[name], str(done)
    # Gemma's choose angles by the kind of layer; Llama 4's rotate by complex numbers.
    assert done.tables == (0 if name in ("gemma3", "gemma4", "llama4") else 1), str(done)
    if replay:
        replaying(llm)
    answers = [list(one.token_ids) for one in llm.generate(PROMPTS, GREEDY)]
    assert answers == [model.greedy(prompt, 20) for prompt in PROMPTS]


def test_a_rotation_that_something_follows_stays_with_the_model(llama: TinyModel) -> None:
    """A model that scales its rotated queries hands on other tensors than the marked ones."""
    llm = engine(llama, acceleration="off")
    attention = type(llm.model.model.layers[0].self_attn)
    original = attention.forward

    def forward(self, hidden_states, position_embeddings, **rest):  # type: ignore[no-untyped-def]
        cos, sin = position_embeddings
        q = self.q_proj(hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim)
        k = self.k_proj(hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim)
        v = self.v_proj(hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # noqa: F821
        headway = rest["headway"]
        x = tuple((t * 2)[0].transpose(0, 1) for t in (q, k))
        out = headway(self, *x, v[0], {"rotary": None, "scaling": self.scaling})
        return self.o_proj(out.flatten(1)[None]), None

    import types

    lookup = {**original.__globals__}
    try:
        attention.forward = types.FunctionType(forward.__code__, lookup, "forward")
        done = fusion.fuse(llm.model, llm.max_model_len)
    finally:
        attention.forward = original
    assert done.rotaries == 0
    assert "something happens" in str(done)


def test_what_is_not_known_is_left_alone(tiny: Callable[[str], TinyModel]) -> None:
    llm = engine(tiny("llama"), acceleration="off")
    for layer in llm.model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    done = fusion.fuse(llm.model, llm.max_model_len)
    assert (done.layers, done.feed_forwards) == (0, 0)
    assert "no plain layer" in str(done)
    assert "no activation known here" in str(done)


def test_the_mark_travels_with_the_tensors(llama: TinyModel) -> None:
    llm = engine(llama, acceleration="off")
    fusion.fuse(llm.model, llm.max_model_len)
    seen: list[object] = []

    def witness(
        module: object, q: Tensor, k: Tensor, v: Tensor, options: dict[str, object]
    ) -> Tensor:
        seen.append(options["rotary"])
        return q

    ids = torch.arange(3)[None] % VOCABULARY
    llm.model(input_ids=ids, position_ids=ids, use_cache=False, headway=witness)
    assert all(mark is not None for mark in seen)
    assert len(seen) == 2
    assert not hasattr(ids, ROTARY_MARK)


def test_angles_of_any_position_are_in_the_table(llama: TinyModel) -> None:
    llm = engine(llama, acceleration="off")
    module = llm.model.model.rotary_emb
    x, positions = torch.zeros(1, 1, 1), torch.tensor([[0, 511, 3, 3, 17]])
    wanted = module(x, positions)
    narrow = module(x.half(), positions)
    fusion.fuse(llm.model, 512)
    assert isinstance(module.forward, angles.AngleTable)
    assert all(torch.equal(a, b) for a, b in zip(module(x, positions), wanted, strict=True))
    found = module(x.half(), position_ids=positions)  # the table is in the model's dtype
    assert all(torch.equal(a, b) for a, b in zip(found, narrow, strict=True))


def test_angles_that_a_model_keeps_in_float32_are_looked_up_too() -> None:
    """OLMo's, whatever the dtype of its weights."""
    rope = Olmo2RotaryEmbedding(Olmo2Config(hidden_size=64, num_attention_heads=4))
    x, positions = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.tensor([[0, 511, 3]])
    wanted = rope(x, positions)
    table = angles.table_for(rope, 512, x)
    assert table is not None
    rope.inv_freq.zero_()  # what computes angles now computes others
    found = table(x, positions)
    assert all(a.dtype == torch.float32 for a in found)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    most = angles.MOST_BYTES // (4 * rope.inv_freq.numel() * 4)
    assert angles.table_for(rope, most, x) is not None
    assert angles.table_for(rope, most + 1, x) is None


def test_angles_of_positions_on_several_axes_are_computed() -> None:
    """Qwen 3.5's: each column takes its angle from the axis of its own."""
    rope = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(hidden_size=256, num_attention_heads=4))
    x = torch.zeros(1, 1, 1)
    positions = torch.tensor([[[0, 7, 3]], [[1, 300, 3]], [[2, 9, 3]]])
    wanted = rope(x, positions)
    table = angles.table_for(rope, 512, x)
    assert table is not None
    found = table(x, positions)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_angles_that_depend_on_the_length_are_computed(llama: TinyModel) -> None:
    llm = engine(llama, acceleration="off")
    llm.model.model.rotary_emb.rope_type = "dynamic"
    assert fusion.fuse(llm.model, 512).tables == 0


def test_a_table_is_no_larger_than_it_may_be(llama: TinyModel) -> None:
    module = engine(llama, acceleration="off").model.model.rotary_emb
    like = torch.zeros(1)
    most = angles.MOST_BYTES // (4 * module.inv_freq.numel() * 4)
    assert angles.table_for(module, most + 1, like) is None
    assert angles.table_for(module, 100, like) is not None


def test_norms_that_take_more_than_rows_stay() -> None:
    """Without its gate, which a model hands over, this one is a norm like any other."""
    for norm, is_known in ((LlamaRMSNorm(8), True), (BambaRMSNormGated(8, 8), False)):
        norm.weight.requires_grad_(False)
        assert (fusion._norm_of(norm) is not None) == is_known
