"""What clients may send: the two request bodies, as OpenAI defines them, and how they become sampling.

Every field is honoured or refused. Fields this engine has no use for are listed in ``NEUTRAL`` with the
values that ask for nothing; any other value of theirs is a 400 with the reason, and so is an unknown field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from headway.engine.request import SamplingParams
from headway.errors import InvalidInputError
from headway.server.errors import from_invalid_input, invalid

MAX_CHOICES = 128

#: Labels for the caller's own bookkeeping. They never change an answer, so any value is fine.
LABELS = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key"})

#: field -> (values that ask for nothing, why anything else is refused). null always asks for nothing.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "penalties are not part of the sampler"),
    "presence_penalty": ((0,), "penalties are not part of the sampler"),
    "repetition_penalty": ((1,), "penalties are not part of the sampler"),
    "length_penalty": ((1,), "beam search is not offered"),
    "use_beam_search": ((False,), "beam search is not offered"),
    "logit_bias": (({},), "logits are sampled as the model gives them"),
    "min_tokens": ((0,), "use ignore_eos to run to max_tokens"),
    "response_format": (({"type": "text"},), "constrained decoding is not offered"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": ((True,), "special tokens are never part of the text"),
    "add_special_tokens": ((True,), "send token ids to choose the special tokens yourself"),
    "truncate_prompt_tokens": ((), "shorten the prompt before sending it"),
    "prompt_logprobs": ((), "send echo=true with logprobs"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "answers are not kept"),
}

COMPLETION_NEUTRAL = NEUTRAL | {
    "suffix": (("",), "the model completes forwards only"),
}

CHAT_NEUTRAL = NEUTRAL | {
    "tools": (([],), "tool calls are not offered"),
    "tool_choice": (("none", "auto"), "tool calls are not offered"),
    "parallel_tool_calls": ((True, False), "tool calls are not offered"),
    "functions": (([],), "function calls are not offered"),
    "function_call": (("none", "auto"), "function calls are not offered"),
    "modalities": ((["text"],), "the model reads and writes text"),
    "audio": ((), "the model reads and writes text"),
    "prediction": ((), "predicted outputs are not offered"),
    "reasoning_effort": ((), "the chat template has no such setting"),
    "verbosity": (("medium",), "the chat template has no such setting"),
    "web_search_options": ((), "web search is not offered"),
    "moderation": ((), "moderation is not offered"),
    "prompt_cache_retention": (("in_memory", "in-memory"), "the prefix cache lives in memory"),
    "prompt_cache_options": ((), "the prefix cache works by itself"),
    "add_generation_prompt": ((True,), "a chat always continues with the assistant's turn"),
    "continue_final_message": ((False,), "a chat always starts a new assistant's turn"),
    "chat_template": ((), "the model's own chat template is used"),
    "chat_template_kwargs": (({},), "the model's own chat template is used as it is"),
}


def _as_stop(value: Any) -> Any:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if isinstance(strings, list) and all(isinstance(item, str) and item for item in strings):
        return strings
    raise ValueError("want a string of at least one character, or a list of such strings")


def _as_prompts(value: Any) -> Any:
    """A list of prompts, each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_token_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(map(_are_token_ids, value)):
            return value
    raise ValueError(
        "want a string, a list of strings, a list of token ids, or a list of those lists, not empty"
    )


def _are_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and item >= 0 for item in value)
    )


def _as_content(value: Any) -> Any:
    parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    if isinstance(value, str) or parts:
        return value
    raise ValueError("want a string or a list of parts like {'type': 'text', 'text': ...}")


class StreamOptions(BaseModel):
    """``continuous_usage_stats`` (vLLM's) puts the counts so far into every chunk."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None  # padding against traffic analysis: none here


class GenerationRequest(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str] | None, BeforeValidator(_as_stop)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    def check_common(self, neutral: dict[str, tuple[tuple[Any, ...], str]]) -> None:
        """Refuse what cannot be honoured."""
        for name, value in (self.model_extra or {}).items():
            if (value is None and (name in neutral or name in LABELS)) or name in LABELS:
                continue
            if name not in neutral:
                message = f"{name}: not a parameter of this endpoint"
                raise invalid(name, message, "unknown_parameter")
            accepted, why = neutral[name]
            if value not in accepted:
                listed = " or ".join(_json(item) for item in (*accepted, None))
                message = f"{name}: got {_json(value)}; want {listed}: {why}"
                raise invalid(name, message, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options: given without stream; set stream=true")

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    def sampling(
        self,
        max_tokens: int,
        logprobs: int | None,
        choice: int,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The parameters of one of ``n`` choices; a seed makes each choice repeatable, none equal."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "stop": tuple(self.stop) if self.stop else None,
            "stop_token_ids": tuple(self.stop_token_ids) if self.stop_token_ids else None,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "seed": None if self.seed is None else (self.seed + choice) % 2**63,
        }
        stated: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        try:
            return SamplingParams(max_tokens=max_tokens, **stated)
        except InvalidInputError as error:
            raise from_invalid_input(error) from None


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_as_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    def check(self) -> None:
        self.check_common(COMPLETION_NEUTRAL)
        if self.best_of not in (None, self.choices_per_prompt):
            message = f"best_of: got {self.best_of}; want n ({self.choices_per_prompt}) or null"
            raise invalid("best_of", message, "unsupported_parameter")


class ChatMessage(BaseModel):
    """One message; ``content`` is a string or a list of text parts."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[dict[str, Any]], BeforeValidator(_as_content)]

    def as_template_input(self, where: str) -> dict[str, str]:
        """What a chat template takes. ``developer`` is OpenAI's newer word for ``system``."""
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                message = f"{where}.{name}: not supported; messages are a role and text"
                raise invalid(f"{where}.{name}", message, "unsupported_parameter")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self._text(where)}

    def _text(self, where: str) -> str:
        if isinstance(self.content, str):
            return self.content
        texts = []
        for i, part in enumerate(self.content):
            name = f"{where}.content[{i}]"
            if part.get("type") != "text":
                message = (
                    f"{name}: got a part of type {part.get('type')!r}; want 'text' parts: "
                    "this server reads text only"
                )
                raise invalid(name, message, "unsupported_content")
            if not isinstance(part.get("text"), str):
                raise invalid(name, f"{name}: want a string in its field text")
            texts.append(part["text"])
        return "".join(texts)


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def check(self) -> None:
        self.check_common(CHAT_NEUTRAL)
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs: given without logprobs; set logprobs=true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = (
                f"max_completion_tokens: got {both[1]} beside max_tokens {both[0]}; "
                "want one of them, or the same number"
            )
            raise invalid("max_completion_tokens", message)

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_input(self) -> list[dict[str, str]]:
        return [m.as_template_input(f"messages[{i}]") for i, m in enumerate(self.messages)]


def _json(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
