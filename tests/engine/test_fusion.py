"""Parts exchanged for a GPU compute what they stand for. The kernels themselves are stood in for by torch
here, and tested on their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headway.engine import fused_layer, fusion
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
    done = fusion.fuse(llm.model)
    if name in EXCHANGED:
        found = (done.layers, done.linears, done.feed_forwards, done.norms, done.rotaries)
        assert found == EXCHANGED[name], str(done)
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
        done = fusion.fuse(llm.model)
    finally:
        attention.forward = original
    assert done.rotaries == 0
    assert "something happens" in str(done)


def test_what_is_not_known_is_left_alone(tiny: Callable[[str], TinyModel]) -> None:
    llm = engine(tiny("llama"), acceleration="off")
    for layer in llm.model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    done = fusion.fuse(llm.model)
    assert (done.layers, done.feed_forwards) == (0, 0)
    assert "no plain layer" in str(done)
    assert "no activation known here" in str(done)


def test_the_mark_travels_with_the_tensors(llama: TinyModel) -> None:
    llm = engine(llama, acceleration="off")
    fusion.fuse(llm.model)
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
