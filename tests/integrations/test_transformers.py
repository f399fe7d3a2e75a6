"""Headway inside transformers: the same tokens as transformers' own attention gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, masking_utils
from transformers.cli.serve import Serve
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from headway import interface
from headway.engine.config import EngineConfig
from headway.engine.loader import load
from headway.errors import UnsupportedError
from headway.integrations import transformers as integration
from headway.integrations.transformers import NAME, PAGED_NAME, attention_forward, enable
from tests.engine.conftest import CONFIGS, TinyModel

NEW_TOKENS = 20
Tiny = Callable[[str], TinyModel]


@pytest.fixture(scope="module", autouse=True)
def _enabled() -> None:
    enable()
    enable()  # a second call changes nothing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each public function of Headway has been called."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(interface, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(interface, name, counted)

    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        count(name)
    return counts


def padded_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(1, 256, (3, 33))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[1, :1] = 0
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


@pytest.fixture
def switched() -> Iterator[Callable[[Any], Any]]:
    """Switch a shared model to Headway for the length of a test."""
    before: list[tuple[Any, str]] = []

    def switch(model: Any) -> Any:
        before.append((model, model.config._attn_implementation))
        model.set_attn_implementation(NAME)
        return model

    yield switch
    for model, name in before:
        model.set_attn_implementation(name)


# --- generate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_generate_gives_the_same_tokens(
    family: str,
    tiny: Tiny,
    switched: Callable[[Any], Any],
    calls: dict[str, int],
) -> None:
    model = tiny(family).model
    ids, mask = padded_batch()
    padded, whole = generate(model, ids, mask), generate(model, ids[2:], mask[2:])
    switched(model)
    assert generate(model, ids, mask) == padded
    assert generate(model, ids[2:], mask[2:]) == whole
    layers = model.config.num_hidden_layers
    assert sum(calls.values()) == 2 * layers * NEW_TOKENS


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_static_cache_gives_the_same_tokens(
    family: str,
    tiny: Tiny,
    switched: Callable[[Any], Any],
    calls: dict[str, int],
) -> None:
    """Where all layers are of one kind, generate() makes their mask and the model is given it as one."""
    model = tiny(family).model
    ids, mask = padded_batch()
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = generate(model, ids, mask, **options)
    switched(model)
    assert generate(model, ids, mask, **options) == expected
    assert sum(calls.values()) == model.config.num_hidden_layers * NEW_TOKENS


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


def test_packed_sequences_do_not_see_each_other(
    tiny: Tiny,
    switched: Callable[[Any], Any],
) -> None:
    model = tiny("llama").model
    ids = torch.randint(1, 256, (1, 30))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    expected = logits(model, input_ids=ids, position_ids=positions)
    switched(model)
    got = logits(model, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    alone = logits(model, input_ids=ids[:, 12:])
    torch.testing.assert_close(got[:, 12:], alone, rtol=1e-4, atol=1e-4)


def test_masks_of_four_dimensions_are_obeyed(
    tiny: Tiny,
    switched: Callable[[Any], Any],
) -> None:
    model = tiny("llama").model
    ids = torch.randint(1, 256, (2, 16))
    visible = torch.rand(2, 1, 16, 16) < 0.6
    visible |= torch.eye(16, dtype=torch.bool)
    added = torch.where(visible, torch.randn(2, 1, 16, 16), torch.finfo(torch.float32).min)
    switched(model)
    got = [logits(model, input_ids=ids, attention_mask=mask) for mask in (visible, added)]
    model.set_attn_implementation("sdpa")
    for mask, ours in zip((visible, added), got, strict=True):
        theirs = logits(model, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_an_encoder_ignores_padding(side: str, calls: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 256, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 9), "right": slice(11, 20), "holes": slice(0, 20, 2)}[side]] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation(NAME)
        got = model(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    spans = "flash_attn_func" if side == "holes" else "flash_attn_with_kvcache"
    assert calls == {spans: config.num_hidden_layers}


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_biases_of_padded_sequences_are_those_of_their_tokens(side: str) -> None:
    """T5: biases depend on places in the row, also where padding comes before a sequence's first token."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("sdpa")
    ids, start = torch.randint(1, 256, (2, 12)), torch.randint(1, 256, (2, 5))
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(start)
    mask[0, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    decoder_mask[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start}
    with torch.inference_mode():
        expected = model(**inputs, decoder_attention_mask=decoder_mask, use_cache=False).logits
        model.set_attn_implementation(NAME)
        got = model(**inputs, decoder_attention_mask=decoder_mask, use_cache=False).logits
    real = decoder_mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Bloom", "MPNet"])
def test_models_that_ask_no_implementation_are_refused(family: str) -> None:
    """They would take None for a mask that hides nothing, and other masks for what is added to scores."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(UnsupportedError, match=f"{family}Model computes attention itself"):
        transformers.AutoModel.from_config(config, attn_implementation=NAME)


def test_parts_without_attention_are_taken() -> None:
    """Convolutions within a larger model, which is given one name for all its parts."""
    config = transformers.ConvNextConfig(num_channels=3, hidden_sizes=[8], depths=[1], num_stages=1)
    assert transformers.AutoModel.from_config(config, attn_implementation=NAME) is not None


def test_images_see_themselves_in_both_directions(tiny: Tiny) -> None:
    """The mask that multimodal models lay over the causal one is not lost."""
    config = tiny("gemma3").model.config
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1]])
    embeddings = torch.zeros(1, 10, config.hidden_size)
    config = type(config)(**config.to_dict())
    config._attn_implementation = NAME
    mask = masking_utils.create_causal_mask(
        config, embeddings, None, None, block_sequence_ids=blocks
    )
    assert mask is not None
    assert mask.shape == (1, 1, 10, 10)
    assert mask[0, 0, 2, 4]
    assert not mask[0, 0, 0, 1]


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("masked", [False, True])
def test_position_biases_are_added(masked: bool) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    bias = torch.randn(1, 4, 7, 7)
    mask = torch.rand(2, 1, 7, 7) < 0.7 if masked else None
    if mask is not None:
        mask |= torch.eye(7, dtype=torch.bool)
    expected, _ = sdpa_attention_forward(Layer().eval(), q, k, v, mask, position_bias=bias)
    got, _ = attention_forward(Layer().eval(), q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(got, expected)


def test_what_would_be_dropped_is_refused() -> None:
    q = torch.randn(1, 2, 5, 16)
    layer = Layer().eval()
    layer.num_key_value_groups = 1
    with pytest.raises(UnsupportedError, match="dropout"):
        attention_forward(Layer().train(), q, q, q, None, dropout=0.1)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        attention_forward(layer, q, q, q, None, output_attentions=True)
    with pytest.raises(UnsupportedError, match="block_indices"):
        attention_forward(layer, q, q, q, None, block_indices=torch.zeros(1))
    with pytest.raises(UnsupportedError, match="continuous batching"):
        integration.paged_attention_forward(layer, q, q, q, None)
    query = q.clone().requires_grad_()
    out, _ = attention_forward(layer, query, q, q, None)
    with pytest.raises(UnsupportedError, match="gradients"):
        out.sum().backward()


# --- continuous batching ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_continuous_batching_gives_the_same_tokens(
    family: str,
    tiny: Tiny,
    switched: Callable[[Any], Any],
    calls: dict[str, int],
) -> None:
    model = tiny(family).model
    ids, mask = padded_batch()
    expected = generate(model, ids, mask)
    switched(model)
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    out = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=48, max_blocks_per_request=8
        ),
        progress_bar=False,
    )
    assert [result.generated_tokens for result in out.values()] == expected
    assert model.config._attn_implementation == NAME  # as it was before
    # transformers has block tables for models without windows: every decode step appends in place.
    if family == "llama":
        assert calls["flash_attn_with_kvcache"] >= 2 * (NEW_TOKENS - 2)
        assert calls["flash_attn_varlen_func"] < 2 * 6
    else:
        assert calls["flash_attn_varlen_func"] >= 2 * NEW_TOKENS
        assert "flash_attn_with_kvcache" not in calls


def test_other_implementations_batch_as_before(tiny: Tiny, calls: dict[str, int]) -> None:
    model = tiny("llama").model
    ids, _ = padded_batch()
    out = model.generate_batch(
        inputs=[ids[2].tolist()],
        generation_config=GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=48, max_blocks_per_request=8,
            auto_switch_to_flash=False,
        ),
        progress_bar=False,
    )  # fmt: skip
    assert len(next(iter(out.values())).generated_tokens) == 3
    assert calls == {}


# --- the module with flash-attention's own names ------------------------------------------------------


def test_feature_detection_finds_what_is_there() -> None:
    _, (process, process_paged) = lazy_import_flash_attention(PAGED_NAME)
    found, paged = process.keywords["supports_mapping"], process_paged.keywords["supports_mapping"]
    for feature in ("window_size", "softcap", "s_aux", "deterministic", "max_seqlen_q"):
        assert found[feature], feature
    for feature in ("window_size", "softcap", "s_aux", "page_table", "cache_seqlens"):
        assert paged[feature], feature
    assert not found["dropout_p"]


@pytest.mark.parametrize("paged", [False, True])
def test_what_feature_detection_found_takes_effect(paged: bool) -> None:
    torch.manual_seed(2)
    sinks, features = torch.randn(4), {"sliding_window": 5, "softcap": 3.0}
    q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    expected = interface.flash_attn_func(
        q, k, v, causal=True, window_size=(4, 0), softcap=3.0, sinks=sinks, backend="reference"
    )
    assert isinstance(expected, Tensor)
    forward = transformers.modeling_flash_attention_utils._flash_attention_forward
    if not paged:
        out = forward(
            q, k, v, None, query_length=9, is_causal=True, s_aux=sinks,
            attn_implementation=PAGED_NAME, **features,
        )  # fmt: skip
        torch.testing.assert_close(out, expected)
        return
    pages, table = torch.zeros(2, 4, 8, 2, 16), torch.tensor([[2, 0]], dtype=torch.int32)
    pages[0][table[0].long()] = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, 7)).view(2, 8, 2, 16)
    pages[1][table[0].long()] = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 7)).view(2, 8, 2, 16)
    keys, last = pages.clone(), torch.tensor([0, 9], dtype=torch.int32)
    pages[:, 0, 0] = 0  # the ninth token, which the call writes
    # transformers passes a window only where k is longer than it; here k is the new token alone.
    out = forward(
        q[:, 8:], k[:, 8:], v[:, 8:], None, query_length=1, is_causal=True, s_aux=sinks,
        attn_implementation=PAGED_NAME, softcap=3.0, cu_seq_lens_k=last, block_table=table,
        k_cache=pages[0], v_cache=pages[1],
    )  # fmt: skip
    expected = interface.flash_attn_func(
        q[:, 8:], k, v, causal=True, softcap=3.0, sinks=sinks, backend="reference"
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(pages, keys)


# --- transformers serve -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete(port: int, model: str, prompt: str, deadline_s: float = 120) -> str:
    """The server's greedy continuation; waits until it has started."""
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    end = time.monotonic() + deadline_s
    while True:
        try:
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=deadline_s
            )
        except httpx.ConnectError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
            continue
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as transformers saves models: its server cannot tell what the file holds."""
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = load(EngineConfig(model=str(smollm2), dtype="float32", device="cpu"))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    os.environ.get("HEADWAY_TEST_PLUGINS") != "1",
    reason="half a minute: run by script/test-plugins",
)
def test_serve_runs_smollm2(smollm2_folder: Path, calls: dict[str, int]) -> None:
    port = free_port()
    server = Serve(
        device="cpu", dtype="float32", attn_implementation=NAME, port=port, non_blocking=True,
        host="127.0.0.1",
    )  # fmt: skip
    prompts = ["The capital of France is", "1, 2, 3, 4, 5,"]
    try:
        got = [complete(port, str(smollm2_folder), prompt) for prompt in prompts]
        (loaded,) = server._model_manager.loaded_models.values()
        model, tokenizer = loaded.model, loaded.processor
    finally:
        server.kill_server()
    layers = model.config.num_hidden_layers
    assert model.config._attn_implementation == NAME
    assert sum(calls.values()) >= layers * NEW_TOKENS
    assert sum(calls.values()) % layers == 0
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    model.set_attn_implementation("sdpa")
    tokens = [generate(model, x["input_ids"], x["attention_mask"])[0] for x in inputs]
    assert got == tokenizer.batch_decode(tokens, skip_special_tokens=True)
    model.set_attn_implementation(NAME)
    out = model.generate_batch(
        inputs=[x["input_ids"][0].tolist() for x in inputs],
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64, max_blocks_per_request=4
        ),
        progress_bar=False,
    )
    assert [result.generated_tokens for result in out.values()] == tokens
    assert calls["flash_attn_with_kvcache"] >= layers * (NEW_TOKENS - 2)


def test_the_serve_command_batches_a_tiny_gemma3(tiny: Tiny) -> None:
    model, port = tiny("gemma3"), free_port()
    flags = f"--attn-implementation headway --continuous-batching --device cpu --port {port}"
    limits = "--cb-num-blocks 32 --cb-max-batch-tokens 64 --host 127.0.0.1 --dtype float32"
    command = [sys.executable, "-m", "headway.integrations.transformers", "serve"]
    server = subprocess.Popen(
        [*command, str(model.path), *f"{flags} {limits}".split()],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        text = complete(port, str(model.path), "abcdefgh")
    finally:
        server.terminate()
        server.wait(30)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    ids = tokenizer("abcdefgh", return_tensors="pt")
    tokens = generate(model.model, ids["input_ids"], ids["attention_mask"])[0]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)
