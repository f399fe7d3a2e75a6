"""A small deterministic engine: it answers with its prompt, over and over, and accounts for its pages.

One token is one byte. A step computes one token for every running request, after taking in a whole prompt;
a request runs once all the pages it may need are free. Prompts are remembered page by page, as a prefix
cache does. ``FAIL`` in a prompt makes the step that reaches it raise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from headway.engine.request import (
    EngineStats,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from headway.errors import InvalidInputError

PAGE_SIZE = 4
FAIL = b"!fail"
EOS = 256


class ByteTokenizer:
    all_special_ids = (EOS,)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        if token_id == EOS:
            return "<eos>"
        return f"<0x{token_id:02X}>" if token_id < EOS else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def _text_bytes(tokens: Sequence[int]) -> bytes:
    return bytes(token for token in tokens if token != EOS)


@dataclass
class _Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    pages: int
    cached: int = 0
    output: list[int] = field(default_factory=list)
    text_sent: int = 0


class EchoEngine:
    tokenizer = ByteTokenizer()
    model_name = "echo"
    model_config = SimpleNamespace(vocab_size=EOS + 1)

    def __init__(
        self, *, num_pages: int = 4096, max_model_len: int = 1024, step_seconds: float = 0.0
    ) -> None:
        self.max_model_len = max_model_len
        self.num_pages = num_pages
        self.step_seconds = step_seconds
        self.broken = False
        self.aborted: list[str] = []
        self._waiting: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        self._seen: set[bytes] = set()
        self._counts = {"hit": 0, "query": 0, "prompt": 0, "output": 0}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None:
        total = len(prompt_token_ids) + sampling_params.max_tokens
        pages = -(-total // PAGE_SIZE)
        if pages > self.num_pages:
            raise InvalidInputError(
                "prompt_token_ids", f"{total} tokens", f"at most {self.num_pages * PAGE_SIZE}"
            )
        self._waiting.append(_Running(request_id, list(prompt_token_ids), sampling_params, pages))

    def abort(self, request_id: str) -> None:
        if self.broken:
            raise RuntimeError("this engine is broken")
        self.aborted.append(request_id)
        self._running.pop(request_id, None)
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def pages_used(self) -> int:
        return sum(request.pages for request in self._running.values())

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self.pages_used,
            pages_total=self.num_pages,
            prefix_cache_hit_tokens=self._counts["hit"],
            prefix_cache_query_tokens=self._counts["query"],
            preemptions=0,
            prompt_tokens=self._counts["prompt"],
            output_tokens=self._counts["output"],
        )

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        while self._waiting and self.pages_used + self._waiting[0].pages <= self.num_pages:
            request = self._waiting.popleft()
            self._running[request.request_id] = request
            self._look_up(request)
        if any(FAIL in _text_bytes(r.prompt) for r in self._running.values()):
            raise RuntimeError("the stand-in was told to fail")
        outputs = [self._advance(request) for request in list(self._running.values())]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        return outputs

    def _look_up(self, request: _Running) -> None:
        raw = _text_bytes(request.prompt)
        heads = [raw[:end] for end in range(PAGE_SIZE, len(raw), PAGE_SIZE)]
        request.cached = PAGE_SIZE * sum(head in self._seen for head in heads)
        self._seen.update(heads)
        self._counts["hit"] += request.cached
        self._counts["query"] += len(raw)
        self._counts["prompt"] += len(raw)

    def _advance(self, r: _Running) -> RequestOutput:
        # A seed turns the echo by so many tokens: different choices of one request differ.
        token = r.prompt[(len(r.output) + (r.params.seed or 0)) % len(r.prompt)]
        r.output.append(token)
        self._counts["output"] += 1
        text, reason = self._text(r)
        if (token == EOS and not r.params.ignore_eos) or token in r.params.stop_token_ids:
            reason = FinishReason.STOP
        elif reason is None and len(r.output) == r.params.max_tokens:
            reason = FinishReason.LENGTH
        new = text[r.text_sent :]
        r.text_sent = max(r.text_sent, len(text))
        return RequestOutput(
            request_id=r.request_id,
            new_text=new,
            new_token_ids=(token,),
            new_logprobs=self._logprobs(token, r.params.logprobs),
            prompt_logprobs=self._prompt_logprobs(r),
            finish_reason=reason,
            prompt_tokens=len(r.prompt),
            output_tokens=len(r.output),
            cached_tokens=r.cached,
        )

    def _text(self, r: _Running) -> tuple[str, FinishReason | None]:
        """The text that is certain: whole characters, and nothing that a stop string may still cut off."""
        raw = _text_bytes(r.output)
        ended = len(r.output) == r.params.max_tokens
        text = raw.decode(errors="replace") if ended else raw.decode(errors="ignore")
        for stop in r.params.stop:
            if (at := text.find(stop)) >= 0:
                end = at + len(stop) if r.params.include_stop_str_in_output else at
                return text[:end], FinishReason.STOP
        held = 0 if ended else max((len(stop) - 1 for stop in r.params.stop), default=0)
        return text[: max(r.text_sent, len(text) - held)], None

    def _prompt_logprobs(self, r: _Running) -> tuple[TokenLogprob, ...]:
        wanted = r.params.prompt_logprobs
        if wanted is None or len(r.output) > 1:
            return ()
        return tuple(one for token in r.prompt[1:] for one in self._logprobs(token, wanted))

    def _logprobs(self, token: int, wanted: int | None) -> tuple[TokenLogprob, ...]:
        if wanted is None:
            return ()
        top = tuple(((token + i) % EOS, -0.5 - i) for i in range(wanted))
        return (TokenLogprob(token, -0.5, top),)
