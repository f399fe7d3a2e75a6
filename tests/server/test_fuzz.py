"""Whatever JSON arrives, the answer is a completion or an error in OpenAI's shape, never a 5xx."""

from __future__ import annotations

import json

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from headway.server.protocol import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    ChatCompletionRequest,
    CompletionRequest,
)
from tests.server.live import Live

# Surrogates included: JSON can spell them.
texts = st.text(st.characters(exclude_categories=()), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
prompts = texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 300), max_size=5)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
        optional={"content": texts | values, "name": values},
    ),
    max_size=3,
)
sensible = {
    "prompt": prompts,
    "messages": messages,
    "max_tokens": st.integers(0, 8),
    "n": st.integers(0, 3),
    "stop": texts | st.lists(texts, max_size=2),
    "stream": st.booleans(),
    "model": st.just("echo"),
}


sound = {
    "prompt": st.text(min_size=1, max_size=8) | st.lists(st.integers(0, 256), min_size=1),
    "messages": st.just([{"role": "user", "content": "hello"}]),
    "max_tokens": st.integers(1, 8),
    "n": st.integers(1, 3),
    "stop": st.text(min_size=1, max_size=2),
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "ignore_eos": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 3),
    "echo": st.booleans(),
}


def bodies(
    required: str, known: list[str], neutral: dict[str, tuple[tuple[object, ...], str]]
) -> st.SearchStrategy[dict[str, object]]:
    fields = {name: values | sensible.get(name, scalars) for name in known}
    always = {required: sensible[required], "max_tokens": sensible["max_tokens"]}
    rest = {name: field for name, field in fields.items() if name not in always}
    plausible = st.fixed_dictionaries(always, optional=rest)
    wild = st.fixed_dictionaries({}, optional=fields)
    harmless = {name: st.sampled_from([*accepted, None]) for name, (accepted, _) in neutral.items()}
    right = {name: field for name, field in sound.items() if name in known}
    must = {name: right.pop(name) for name in (required, "max_tokens")}
    good = st.fixed_dictionaries(must, optional=harmless | right)
    return good | plausible | wild | st.dictionaries(texts, values, max_size=4)


def check(live: Live, path: str, body: object) -> None:
    raw = json.dumps(body)
    headers = {"content-type": "application/json"}
    response = httpx.post(live.url + path, content=raw, headers=headers, timeout=20)
    hypothesis.event(str(response.status_code))
    if response.status_code != 200:
        assert response.status_code in (400, 404), response.text
        error = response.json()["error"]
        assert error["message"]
        assert "pydantic" not in error["message"]
        return
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["choices"]


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KNOWN_COMPLETION = [*CompletionRequest.model_fields, *COMPLETION_NEUTRAL]
KNOWN_CHAT = [*ChatCompletionRequest.model_fields, *CHAT_NEUTRAL]


@FUZZ
@given(body=bodies("prompt", KNOWN_COMPLETION, COMPLETION_NEUTRAL))
def test_completions(live: Live, body: dict[str, object]) -> None:
    check(live, "/v1/completions", body)


@FUZZ
@given(body=bodies("messages", KNOWN_CHAT, CHAT_NEUTRAL))
def test_chat(live: Live, body: dict[str, object]) -> None:
    check(live, "/v1/chat/completions", body)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_deep_nesting(live: Live, depth: int) -> None:
    raw = '{"prompt": ' + "[" * depth + "]" * depth + "}"
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{live.url}/v1/completions", content=raw, headers=headers)
    assert response.status_code == 400
