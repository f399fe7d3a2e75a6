"""The engine as its callers see it: requests in, pieces out, errors that say what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from headway import devices
from headway.engine import loader, parallel, sampler
from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from headway.engine.request import FinishReason, RequestOutput, SamplingParams
from headway.errors import InvalidInputError, UnsupportedError
from tests.engine.conftest import SMALL, TinyModel, byte_tokenizer, engine

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture
def llm(llama: TinyModel) -> LLM:
    return engine(llama)


def drain(llm: LLM) -> dict[str, list[RequestOutput]]:
    """Step until nothing is left; outputs by request."""
    outputs: dict[str, list[RequestOutput]] = {}
    while llm.has_unfinished():
        for output in llm.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_pieces_join_to_the_completion(llm: LLM) -> None:
    (whole,) = llm.generate(["Hello"], GREEDY)
    llm.add_request("a", llm.encode("Hello"), GREEDY)
    pieces = drain(llm)["a"]
    assert "".join(piece.new_text for piece in pieces) == whole.text
    assert sum((piece.new_token_ids for piece in pieces), ()) == whole.token_ids
    assert [piece.output_tokens for piece in pieces] == list(range(1, 9))
    assert [piece.finish_reason for piece in pieces] == [None] * 7 + [FinishReason.LENGTH]
    assert {piece.prompt_tokens for piece in pieces} == {5}


def test_a_models_name_alone_is_no_configuration() -> None:
    with pytest.raises(InvalidInputError, match=r"some/model.*EngineConfig\(model=\.\.\)"):
        LLM("some/model")  # type: ignore[arg-type]


def test_text_is_what_the_tokenizer_says(llm: LLM) -> None:
    (one,) = llm.generate(["Hello"], dataclasses.replace(GREEDY, max_tokens=40))
    expected = llm.tokenizer.decode(list(one.token_ids))
    assert one.text.replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_requests_join_and_leave_at_any_step(llm: LLM, llama: TinyModel) -> None:
    prompts = {"a": [1, 2, 3], "b": [9] * 30, "c": [4, 5]}
    outputs: list[RequestOutput] = []
    for name, prompt in prompts.items():
        llm.add_request(name, prompt, GREEDY)
        outputs += llm.step()
    while llm.has_unfinished():
        outputs += llm.step()
    for name, prompt in prompts.items():
        mine = [one for one in outputs if one.request_id == name]
        assert [t for one in mine for t in one.new_token_ids] == llama.greedy(prompt, 8)


def test_stop_token(llm: LLM, llama: TinyModel) -> None:
    tokens = llama.greedy([1, 2, 3], 8)
    stop = tokens[4]
    (one,) = llm.generate([[1, 2, 3]], dataclasses.replace(GREEDY, stop_token_ids=(stop,)))
    end = tokens.index(stop)
    assert list(one.token_ids) == tokens[: end + 1]
    assert one.finish_reason is FinishReason.STOP
    assert one.text == llm.tokenizer.decode(tokens[:end])


def test_eos_token_ends_unless_ignored(llama: TinyModel, tmp_path: Path) -> None:
    tokens = llama.greedy([1, 2, 3], 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    model.generation_config.eos_token_id = [tokens[2], 9999]
    model.save_pretrained(tmp_path)
    llm = engine(tmp_path)
    end = tokens.index(tokens[2])
    (one,) = llm.generate([[1, 2, 3]], GREEDY)
    assert (list(one.token_ids), one.finish_reason) == (tokens[: end + 1], FinishReason.STOP)
    (one,) = llm.generate([[1, 2, 3]], dataclasses.replace(GREEDY, ignore_eos=True))
    assert (list(one.token_ids), one.finish_reason) == (tokens, FinishReason.LENGTH)


def test_stop_string_across_tokens(llm: LLM) -> None:
    """Tokens are bytes, so a stop string of two letters always crosses a boundary."""
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5)
    (free,) = llm.generate(["abc"], params)
    stop = next(free.text[i : i + 2] for i in range(8, 50) if free.text[i : i + 2].isascii())
    (one,) = llm.generate(["abc"], dataclasses.replace(params, stop=(stop, "never said")))
    assert one.text == free.text[: free.text.find(stop)]
    assert one.finish_reason is FinishReason.STOP
    assert len(one.token_ids) < 60
    kept = dataclasses.replace(params, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate(["abc"], kept)[0].text == one.text + stop


def test_the_context_ends_an_answer(llama: TinyModel) -> None:
    llm = engine(llama, max_model_len=20)
    (one,) = llm.generate([[1] * 15], SamplingParams(max_tokens=100, temperature=0))
    assert (len(one.token_ids), one.finish_reason) == (5, FinishReason.LENGTH)


def test_seeded_requests_repeat_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=42)
    (alone,) = llm.generate([[1, 2, 3]], params)
    others = SamplingParams(max_tokens=15, temperature=1.3)
    crowd = llm.generate([[7] * 20, [1, 2, 3], [8]], [others, params, others])
    assert crowd[1].token_ids == alone.token_ids
    (other,) = llm.generate([[1, 2, 3]], dataclasses.replace(params, seed=43))
    assert other.token_ids != alone.token_ids


def test_unseeded_requests_differ_and_engines_repeat(llama: TinyModel) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0)
    first, second = (engine(llama, seed=3).generate([[1, 2]] * 3, params) for _ in range(2))
    assert len({one.token_ids for one in first}) == 3
    assert [one.token_ids for one in first] == [one.token_ids for one in second]


def test_logprobs_equal_a_plain_forward(llm: LLM, llama: TinyModel) -> None:
    prompt = [3, 1, 4, 1, 5]
    (one,) = llm.generate([prompt], dataclasses.replace(GREEDY, logprobs=4))
    tokens = [*prompt, *one.token_ids]
    with torch.inference_mode():
        logits = llama.model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits.float(), dim=-1)
    assert len(one.logprobs) == len(one.token_ids) == 8
    for at, (entry, token) in enumerate(zip(one.logprobs, one.token_ids, strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(wanted[at, token]), abs=1e-4)
        values, ids = wanted[at].topk(4)
        assert [i for i, _ in entry.top] == ids.tolist()
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_abort_gives_pages_back(llm: LLM) -> None:
    llm.add_request("long", [1] * 100, SamplingParams(max_tokens=200, temperature=0))
    llm.add_request("queued", [2] * 10, GREEDY)
    llm.step()
    assert llm.stats().pages_used > 0
    for name in ("long", "queued"):
        output = llm.abort(name)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
    assert llm.stats().pages_used == 0
    assert not llm.has_unfinished()
    assert llm.abort("long") is None
    assert llm.step() == []


def test_counters(llm: LLM) -> None:
    llm.generate([[1] * 40, [1] * 40], GREEDY)
    stats = llm.stats()
    assert (stats.prompt_tokens, stats.output_tokens) == (80, 16)
    assert (stats.prefix_cache_query_tokens, stats.prefix_cache_hit_tokens) == (80, 32)
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages_total) == (0, 0, 0, 64)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "an empty prompt"),
        ([1] * 50, "a prompt of 50 tokens; want at most 49"),
        ([1, 256], "256; want ids 0 to 255"),
        ([1, -1], "-1; want ids 0 to 255"),
    ],
)
def test_wrong_prompts(llama: TinyModel, prompt: list[int], message: str) -> None:
    llm = engine(llama, max_model_len=50)
    with pytest.raises(InvalidInputError, match=message):
        llm.add_request("a", prompt, GREEDY)
    assert not llm.has_unfinished()


def test_an_id_in_use(llm: LLM) -> None:
    llm.add_request("a", [1], GREEDY)
    with pytest.raises(InvalidInputError, match="request_id"):
        llm.add_request("a", [2], GREEDY)


def test_generate_takes_one_text_or_no_parameters_for_a_mistake(llm: LLM) -> None:
    with pytest.raises(InvalidInputError, match="prompts: got one text"):
        llm.generate("hello")
    with pytest.raises(InvalidInputError, match="sampling_params: got 0 of them"):
        llm.generate([[1, 2]], [])


def test_generate_with_one_wrong_prompt_computes_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidInputError, match="an empty prompt"):
        llm.generate([[1, 2], []], GREEDY)
    assert not llm.has_unfinished()
    assert llm.stats().output_tokens == 0


def test_the_cache_bounds_the_context(llama: TinyModel) -> None:
    assert engine(llama, kv_cache_tokens=100).max_model_len == 96
    with pytest.raises(InvalidInputError, match=r"max_model_len.*at most 96"):
        engine(llama, kv_cache_tokens=100, max_model_len=97)
    with pytest.raises(InvalidInputError, match=r"max_model_len.*at most 512"):
        engine(llama, max_model_len=513)


@pytest.mark.parametrize(
    "settings", [{"kv_cache_tokens": 15}, {"kv_cache_tokens": None, "kv_cache_memory_bytes": 8191}]
)
def test_a_cache_too_small_for_a_page_is_refused_by_its_setting(
    llama: TinyModel, settings: dict[str, int | None]
) -> None:
    name, given = list(settings.items())[-1]
    wanted = rf"{name}: got {given}; .*two tokens, in pages of 16 \(8192 bytes each\)"
    with pytest.raises(InvalidInputError, match=wanted):
        engine(llama, **settings)


def test_a_cache_too_large_for_the_device_says_what_it_takes(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("headway.engine.llm.KVCache", full)
    wanted = r"kv_cache_tokens: got 1023 pages of 16 tokens, 8 MiB; want fewer: .* allocate 9 GiB"
    with pytest.raises(InvalidInputError, match=wanted):
        engine(llama, kv_cache_tokens=16 * 1023)


def test_one_token_is_no_sequence(llama: TinyModel) -> None:
    """A prompt has one, and then one follows."""
    with pytest.raises(InvalidInputError, match="max_model_len: got 1; want at least 2"):
        engine(llama, max_model_len=1)
    with pytest.raises(InvalidInputError, match="kv_cache_tokens: got 1; want room for two"):
        engine(llama, kv_cache_tokens=1, page_size=1)
    llm = engine(llama, kv_cache_tokens=2, page_size=1)
    (one,) = llm.generate([[1]], SamplingParams(max_tokens=4, temperature=0))
    assert list(one.token_ids) == llama.greedy([1], 1)


def test_cache_size_in_bytes(llama: TinyModel) -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # layers, k and v, heads, head_dim, float32
    llm = engine(llama, kv_cache_tokens=None, kv_cache_memory_bytes=per_token * 160)
    assert llm.stats().pages_total == 10


# --- failures stay with their request ----------------------------------------------------------------


def test_a_failing_sampler_ends_one_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sampler.draw

    def broken(logits: torch.Tensor, rows: list[sampler.Row]) -> sampler.Drawn:
        if any(row.seed == 666 for row in rows):
            raise ZeroDivisionError("bad row")
        return original(logits, rows)

    monkeypatch.setattr(sampler, "draw", broken)
    bad, good = (SamplingParams(max_tokens=4, seed=seed) for seed in (666, 1))
    first, second = llm.generate([[1, 2], [3, 4]], [bad, good])
    assert first.finish_reason is FinishReason.ERROR
    assert (second.finish_reason, len(second.token_ids)) == (FinishReason.LENGTH, 4)
    assert llm.stats().pages_used == 0


def test_logits_that_are_not_finite_end_the_request(llama: TinyModel) -> None:
    llm = engine(llama, acceleration="off")
    llm.add_request("a", [1, 2], GREEDY)
    llm.step()
    with torch.no_grad():
        llm.model.lm_head.weight.fill_(float("nan"))
    (output,) = llm.step()
    assert output.finish_reason is FinishReason.ERROR
    assert output.error is not None
    assert "not finite" in output.error
    assert not llm.has_unfinished()


def test_a_failing_detokenizer_ends_one_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.add_request("bad", [1], GREEDY)
    llm.add_request("good", [2], GREEDY)
    request = llm._requests["bad"]
    assert request.detokenizer is not None
    monkeypatch.setattr(request.detokenizer, "_decode", lambda ids: 1 / 0)
    outputs = drain(llm)
    assert [one.finish_reason for one in outputs["bad"]] == [FinishReason.ERROR]
    assert "ZeroDivisionError" in (outputs["bad"][0].error or "")
    assert len(outputs["good"]) == 8


def test_a_failing_model_call_ends_its_requests_and_the_engine_goes_on(
    llm: LLM, llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "run", lambda chunks: 1 / 0)
        (failed,) = llm.generate([[1, 2, 3]], GREEDY)
    assert failed.finish_reason is FinishReason.ERROR
    (one,) = llm.generate([[1, 2, 3]], GREEDY)
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 8)


# --- loading ------------------------------------------------------------------------------------------


def test_the_engines_gpu_is_the_current_one(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whoever makes an engine, and in every thread that takes its steps."""
    made: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", made.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert parallel.join(1, torch.device(name)) == torch.device(name)
    assert made == [torch.device("cuda:1")]
    llm = engine(llama)
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def use(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(devices, "use", use)
    seen: list[list[torch.device]] = []
    llm.model.register_forward_hook(lambda *_: seen.append([*inside]))
    llm.generate([[1, 2]], SamplingParams(max_tokens=2))
    assert seen == [[llm.device]] * 2
    assert not inside


def test_dummy_weights_from_a_config_alone(tmp_path: Path) -> None:
    transformers.Qwen3Config(**SMALL).save_pretrained(tmp_path)
    llm, again = (
        engine(path, load_format="dummy", dtype="bfloat16")
        for path in (tmp_path, tmp_path / "config.json")
    )
    assert llm.dtype is torch.bfloat16
    assert llm.tokenizer is None
    params = SamplingParams(max_tokens=4, temperature=0)
    (one,) = llm.generate([[1, 2, 3]], params)
    assert (len(one.token_ids), one.text) == (4, "")
    assert again.generate([[1, 2, 3]], params)[0].token_ids == one.token_ids
    with pytest.raises(InvalidInputError, match="the model has no tokenizer"):
        llm.encode("text")
    with pytest.raises(InvalidInputError, match="stop"):
        llm.generate([[1]], SamplingParams(stop=("x",)))


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    transformers.Qwen3Config(**SMALL).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    llm = engine(tmp_path / "model", load_format="dummy", tokenizer=str(tmp_path / "tokenizer"))
    assert llm.tokenizer.decode(llm.encode("naïve")) == "naïve"


def test_chat_template(llama: TinyModel) -> None:
    llm = engine(llama)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidInputError, match="no chat template"):
        llm.apply_chat_template(messages)
    llm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert llm.tokenizer.decode(llm.apply_chat_template(messages)) == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("/no/such/folder", {}, "a path that exists"),
        ("{folder}", {}, "config.json"),
        ("{folder}/file.txt", {}, "a folder, a .gguf file"),
        ("{folder}", {"load_format": "gguf"}, r"a \.gguf file, or a folder with one \(found 0\)"),
    ],
)
def test_nothing_to_load(tmp_path: Path, model: str, options: dict[str, str], message: str) -> None:
    (tmp_path / "file.txt").write_text("not a model")
    config = EngineConfig(model=model.format(folder=tmp_path), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=message):
        LLM(config)


