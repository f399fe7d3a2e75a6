"""What happens to a request before it is queued: texts become tokens, and what cannot run is refused.

Nothing here needs the device, so that a process without the model can do it for one that has it.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headway.engine.request import SamplingParams
from headway.errors import InvalidInputError


class Intake:
    """The side of an engine that knows its model by name, tokenizer and limits alone."""

    tokenizer: Any  # transformers', or None
    model_config: Any  # transformers', of the text model
    model_name: str
    max_model_len: int  # prompt and output together

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the tokenizer adds around one."""
        return list(self._need_tokenizer("text").encode(text))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """Token ids of a conversation up to where the model answers, by the tokenizer's own template."""
        tokenizer = self._need_tokenizer("messages")
        if not tokenizer.chat_template:
            raise InvalidInputError(
                "messages", "a conversation", "text: the model has no chat template"
            )
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])

    def _need_tokenizer(self, argument: str) -> Any:
        if self.tokenizer is None:
            raise InvalidInputError(
                argument, "text", "token ids: the model has no tokenizer (set tokenizer=)"
            )
        return self.tokenizer

    def check_request(self, prompt: list[int], params: SamplingParams) -> None:
        """Refuse what this model cannot answer.

        Raises:
            InvalidInputError: the prompt is empty, too long, or no list of tokens of the vocabulary; stop
                strings are asked for of a model without a tokenizer.
        """
        self._check_prompt(prompt)
        if params.stop and self.tokenizer is None:
            raise InvalidInputError("stop", params.stop, "none: the model has no tokenizer")

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidInputError("prompt_token_ids", "an empty prompt", "at least one token")
        if len(prompt) >= self.max_model_len:
            raise InvalidInputError(
                "prompt_token_ids",
                f"a prompt of {len(prompt)} tokens",
                f"at most {self.max_model_len - 1}: the limit is {self.max_model_len} tokens, "
                "prompt and output together",
            )
        vocabulary = self.model_config.vocab_size
        with contextlib.suppress(TypeError, OverflowError):
            # At the speed of C: prompts are long, and the device waits for the first.
            numbers = np.frombuffer(array("q", prompt), dtype=np.int64)
            if numbers.min() >= 0 and numbers.max() < vocabulary:
                return
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise InvalidInputError(
                    "prompt_token_ids", repr(token), f"ids 0 to {vocabulary - 1}"
                )
