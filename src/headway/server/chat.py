"""``POST /v1/chat/completions``: messages in, the assistant's turn out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from headway.errors import InvalidInputError
from headway.server.async_engine import Delivery, Job
from headway.server.context import ServerContext
from headway.server.errors import from_invalid_input, invalid
from headway.server.generation import Answer, Choice, check_model, check_text, output_limit
from headway.server.logprobs import chat_logprobs
from headway.server.protocol import ChatCompletionRequest


async def build(context: ServerContext, body: ChatCompletionRequest) -> ChatAnswer:
    """Check the request against the model and lay its messages out as the model was taught."""
    body.check()
    model = check_model(context, body.model)
    messages = body.template_input()
    for i, message in enumerate(messages):
        check_text(f"messages[{i}].content", message["content"])
    prompt = await _lay_out(context, messages)
    return ChatAnswer(context, body, model, prompt)


async def _lay_out(context: ServerContext, messages: list[dict[str, str]]) -> list[int]:
    # Templates refuse conversations that they cannot express (no user turn, two in a row) by raising.
    from jinja2 import TemplateError

    engine = context.engine.engine
    try:
        return await context.engine.tokenize(engine.apply_chat_template, messages)
    except InvalidInputError as error:
        raise from_invalid_input(error, "messages") from None
    except TemplateError as error:
        raise invalid("messages", f"messages: the model's chat template says: {error}") from None


class ChatAnswer(Answer):
    """A chat completion. ``prompt`` is the whole conversation as token ids."""

    prompt_field = "messages"

    def __init__(
        self, context: ServerContext, body: ChatCompletionRequest, model: str, prompt: Sequence[int]
    ) -> None:
        super().__init__(body, int(time.time()), model)
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        limit = output_limit(context, self.prompt_field, len(prompt), body.output_limit, None)
        self.jobs = [
            Job(f"{self.id}-{choice}", prompt, body.sampling(limit, body.num_logprobs, choice))
            for choice in range(body.choices_per_prompt)
        ]
        self._texts = context.texts
        self._wants_logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def envelope(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": chat_logprobs(choice.logprobs, self._texts)
                    if self._wants_logprobs
                    else None,
                    "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
                }
                for i, choice in enumerate(choices)
            ],
        }

    def chunks(self, delivery: Delivery) -> list[dict[str, Any]]:
        """A choice opens with its role, together with its first token, and closes with its reason."""
        i, output = delivery.index, delivery.output
        events = []
        if i not in self._begun and (output.new_token_ids or output.finish_reason):
            self._begun.add(i)
            events.append(self._chunk(i, {"role": "assistant", "content": ""}, None, None))
        if output.new_text or output.new_token_ids:
            logprobs = (
                chat_logprobs(output.new_logprobs, self._texts) if self._wants_logprobs else None
            )
            events.append(self._chunk(i, {"content": output.new_text}, logprobs, None))
        if output.finish_reason is not None:
            events.append(self._chunk(i, {}, None, output.finish_reason.value))
        return events

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope() | {"choices": [choice]}