def test_devices_that_are_not_there(llama: TinyModel) -> None:
    with pytest.raises(InvalidInputError, match="device"):
        engine(llama, device="warp:9")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
            "bloom models",
        ),
        (
            transformers.FalconConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
            ),
            "falcon models",
        ),
        (
            transformers.MiniMaxConfig(**SMALL, num_local_experts=2),
            "MiniMaxForCausalLM: 1 of 2 layers are attention",
        ),
    ],
)
def test_models_that_cannot_run(
    config: transformers.PretrainedConfig, message: str, tmp_path: Path
) -> None:
    """Attention that cannot be exchanged, and layers with another memory than keys and values."""
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        engine(tmp_path, load_format="dummy", max_model_len=64)


def test_models_that_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(InvalidInputError, match="no_such_model"):
        engine(tmp_path)


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(InvalidInputError, match="has as a causal language model"):
        engine(tmp_path, load_format="dummy")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.GraniteMoeHybridConfig, "GraniteMoeHybrid.*: 0 of 2 layers are attention"),
        (
            transformers.LongcatFlashConfig,
            "LongcatFlash.* does not run on pages: RuntimeError: .* s",
        ),
    ],
)
def test_what_cannot_run_on_pages_is_refused_before_parts_are_exchanged(
    config: type[transformers.PretrainedConfig],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = {"mamba_n_heads": 4, "expert_ffn_hidden_size": 32, "n_routed_experts": 4}
    config(**SMALL, **widths).save_pretrained(tmp_path)
    monkeypatch.setattr(LLM, "_accelerate", None)
    with pytest.raises(UnsupportedError, match=why):
        engine(tmp_path, load_format="dummy", max_model_len=64)


def test_rotary_embeddings_that_depend_on_the_length(tmp_path: Path) -> None:
    """Within the original range the short factors serve all; beyond it a batch would mix lengths."""
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
        "factor": 4.0,
    }
    transformers.LlamaConfig(**SMALL, rope_parameters=rope).save_pretrained(tmp_path)
    assert engine(tmp_path, load_format="dummy").max_model_len == 128
    with pytest.raises(InvalidInputError, match=r"max_model_len.*at most 128.*longrope"):
        engine(tmp_path, load_format="dummy", max_model_len=256)


def test_sharded_safetensors(llama: TinyModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    (one,) = engine(tmp_path).generate([[1, 2, 3]], GREEDY)
    assert list(one.token_ids) == llama.greedy([1, 2, 3], 8)


def test_progress_bars_come_and_go(
    llama: TinyModel, capsys: pytest.CaptureFixture[str], tiny: Callable[[str], TinyModel]
) -> None:
    config = EngineConfig(model=str(llama.path), device="cpu", kv_cache_tokens=1024)
    LLM(config, progress=True)
    assert "Loading" in capsys.readouterr().out
    quiet = LLM(config)
    shown = capsys.readouterr()
    assert "Loading" not in shown.out + shown.err
    quiet.generate([[1]], GREEDY)


def test_a_backend_that_cannot_run_the_model_is_refused_before_weights_are_read(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedError, match="fa3: runs on NVIDIA GPUs"):
        engine(llama, attention_backend="fa3")
    with pytest.raises(InvalidInputError, match="attention_backend: got fa9; want auto, hopper"):
        engine(llama, attention_backend="fa9")
    with pytest.raises(InvalidInputError, match=r"model: got nope\.gguf; want a path that exists"):
        loader.find(EngineConfig(model="nope.gguf"))
