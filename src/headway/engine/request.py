"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headway.errors import InvalidInputError


class FinishReason(enum.Enum):
    """Why a request ended. Values are OpenAI's words where it has one."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # cancelled by its client
    ERROR = "error"  # failed inside the engine; see RequestOutput.error


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``temperature=0`` is greedy."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt, from the second on

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "between 0 and 20",
            ),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a tuple of strings of at least one character",
            ),
        )
        for name, holds, wanted in limits:
            if not holds:
                raise InvalidInputError(name, getattr(self, name), wanted)


@dataclass(frozen=True)
class TokenLogprob:
    """One position's log-probabilities (natural logarithm, of the model's untempered distribution)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token_id, logprob), most likely first


@dataclass(frozen=True)
class RequestOutput:
    """What one step added to one request. The pieces of all steps, joined, are the whole answer."""

    request_id: str
    new_text: str
    new_token_ids: tuple[int, ...]
    new_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0  # so far, this step's included
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    #: with the first token, where asked for: an entry for each token of the prompt but the first
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished request, whole."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None  # why it ended with FinishReason.ERROR


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine, for metrics."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prefix_cache_hit_tokens: int
    prefix_cache_query_tokens: int
    preemptions: int
    prompt_tokens: int
    output_tokens: int
    extra: dict[str, float] = field(default_factory=dict)
