"""Commands that load a model, on tiny ones with random weights."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import dynamic_module_utils
from typer.testing import CliRunner

from headway import cli, dispatch
from headway.bench.peers import VllmPeer
from headway.engine import loader
from headway.engine.config import EngineConfig
from headway.engine.introduction import introduction
from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError, InvalidInputError, UnsupportedError
from headway.problem import Problem
from headway.providers.base import Provider
from headway.server import engine_process
from tests.engine.conftest import TinyModel, save_tiny

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("llama", tmp_path_factory.mktemp("cli"))


def run(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def server(llama: TinyModel) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server process, its URL, and what it said when it was ready."""
    words = ["--port", "0", "--device", "cpu", "--kv-cache-tokens", "1024", "--page-size", "8"]
    words.append("--engine-process")  # in one process it runs nearly everywhere else
    process = subprocess.Popen(
        [sys.executable, "-m", "headway", "serve", str(llama.path), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HEADWAY_API_KEY": "secret"},
    )
    assert process.stdout is not None
    said, url = "", None
    while url is None:
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}: {said}"
        said += line
        url = re.search(r"http://\S+/v1", line)
    yield process, url[0], said
    process.kill()
    process.wait()


def test_serve_introduces_itself_answers_and_drains(
    server: tuple[subprocess.Popen[str], str, str], llama: TinyModel
) -> None:
    process, url, said = server
    assert re.search(r"model +llama \(float32, cpu\)", said)
    assert re.search(r"context +512 tokens", said)
    assert re.search(r"KV cache +1024 tokens in pages of 8", said)
    assert re.search(r"attention +\w+ \(.*\)", said)
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
    prompt = list(b"hello")
    answer = client.completions.create(model="llama", prompt=prompt, max_tokens=9, temperature=0)
    wanted = bytes(llama.greedy(prompt, 9))
    assert answer.usage.completion_tokens == len(wanted)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_generate_prints_the_continuation(llama: TinyModel) -> None:
    words = ["generate", str(llama.path), "hello", "--device", "cpu", "--max-tokens", "8"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    llm = LLM(EngineConfig(str(llama.path), device="cpu"))
    (done,) = llm.generate(["hello"], SamplingParams(max_tokens=8, temperature=0))
    assert done.text
    assert done.text in result.stdout
    assert "5 tokens in, 8 out" in result.output


def test_generate_uses_the_chat_template_unless_raw(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    config = model.path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    words = ["generate", str(model.path), "hi", "--device", "cpu", "--max-tokens", "1"]
    laid_out = len("<system>be brief<user>hi<assistant>")
    for more, tokens in (([], laid_out - 16), (["--system", "be brief"], laid_out), (["--raw"], 2)):
        result = CliRunner().invoke(cli.app, [*words, *more])
        assert f"{tokens} tokens in, 1 out" in result.output


def test_a_server_knows_where_remote_code_lies_before_its_engine_tells_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes out of the engine's process then is made of that code's classes."""
    happened: list[str] = []

    def start(*arguments: object, **options: object) -> object:
        happened.append("started")
        return contextlib.nullcontext(SimpleNamespace(answer=None))

    monkeypatch.setattr(dynamic_module_utils, "init_hf_modules", lambda: happened.append("found"))
    monkeypatch.setattr(engine_process, "EngineProcess", start)
    for trusted in (True, False):
        config = EngineConfig(model="any", device="cpu", trust_remote_code=trusted)
        with cli._engine(config, apart=True):
            pass
    assert happened == ["found", "started", "started"]


@pytest.mark.parametrize(
    ("device", "ranks", "found", "apart"),
    [
        ("auto", 1, True, True),
        ("auto", 1, False, False),
        ("cuda:0", 1, True, True),
        ("cpu", 1, True, False),
        ("auto", 2, True, False),
        ("cuda", 2, True, False),
    ],
)
def test_an_engine_on_one_gpu_gets_a_process_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, found: bool, apart: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: found)
    config = EngineConfig(model="any", device=device, tensor_parallel_size=ranks)
    assert cli._on_one_gpu(config) is apart


def test_generate_counts_tokens_not_steps(llama: TinyModel) -> None:
    """With guesses a step may give several."""
    words = ["generate", str(llama.path), "a", "--device", "cpu", "--max-tokens", "40"]
    result = CliRunner().invoke(cli.app, [*words, "--speculative", "ngram"])
    assert result.exit_code == 0, result.output
    assert "40 out" in result.stderr


def test_generate_says_which_file_of_a_tokenizer_is_missing(llama: TinyModel) -> None:
    command = [sys.executable, "-m", "headway", "generate", str(llama.path), "hi"]
    done = subprocess.run(
        [*command, "--tokenizer", "/no/such/folder"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--tokenizer: got /no/such/folder" in done.stderr


def test_the_environment_pins_an_engines_backend(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` in a configuration is what nobody asked for."""
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    config = EngineConfig(model=str(llama.path), device="cpu")
    llm = LLM(config)
    asked = ("cpu", "reference")
    said = {name: LLM(replace(config, attention_backend=name)) for name in asked}
    assert introduction(llm).attention == introduction(said["reference"]).attention.replace(
        "backend=", "HEADWAY_BACKEND="
    )
    assert "pinned by backend=cpu" in introduction(said["cpu"]).attention
    ran: list[str] = []
    choose = dispatch.choose

    def noted(problem: Problem) -> Provider:
        ran.append(choose(problem).name)
        return choose(problem)

    monkeypatch.setattr(dispatch, "choose", noted)
    llm.generate(["four"], SamplingParams(max_tokens=2))
    assert set(ran) == {"reference"}
    monkeypatch.setenv("HEADWAY_BACKEND", "fa3")
    with pytest.raises(UnsupportedError, match="HEADWAY_BACKEND=fa3 cannot run this call"):
        LLM(config)


def test_a_length_beyond_the_model_is_refused_before_its_weights_are_read(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loader, "load_model")
    with pytest.raises(InvalidInputError, match="got 513; want at most 512"):
        loader.load(EngineConfig(model=str(llama.path), device="cpu", max_model_len=513))


def test_generate_reads_standard_input(llama: TinyModel) -> None:
    words = ["generate", str(llama.path), "-", "--device", "cpu", "--max-tokens", "1"]
    result = CliRunner().invoke(cli.app, words, input="four")
    assert "4 tokens in, 1 out" in result.output


def test_bench_generate_measures_every_batch_size(llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "reading.json"
    said = run(
        "bench", "generate", str(llama.path), "--device", "cpu", "--batch-sizes", "1,3",
        "--input-len", "20", "--output-len", "5", "--repeats", "2", "--output", str(path),
    )  # fmt: skip
    assert "tok/s" in said
    reading = json.loads(path.read_text())
    assert [row["batch_size"] for row in reading["results"]] == [1, 3]
    assert reading["settings"]["model"] == "llama"
    assert str(llama.path.parent) not in path.read_text()
    for row in reading["results"]:
        assert len(row["runs_s"]) == 2
        tokens = row["batch_size"] * 5
        assert row["best_output_throughput"] == pytest.approx(tokens / min(row["runs_s"]))
        assert 0 < row["ttft_ms"] < 1e3 * max(row["runs_s"])


def test_bench_generate_stands_beside_transformers(llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "reading.json"
    run(
        "bench", "generate", str(llama.path), "--device", "cpu", "--batch-sizes", "2",
        "--input-len", "20", "--output-len", "5", "--repeats", "2", "--peers", "transformers",
        "--output", str(path),
    )  # fmt: skip
    rows = json.loads(path.read_text())["results"]
    assert [row["engine"] for row in rows] == ["headway", "transformers"]
    for row in rows:
        assert len(row["runs_s"]) == 2
        assert row["output_throughput"] == pytest.approx(10 / (sum(row["runs_s"]) / 2))
        assert 0 < row["ttft_ms"] < 1e3 * max(row["runs_s"])
        assert row["decode_throughput"] > 0


def test_the_vllm_peer_speaks_with_a_process(tmp_path: Path) -> None:
    """A module named vllm that counts, in the place of the real one: the protocol is what is tested."""
    (tmp_path / "vllm.py").write_text(
        "import types\n"
        "__version__ = '9'\n"
        "class SamplingParams:\n"
        "    def __init__(self, **settings): self.max_tokens = settings['max_tokens']\n"
        "class LLM:\n"
        "    def __init__(self, **settings): print('loading', settings['model'])\n"
        "    def generate(self, prompts, params, use_tqdm):\n"
        "        one = types.SimpleNamespace(token_ids=[0] * params.max_tokens)\n"
        "        return [types.SimpleNamespace(outputs=[one]) for _ in prompts]\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    peer = VllmPeer(tmp_path, "float32", python=python, max_model_len=64)
    assert peer.version == "9"
    assert peer.generate([[1, 2], [3, 4]], 5).total_s > 0
    peer.close()
    python.write_text("#!/bin/sh\nexit 7\n")
    with pytest.raises(HeadwayError, match="exit code 7"):
        VllmPeer(tmp_path, "float32", python=python, max_model_len=64)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ["2 layers, 4/2 heads, head_dim 16"]),
        (
            "gpt_oss",
            [
                "1 layers, 4/2 heads, head_dim 16, window 10, sinks",
                "1 layers, 4/2 heads, head_dim 16, sinks",
            ],
        ),
    ],
)
def test_explain_a_model_shows_each_kind_of_layer(
    family: str, kinds: list[str], tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path)
    said = run("explain", "--model", str(model.path), "--device", "cpu")
    assert [line.split(": ")[1] for line in said.splitlines() if "layers" in line] == [
        f"{kind}, float32, decode" for kind in kinds
    ]
    assert said.count("-> ") == len(kinds)


def test_explain_a_model_in_the_step_and_the_cache_that_are_asked_for(tmp_path: Path) -> None:
    """From its configuration alone: there is no weight file here."""
    model = save_tiny("gpt_oss", tmp_path / "whole")
    config = tmp_path / "config.json"
    config.write_text((model.path / "config.json").read_text())
    words = [
        "explain",
        "--model",
        str(config),
        "--device",
        "cpu",
        "--batch",
        "3",
        "--kv-dtype",
        "fp8",
    ]
    said = run(*words, "--dtype", "bf16", "--seqlen-q", "20", "--seqlen-k", "900")
    titles = [line for line in said.splitlines() if "layers" in line]
    assert len(titles) == 2
    for title in titles:
        assert title.endswith("bfloat16 over float8, 20 new tokens, 3 sequences of 900")
    assert said.count("-> cpu ") == 2
    fa3 = next(line for line in said.splitlines() if "fa3" in line)
    assert "this is cpu" in fa3


def test_explain_a_model_with_a_pinned_provider_says_why_not(llama: TinyModel) -> None:
    said = run("explain", "--model", str(llama.path), "--device", "cpu", "--backend", "fa4")
    assert "pinned by backend=fa4" in said
    assert "-> " not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kv-dtype fp16", "--kv-dtype: got fp16; want fp8 with --model"),
        ("--dtype fp8", "--dtype: got fp8; want bf16, fp16, fp32 with --model"),
        ("--seqlen-q 9 --seqlen-k 4", "--seqlen-q: got 9 new tokens of 4"),
        ("--heads 8/8", "--heads: got a value beside --model; want one of them"),
        ("--no-causal --softcap 30", "causal: got a value beside --model"),
    ],
)
def test_explain_a_model_refuses_what_the_engine_has_not(
    words: str, message: str, llama: TinyModel
) -> None:
    command = [sys.executable, "-m", "headway", "explain", "--model", str(llama.path)]
    done = subprocess.run([*command, *words.split()], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
