"""What both generation endpoints do: check lengths, run the jobs, answer whole or as a stream of events.

An endpoint describes its answer as an :class:`Answer`; this file drives it. A client that goes away, while
it waits or in the middle of a stream, takes its requests out of the engine with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from headway.engine.request import FinishReason, RequestOutput, TokenLogprob
from headway.errors import InvalidInputError
from headway.server.async_engine import Delivery, EngineFailedError, Group, Job
from headway.server.context import ServerContext
from headway.server.errors import ApiError, from_invalid_input, invalid
from headway.server.protocol import GenerationRequest

CLIENT_GONE = 499  # nginx's number for it; no client ever reads it
STATUS_KEY = "headway.status"  # in the ASGI scope: the outcome, where it is not the status sent

T = TypeVar("T")


@dataclass
class Choice:
    """One choice, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt too, where asked for
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.new_text)
        self.logprobs += (*output.prompt_logprobs, *output.new_logprobs)
        self.prompt_tokens = output.prompt_tokens
        self.cached_tokens = output.cached_tokens
        self.output_tokens = output.output_tokens
        self.finish_reason = output.finish_reason


class Answer(ABC):
    """One endpoint's answer to one request: its jobs, and its JSON, whole or in chunks."""

    prompt_field: ClassVar[str]  # what the request calls its prompt
    id: str
    jobs: list[Job]

    def __init__(self, body: GenerationRequest, created: int, model: str) -> None:
        self.body = body
        self.created = created
        self.model = model

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece, without ``usage``."""

    @abstractmethod
    def chunks(self, delivery: Delivery) -> list[dict[str, Any]]:
        """The events of one step of one choice."""

    @abstractmethod
    def envelope(self) -> dict[str, Any]:
        """What every event has around its ``choices``."""

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Token counts. A prompt counts once, however many choices continue it."""
        firsts = choices[:: self.body.choices_per_prompt]
        prompt = sum(choice.prompt_tokens for choice in firsts)
        output = sum(choice.output_tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
        }


async def respond(
    context: ServerContext, request: Request, answer: Answer, arrival: float
) -> Response:
    """Run the answer's jobs and send what comes out. ``arrival`` is perf_counter's time in seconds."""
    try:
        group = await context.engine.submit(answer.jobs)
    except InvalidInputError as error:
        param = answer.prompt_field if error.argument == "prompt_token_ids" else error.argument
        raise from_invalid_input(error, param) from None
    except EngineFailedError as error:
        raise ApiError(500, str(error), code="engine_failed") from None
    watch = Stopwatch(context, arrival, len(answer.jobs))
    if answer.body.stream:
        return EventStream(_events(group, answer, watch), group)
    async with group:
        choices = await _collect(group, answer, watch, context)
    return JSONResponse(answer.whole(choices) | {"usage": answer.usage(choices)})


async def _collect(
    group: Group, answer: Answer, watch: Stopwatch, context: ServerContext
) -> list[Choice]:
    choices = [Choice() for _ in answer.jobs]
    try:
        async for batch in group:
            for delivery in batch:
                watch.observe(delivery)
                choices[delivery.index].add(delivery.output)
    except EngineFailedError as error:
        status = 503 if context.traffic.draining else 500
        raise ApiError(status, str(error), code="engine_failed") from None
    return choices


async def _events(group: Group, answer: Answer, watch: Stopwatch) -> AsyncIterator[bytes]:
    """Server-sent events: what has arrived since the last write goes out in one write."""
    options = answer.body.stream_options
    counts = options is not None and options.include_usage
    running_counts = options is not None and options.continuous_usage_stats
    choices = [Choice() for _ in answer.jobs]
    try:
        async for batch in group:
            events = []
            for delivery in batch:
                watch.observe(delivery)
                choices[delivery.index].add(delivery.output)
                usage = answer.usage(choices) if running_counts else None
                for chunk in answer.chunks(delivery):
                    events.append(_event(chunk | {"usage": usage} if options else chunk))
            yield b"".join(events)
    except EngineFailedError as error:
        yield _event(ApiError(500, str(error), code="engine_failed").body)
    else:
        if counts:
            yield _event(answer.envelope() | {"choices": [], "usage": answer.usage(choices)})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come; cancels the group when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], group: Group) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._group = group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._group:
            try:
                await unless_gone(receive, self._send(send))
            except ClientGoneError:
                scope[STATUS_KEY] = CLIENT_GONE

    async def _send(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        async for piece in self._events:
            if piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client closes its connection first."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class Stopwatch:
    """Feeds one HTTP request's latencies to the metrics."""

    def __init__(self, context: ServerContext, arrival: float, num_choices: int) -> None:
        self._metrics = context.metrics
        self._arrival = arrival
        self._latest: list[float | None] = [None] * num_choices

    def observe(self, delivery: Delivery) -> None:
        if delivery.output.new_token_ids:
            latest = self._latest[delivery.index]
            if latest is None:
                self._metrics.time_to_first_token.observe(delivery.time - self._arrival)
            else:
                self._metrics.inter_token_latency.observe(delivery.time - latest)
            self._latest[delivery.index] = delivery.time
        reason = delivery.output.finish_reason
        if reason is not None:
            self._metrics.finished.labels(reason.value).inc()
            self._metrics.request_duration.observe(delivery.time - self._arrival)


# --- checks that both endpoints make ------------------------------------------------------------------


def check_model(context: ServerContext, name: str | None) -> str:
    """The model's name in the answer; the first served name where the request gives none."""
    names = context.model_names
    if name is None or name in names:
        return name or names[0]
    listed = " or ".join(repr(known) for known in names)
    message = f"model: {name!r} is not served here; want {listed}"
    raise ApiError(404, message, param="model", code="model_not_found")


def output_limit(
    context: ServerContext, param: str, prompt_tokens: int, asked: int | None, default: int | None
) -> int:
    """How many tokens a prompt may be continued by: ``asked``, or ``default`` or the context's rest."""
    longest = context.engine.engine.max_model_len
    if prompt_tokens == 0:
        raise invalid(param, f"{param}: got no tokens; want at least one")
    room = longest - prompt_tokens
    if room < 1:
        message = (
            f"{param}: the prompt has {prompt_tokens} tokens; the model's context holds {longest}, "
            f"prompt and answer together. Shorten the prompt to at most {longest - 1} tokens"
        )
        raise invalid(param, message, "context_length_exceeded")
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        message = (
            f"max_tokens: {prompt_tokens} prompt tokens and max_tokens {asked} make "
            f"{prompt_tokens + asked}; the model's context holds {longest}. "
            f"Ask for at most {room}, or shorten the prompt"
        )
        raise invalid("max_tokens", message, "context_length_exceeded")
    return asked


def check_text(param: str, text: str) -> str:
    """JSON can spell strings that are not Unicode text (lone surrogates); tokenizers cannot read them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            param,
            f"{param}: character {error.start} is half of a surrogate pair; want Unicode text",
        ) from None
    return text
