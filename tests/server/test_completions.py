"""``/v1/completions`` through the real openai client."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.live import Live


def complete(live: Live, **kwargs: object):
    return live.client().completions.create(**({"model": "echo", "temperature": 0} | kwargs))


def test_a_string_prompt_is_continued(live: Live) -> None:
    answer = complete(live, prompt="abc", max_tokens=7)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "echo"
    (choice,) = answer.choices
    assert choice.text == "abcabca"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None


def test_max_tokens_is_sixteen_by_default(live: Live) -> None:
    assert complete(live, prompt="x").choices[0].text == "x" * 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "xyz"], ["abab", "xyzx"]),
        ([97, 98], ["abab"]),
        ([[97, 98], [120, 121, 122]], ["abab", "xyzx"]),
    ],
    ids=["string", "strings", "token ids", "lists of token ids"],
)
def test_every_form_of_prompt(live: Live, prompt: object, texts: list[str]) -> None:
    answer = complete(live, prompt=prompt, max_tokens=4)
    assert [c.text for c in answer.choices] == texts
    assert [c.index for c in answer.choices] == list(range(len(texts)))


def test_usage_counts_each_prompt_once_and_every_choice(live: Live) -> None:
    prompts = ["unseen-1", "unseen-22"]
    usage = complete(live, prompt=prompts, n=3, max_tokens=5).usage
    assert usage.prompt_tokens == sum(map(len, prompts))
    assert usage.completion_tokens == 2 * 3 * 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_usage_tells_cached_prompt_tokens(live: Live) -> None:
    first = complete(live, prompt="a prompt of its own").usage
    again = complete(live, prompt="a prompt of its own").usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 16


def test_choices_of_one_prompt_differ_with_a_seed_and_repeat(live: Live) -> None:
    texts = [
        [c.text for c in complete(live, prompt="abc", n=3, seed=0, max_tokens=3).choices]
        for _ in range(2)
    ]
    assert texts[0] == texts[1] == ["abc", "bca", "cab"]


def test_choices_are_grouped_by_prompt(live: Live) -> None:
    answer = complete(live, prompt=["ab", "xy"], n=2, seed=0, max_tokens=2)
    assert [c.text for c in answer.choices] == ["ab", "ba", "xy", "yx"]


@pytest.mark.parametrize("stop", ["d", ["zz", "d"]])
def test_stop_strings_end_the_answer_and_are_left_out(live: Live, stop: object) -> None:
    choice = complete(live, prompt="abcdef", max_tokens=30, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "stop")


def test_stop_string_can_be_kept(live: Live) -> None:
    extra = {"include_stop_str_in_output": True}
    choice = complete(live, prompt="abcdef", max_tokens=30, stop="cd", extra_body=extra).choices[0]
    assert choice.text == "abcd"


def test_end_of_sequence_stops_unless_ignored(live: Live) -> None:
    stopped = complete(live, prompt=[97, 98, 256], max_tokens=6).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")
    ignored = complete(
        live, prompt=[97, 98, 256], max_tokens=6, extra_body={"ignore_eos": True}
    ).choices[0]
    assert (ignored.text, ignored.finish_reason) == ("abab", "length")


def test_stop_token_ids(live: Live) -> None:
    extra = {"stop_token_ids": [99]}
    assert complete(live, prompt="abcdef", extra_body=extra).choices[0].finish_reason == "stop"


def test_logprobs_have_openai_shape_and_offsets(live: Live) -> None:
    choice = complete(live, prompt="aé", max_tokens=3, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    assert logprobs.text_offset == [0, 1, 1]


def test_logprobs_zero_gives_the_chosen_token_alone(live: Live) -> None:
    logprobs = complete(live, prompt="ab", max_tokens=1, logprobs=0).choices[0].logprobs
    assert logprobs.top_logprobs == [{"a": -0.5}]


def test_streamed_logprobs_join_to_the_whole(live: Live) -> None:
    asked = {"prompt": "aé", "max_tokens": 3, "logprobs": 1}
    whole = complete(live, **asked).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in complete(live, **asked, stream=True)]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for part in parts for item in getattr(part, field)]
        assert joined == getattr(whole, field), field


def test_echo_puts_the_prompt_first_once(live: Live) -> None:
    assert complete(live, prompt="ab", max_tokens=2, echo=True).choices[0].text == "abab"
    assert complete(live, prompt=[97, 98], max_tokens=2, echo=True).choices[0].text == "abab"
    chunks = complete(live, prompt="ab", max_tokens=2, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abab"


def test_echoed_prompts_have_logprobs_but_for_their_first_token(live: Live) -> None:
    """What evaluation harnesses ask for: the probabilities of a text, in one request."""
    asked = {"prompt": [97, 195, 169], "max_tokens": 1, "logprobs": 2, "echo": True}
    choice = complete(live, **asked).choices[0]
    assert choice.text == "aéa"
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "a"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.top_logprobs[1]) == 2
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    parts = [chunk.choices[0].logprobs for chunk in complete(live, **asked, stream=True)]
    joined = [item for part in parts for item in part.token_logprobs]
    assert joined == choice.logprobs.token_logprobs


def test_stream_joins_to_the_whole_answer(live: Live) -> None:
    chunks = list(complete(live, prompt="añ😀", max_tokens=14, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "añ😀añ😀"
    assert len({c.id for c in chunks}) == 1
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(c.usage is None for c in chunks)


def test_stream_of_several_choices_keeps_them_apart(live: Live) -> None:
    texts = ["", "", "", ""]
    for chunk in complete(live, prompt=["abc", "xyz"], n=2, seed=0, max_tokens=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["abc" * 3, "bca" * 3, "xyz" * 3, "yzx" * 3]


def test_stream_ends_with_usage_when_asked(live: Live) -> None:
    options = {"include_usage": True}
    *chunks, last = complete(
        live, prompt="12345", max_tokens=3, stream=True, stream_options=options
    )
    assert all(c.usage is None for c in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 3)


def test_stream_carries_running_usage_when_asked(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(live, prompt="abc", max_tokens=3, stream=True, stream_options=options))
    assert [c.usage.completion_tokens for c in chunks] == [1, 2, 3, 3]


def test_stream_is_server_sent_events_with_a_done_mark(live: Live) -> None:
    body = {"model": "echo", "prompt": "ab", "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": None,
    }


def test_neutral_values_of_unused_fields_are_accepted(live: Live) -> None:
    answer = complete(
        live,
        prompt="ab",
        max_tokens=2,
        best_of=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        suffix=None,
        user="someone",
        extra_body={"repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "min_tokens": 0},
    )
    assert answer.choices[0].text == "ab"


def test_the_model_may_be_left_out(live: Live) -> None:
    response = live.post("/v1/completions", {"prompt": "ab", "max_tokens": 1})
    assert response.json()["model"] == "echo"
