"""``/v1/chat/completions`` through the real openai client."""

from __future__ import annotations

import pytest

from tests.server.live import Live

HELLO = [{"role": "user", "content": "hello"}]
LAID_OUT = "<user>hello"


def chat(live: Live, messages: object = HELLO, **kwargs: object):
    return live.client().chat.completions.create(
        **({"model": "echo", "messages": messages, "max_tokens": len(LAID_OUT)} | kwargs)
    )


def test_the_assistant_answers(live: Live) -> None:
    answer = chat(live)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == LAID_OUT
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(LAID_OUT)


def test_roles_reach_the_template_and_developer_is_system(live: Live) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "r"},
    ]
    whole = "<system>be brief<user>q<assistant>a<user>r"
    answer = chat(live, messages, max_tokens=len(whole))
    assert answer.choices[0].message.content == whole


def test_content_may_be_text_parts(live: Live) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = chat(live, [{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == LAID_OUT


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_output_limit(live: Live, name: str) -> None:
    answer = chat(live, **({"max_tokens": None} | {name: 3}))
    assert answer.usage.completion_tokens == 3


def test_without_a_limit_the_answer_may_fill_the_context(live: Live) -> None:
    answer = chat(live, max_tokens=None)
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


def test_stream_opens_with_the_role_and_closes_with_the_reason(live: Live) -> None:
    chunks = list(chat(live, stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    assert all(c.object == "chat.completion.chunk" for c in chunks)
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(d.content or "" for d in deltas) == LAID_OUT
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, "length"]


def test_stream_usage(live: Live) -> None:
    *_, last = chat(live, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == len(LAID_OUT)


def test_stop_across_token_borders_while_streaming(live: Live) -> None:
    chunks = list(chat(live, stream=True, stop=["hell"]))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "<user>"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_have_openai_shape(live: Live) -> None:
    answer = chat(live, logprobs=True, top_logprobs=2, max_tokens=2)
    entries = answer.choices[0].logprobs.content
    assert [e.token for e in entries] == ["<", "u"]
    assert entries[0].bytes == [ord("<")]
    assert entries[0].logprob == -0.5
    assert [(t.token, t.logprob) for t in entries[0].top_logprobs] == [("<", -0.5), ("=", -1.5)]


def test_streamed_logprobs_join_to_the_whole(live: Live) -> None:
    chunks = chat(live, logprobs=True, stream=True)
    entries = [e for c in chunks for e in (c.choices[0].logprobs or Empty).content]
    assert "".join(e.token for e in entries) == LAID_OUT
    assert all(e.top_logprobs == [] for e in entries)


class Empty:
    content = ()


def test_n_choices(live: Live) -> None:
    answer = chat(live, n=3, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    turned = [LAID_OUT[k:] + LAID_OUT[:k] for k in (1, 2, 3)]
    assert [c.message.content for c in answer.choices] == turned
    assert answer.usage.prompt_tokens == len(LAID_OUT)


def test_neutral_values_of_unused_fields_are_accepted(live: Live) -> None:
    answer = chat(
        live,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        modalities=["text"],
        service_tier="auto",
        store=False,
        metadata={"team": "a"},
        user="someone",
        verbosity="medium",
    )
    assert answer.choices[0].message.content == LAID_OUT
