"""A real model: the engine's greedy answers to twenty chats are transformers' own, token for token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from tests.engine.conftest import engine, greedy

GREEDY = SamplingParams(max_tokens=12, temperature=0)

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "List five fruits.",
    "What does a compiler do?",
    "Translate 'good morning' to Spanish.",
    "What is the boiling point of water?",
    "Give me a name for a cat.",
    "How many days are in a leap year?",
    "What is photosynthesis?",
    "Tell me a short joke.",
    "What is the largest planet?",
    "Define entropy in one sentence.",
    "How do I boil an egg?",
    "What rhymes with moon?",
    "Is the earth flat?",
)


@dataclass(frozen=True)
class Chats:
    """Prompts, and how transformers continues each alone (sdpa, float32)."""

    folder: Path  # the model as it was loaded: GGUF's weights take six times as long to read
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def chats(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Chats:
    llm = engine(smollm2, acceleration="off")
    folder = tmp_path_factory.mktemp("smollm2")
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [llm.apply_chat_template(turn) for turn in turns]
    llm.model.set_attn_implementation("sdpa")  # the model is transformers' alone again
    expected = [greedy(llm.model, prompt, GREEDY.max_tokens) for prompt in prompts]
    return Chats(folder, prompts, expected)


def answers(llm: LLM, chats: Chats) -> list[list[int]]:
    return [list(one.token_ids) for one in llm.generate(chats.prompts, GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk", [16, 512])
def test_twenty_chats_together(chunk: int, prefix_cache: bool, chats: Chats) -> None:
    llm = engine(
        chats.folder,
        kv_cache_tokens=4096,
        chunked_prefill_size=chunk,
        disable_prefix_cache=not prefix_cache,
    )
    assert answers(llm, chats) == chats.expected
    reused = llm.stats().prefix_cache_hit_tokens
    assert reused >= 16 * (len(chats.prompts) - 1) if prefix_cache else reused == 0


@pytest.mark.slow
def test_a_pool_that_the_answers_outgrow(chats: Chats, smollm2: Path) -> None:
    llm = engine(
        smollm2,
        acceleration="off",
        page_size=1,
        kv_cache_tokens=160,
        max_model_len=96,
        chunked_prefill_size=512,
        disable_prefix_cache=True,
    )
    assert answers(llm, chats) == chats.expected
    assert llm.stats().preemptions > 0
