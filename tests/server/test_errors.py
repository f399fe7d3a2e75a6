"""What a wrong request is told: OpenAI's error shape, the right status, and a sentence that helps."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from headway.server.context import ServerSettings
from tests.server.live import Live, eventually, serving
from tests.server.stand_in import EchoEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("raw", [b"{", b"", b"not json", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_bodies_that_are_no_json_object(live: Live, path: str, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    error = error_of(httpx.post(live.url + path, content=raw, headers=headers), 400)
    assert error["type"] == "invalid_request_error"
    assert "JSON" in error["message"]
    if raw not in (b"[1, 2]", b'"text"', b""):
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", "ten", "an integer"),
        ("max_tokens", 1.5, "an integer"),
        ("max_tokens", True, "got true; want an integer"),
        ("n", 0, "at least 1"),
        ("n", 1000, "at most 128"),
        ("temperature", -1, "0 (greedy) or more"),
        ("temperature", "warm", "a number"),
        ("top_p", 0, "more than 0"),
        ("top_p", 1.5, "at most 1"),
        ("top_k", -2, "at least -1"),
        ("min_p", 2, "between 0 and 1"),
        ("seed", 2**70, "at most"),
        ("stop", 3, "got 3; want a string of at least one character, or a list of such strings"),
        ("stop", [1], "got [1]; want a string of at least one character, or a list"),
        ("stop", [""], "got ['']; want a string of at least one character"),
        ("stop", "", "got ''; want a string of at least one character"),
        ("stream", "yes", "true or false"),
        ("stop_token_ids", ["a"], "an integer"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_wrong_values_are_named_and_explained(
    live: Live, path: str, field: str, value: object, wanted: str
) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    error = error_of(live.post(path, body | {field: value}), 400)
    assert error["param"].split("[")[0] == field
    assert wanted in error["message"]
    assert "pydantic" not in error["message"]


def test_not_a_number_is_refused(live: Live) -> None:
    raw = '{"prompt": "x", "temperature": NaN}'
    headers = {"content-type": "application/json"}
    error = error_of(httpx.post(live.url + COMPLETIONS, content=raw, headers=headers), 400)
    assert error["param"] == "temperature"


@pytest.mark.parametrize("prompt", [None, [], 3, [[]], ["a", 1], [-1], [1.5], [["a"]], {"a": 1}])
def test_wrong_prompts(live: Live, prompt: object) -> None:
    error = error_of(live.post(COMPLETIONS, {"prompt": prompt}), 400)
    assert error["param"] == "prompt"
    assert error["message"].startswith(f"prompt: got {'null' if prompt is None else prompt}; want ")
    assert "list of token ids" in error["message"]


@pytest.mark.parametrize("prompt", ["", [[257]], [5, 1000000], "\ud800"])
def test_prompts_the_model_cannot_read(live: Live, prompt: object) -> None:
    raw = json.dumps({"prompt": prompt})  # as ASCII, lone surrogates included
    headers = {"content-type": "application/json"}
    error = error_of(httpx.post(live.url + COMPLETIONS, content=raw, headers=headers), 400)
    assert error["param"] == "prompt"


def test_missing_fields(live: Live) -> None:
    error = error_of(live.post(COMPLETIONS, {"model": "echo"}), 400)
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")
    error = error_of(live.post(CHAT, {"model": "echo"}), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "tool", "content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "name": "bob"}], "messages[0].name"),
    ],
)
def test_wrong_messages(live: Live, messages: object, param: str) -> None:
    assert error_of(live.post(CHAT, {"messages": messages}), 400)["param"] == param


def test_images_are_refused_as_such(live: Live) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    message = {"role": "user", "content": [{"type": "text", "text": "see:"}, image]}
    error = error_of(live.post(CHAT, {"messages": [message]}), 400)
    assert error["param"] == "messages[0].content[1]"
    assert "image_url" in error["message"]
    assert "text" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "suffix", "the end"),
        (COMPLETIONS, "best_of", 3),
        (COMPLETIONS, "frequency_penalty", 0.5),
        (COMPLETIONS, "logit_bias", {"5": 1}),
        (COMPLETIONS, "prompt_logprobs", 1),
        (CHAT, "presence_penalty", 1),
        (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "response_format", {"type": "json_object"}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "reasoning_effort", "high"),
        (CHAT, "store", True),
        (CHAT, "service_tier", "flex"),
        (CHAT, "web_search_options", {}),
        (CHAT, "repetition_penalty", 1.1),
    ],
)
def test_what_is_not_offered_is_refused_with_a_reason(
    live: Live, path: str, field: str, value: object
) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    error = error_of(live.post(path, body | {field: value}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "want" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_unknown_fields_are_refused(live: Live, path: str) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    error = error_of(live.post(path, body | {"temprature": 1}), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_fields_that_contradict_each_other(
    live: Live, path: str, extra: dict[str, object], param: str
) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    assert error_of(live.post(path, body | extra), 400)["param"] == param


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_prompt_beyond_the_context_names_both_lengths(live: Live, path: str) -> None:
    text = "x" * 2000
    chat = path == CHAT
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    error = error_of(live.post(path, body), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(2000 + len("<user>") * chat) in error["message"]
    assert "1024" in error["message"]


def test_max_tokens_beyond_the_context_names_the_room_left(live: Live) -> None:
    error = error_of(live.post(COMPLETIONS, {"prompt": "x" * 1000, "max_tokens": 25}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "at most 24" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_a_400(stream: bool) -> None:
    engine = EchoEngine(num_pages=8)
    with serving(engine) as live:
        body = {"prompt": ["ok", "x" * 60], "stream": stream}
        error = error_of(live.post(COMPLETIONS, body), 400)
        assert "at most 32" in error["message"]
        eventually(lambda: not engine.has_unfinished(), "the accepted half is cancelled")


def test_an_unknown_model_is_a_404(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        live.client().completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert "'echo'" in caught.value.message


def test_unknown_paths_and_methods(live: Live) -> None:
    assert "/v1/completions" in error_of(live.post("/v1/embeddings", {}), 404)["message"]
    assert "POST" in error_of(live.get(CHAT), 405)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_failure_is_a_500_and_the_server_goes_on(stream: bool) -> None:
    engine = EchoEngine()
    with serving(engine) as live:
        client = live.client()

        def fail() -> None:
            answer = client.completions.create(model="echo", prompt="!fail", stream=stream)
            assert stream, "only a stream fails after its headers"
            list(answer)

        with pytest.raises(openai.APIError) as caught:
            fail()
        assert "told to fail" in caught.value.message
        if not stream:
            assert isinstance(caught.value, openai.InternalServerError)
        assert client.completions.create(model="echo", prompt="a").choices[0].text == "a" * 16
        assert live.get("/health").status_code == 200
        assert engine.pages_used == 0


def test_an_engine_beyond_repair_says_so_and_health_fails() -> None:
    engine = EchoEngine()
    engine.broken = True
    with serving(engine) as live:
        for _ in range(2):
            error = error_of(live.post(COMPLETIONS, {"prompt": "!fail"}), 500)
            assert error["type"] == "server_error"
        assert live.get("/health").status_code == 503


def test_the_key_is_asked_for_everywhere_but_health() -> None:
    with serving(EchoEngine(), ServerSettings(api_key="secret")) as live:
        assert live.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/docs"):
            assert error_of(live.get(path), 401)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            live.client("wrong").completions.create(model="echo", prompt="x")
        accented = {"authorization": "Bearer sécret".encode()}
        error_of(live.get("/v1/models", headers=accented), 401)
        right = live.client("secret").completions.create(model="echo", prompt="x", max_tokens=2)
        assert right.choices[0].text == "xx"
