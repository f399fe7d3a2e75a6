"""The server over the built-in engine with a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from headway.server.context import ServerSettings
from tests.server.live import Live, eventually, serving
from tests.server.test_service import raw_client

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [f"Once upon a time, there were {i} little" for i in range(64)]


@dataclass(frozen=True)
class ModelServer:
    live: Live
    llm: LLM
    greedy: list[str]  # what the engine itself says to PROMPTS, all together

    @property
    def client(self) -> openai.OpenAI:
        return self.live.client()


@pytest.fixture(scope="module")
def smol() -> Iterator[ModelServer]:
    script = Path(__file__).parents[2] / "script" / "fetch_model.py"
    fetched = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    config = EngineConfig(
        model=fetched.stdout.strip(), dtype="float32", device="cpu",
        max_model_len=512, kv_cache_tokens=4096,
    )  # fmt: skip
    llm = LLM(config)
    params = SamplingParams(max_tokens=6, temperature=0)
    greedy = [done.text for done in llm.generate(PROMPTS, params)]
    with serving(llm, ServerSettings(served_model_names=("smollm2",))) as live:
        yield ModelServer(live, llm, greedy)


def chat(smol: ModelServer, **kwargs: object):
    asked = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    return smol.client.chat.completions.create(**(asked | kwargs))


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smol: ModelServer) -> None:
    answer = chat(smol)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(smol.llm.apply_chat_template(QUESTION))


def test_a_stream_is_the_whole_answer_in_pieces(smol: ModelServer) -> None:
    whole = chat(smol).choices[0].message.content
    chunks = list(chat(smol, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert len(chunks) > 5


def test_64_concurrent_requests_say_what_the_engine_says(smol: ModelServer) -> None:
    async def ask_all() -> list[str]:
        async with smol.live.async_client() as client:
            answers = [
                client.completions.create(
                    model="smollm2", prompt=prompt, max_tokens=6, temperature=0
                )
                for prompt in PROMPTS
            ]
            return [done.choices[0].text for done in await asyncio.gather(*answers)]

    assert asyncio.run(ask_all()) == smol.greedy


def test_logprobs_are_a_distribution_and_greedy_takes_its_top(smol: ModelServer) -> None:
    choice = chat(smol, logprobs=True, top_logprobs=5).choices[0]
    entries = choice.logprobs.content
    for entry in entries:
        assert entry.logprob <= 0
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-4
    assert (
        bytes(b for entry in entries for b in entry.bytes)
        .decode()
        .startswith(choice.message.content)
    )


def test_stop_strings_of_the_text(smol: ModelServer) -> None:
    choice = chat(smol, stop=[" France"]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == "The capital of"


def test_seeds_repeat_and_differ(smol: ModelServer) -> None:
    def draw(seed: int) -> str:
        answer = smol.client.completions.create(
            model="smollm2", prompt="My favourite", temperature=1.0, seed=seed, max_tokens=12
        )
        return answer.choices[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in (1, 2, 3)}) > 1


def test_choices_with_a_seed_differ(smol: ModelServer) -> None:
    answer = smol.client.completions.create(
        model="smollm2", prompt="My favourite", temperature=1.0, seed=5, n=4, max_tokens=12
    )
    assert len({choice.text for choice in answer.choices}) > 1


def test_a_repeated_prompt_comes_from_the_prefix_cache(smol: ModelServer) -> None:
    prompt = "A prompt that no other test has used, repeated word for word " * 4
    counts = [
        smol.client.completions.create(model="smollm2", prompt=prompt, max_tokens=1).usage
        for _ in range(2)
    ]
    assert counts[0].prompt_tokens_details.cached_tokens == 0
    assert counts[1].prompt_tokens_details.cached_tokens >= counts[1].prompt_tokens - 16
    assert smol.live.metric("headway_prefix_cache_hit_rate") > 0


def test_prompts_beyond_the_context_or_the_vocabulary(smol: ModelServer) -> None:
    with pytest.raises(openai.BadRequestError, match="512") as caught:
        chat(smol, messages=[{"role": "user", "content": "long " * 600}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="49151"):
        smol.client.completions.create(model="smollm2", prompt=[49152])


@pytest.mark.parametrize("stream", [False, True])
def test_a_vanished_client_gives_its_pages_back(smol: ModelServer, stream: bool) -> None:
    assert smol.llm.stats().pages_used == 0
    body = {"prompt": "Tell me", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    client = raw_client(smol.live, "/v1/completions", body)
    eventually(lambda: smol.llm.stats().running == 1, "the request runs")
    eventually(lambda: smol.llm.stats().pages_used > 0, "it holds pages")
    client.close()
    eventually(lambda: not smol.llm.has_unfinished(), "the request is cancelled")
    assert smol.llm.stats().pages_used == 0
    assert chat(smol).choices[0].finish_reason == "stop"


def test_metrics_come_from_the_engine(smol: ModelServer) -> None:
    chat(smol)
    assert smol.live.metric("headway_kv_cache_pages_total") == 4096 // 16
    assert smol.live.metric("headway_output_tokens_total") == smol.llm.stats().output_tokens
