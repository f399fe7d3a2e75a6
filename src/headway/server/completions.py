"""``POST /v1/completions``: text or token ids in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from headway.engine.request import TokenLogprob
from headway.errors import InvalidInputError
from headway.server.async_engine import Delivery, Job
from headway.server.context import ServerContext
from headway.server.errors import from_invalid_input, invalid
from headway.server.generation import Answer, Choice, check_model, check_text, output_limit
from headway.server.logprobs import CompletionLogprobs
from headway.server.protocol import CompletionRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def build(context: ServerContext, body: CompletionRequest) -> CompletionAnswer:
    """Check the request against the model and tokenise its prompts."""
    body.check()
    model = check_model(context, body.model)
    try:
        prompts = [await _token_ids(context, prompt) for prompt in body.prompt]
    except InvalidInputError as error:  # a model without a tokenizer
        raise from_invalid_input(error, "prompt") from None
    echoes = [_echo(context, prompt) if body.echo else "" for prompt in body.prompt]
    return CompletionAnswer(context, body, model, prompts, echoes)


async def _token_ids(context: ServerContext, prompt: str | list[int]) -> list[int]:
    engine = context.engine.engine
    if isinstance(prompt, str):
        return await context.engine.tokenize(engine.encode, check_text("prompt", prompt))
    highest, size = max(prompt), engine.model_config.vocab_size
    if highest >= size:
        raise invalid(
            "prompt", f"prompt: got token id {highest}; this model's token ids are 0 to {size - 1}"
        )
    return prompt


def _echo(context: ServerContext, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    tokenizer = context.engine.engine.tokenizer
    if tokenizer is None:
        raise invalid("echo", "echo: not for token ids, as this model has no tokenizer")
    return str(tokenizer.decode(prompt))


class CompletionAnswer(Answer):
    """A text completion. ``prompts`` are token ids; ``echoes`` what goes before each answer's text."""

    prompt_field = "prompt"

    def __init__(
        self,
        context: ServerContext,
        body: CompletionRequest,
        model: str,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str],
    ) -> None:
        super().__init__(body, int(time.time()), model)
        self.id = f"cmpl-{uuid.uuid4().hex}"
        n = body.choices_per_prompt
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._echoed: set[int] = set()
        self._scored = body.logprobs if body.echo else None
        self.jobs = []
        for prompt in prompts:
            limit = output_limit(
                context, self.prompt_field, len(prompt), body.max_tokens, DEFAULT_MAX_TOKENS
            )
            for choice in range(n):
                params = body.sampling(limit, body.logprobs, choice, self._scored)
                self.jobs.append(Job(f"{self.id}-{len(self.jobs)}", prompt, params))
        self._wants_logprobs = body.logprobs is not None
        self._logprobs = [CompletionLogprobs(context.texts, echo) for echo in self._echoes]

    def envelope(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self.envelope() | {
            "choices": [
                {
                    "index": i,
                    "text": self._echoes[i] + choice.text,
                    "logprobs": self._logprobs_of(i, choice.logprobs, first=True),
                    "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
                }
                for i, choice in enumerate(choices)
            ]
        }

    def _logprobs_of(
        self, i: int, entries: Sequence[TokenLogprob], first: bool
    ) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        prompt = self.jobs[i].prompt_token_ids if first and self._scored is not None else None
        return self._logprobs[i].add(entries, prompt)

    def chunks(self, delivery: Delivery) -> list[dict[str, Any]]:
        i, output = delivery.index, delivery.output
        text = output.new_text
        first = i not in self._echoed
        if first:
            self._echoed.add(i)
            text = self._echoes[i] + text
        if not (text or output.new_token_ids or output.finish_reason):
            return []
        choice = {
            "index": i,
            "text": text,
            "logprobs": self._logprobs_of(
                i, (*output.prompt_logprobs, *output.new_logprobs), first
            ),
            "finish_reason": output.finish_reason.value if output.finish_reason else None,
        }
        return [self.envelope() | {"choices": [choice]}]
