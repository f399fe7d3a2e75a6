"""LLM: the built-in engine. Requests go in, tokens come out, one step at a time."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from headway.engine import kv_cache, loader, sampler
from headway.engine.acceleration import accelerate
from headway.engine.attention import PagedAttention, probe_layers
from headway.engine.config import EngineConfig
from headway.engine.detokenizer import Decode, Detokenizer
from headway.engine.kv_cache import KVCache, PagePool
from headway.engine.prefix_cache import PrefixCache
from headway.engine.request import (
    Completion,
    EngineStats,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from headway.engine.runner import ModelRunner
from headway.engine.scheduler import Chunk, Scheduler
from headway.engine.scheduler import Sequence as TokenSequence
from headway.errors import InvalidInputError
from headway.serving.flash import FlashAttentionBackend

logger = logging.getLogger(__name__)

#: Share of the free memory that the KV cache takes unless told otherwise.
MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}


@dataclass
class Request:
    """A request inside the engine."""

    sequence: TokenSequence
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer | None
    stop_token_ids: frozenset[int]


class LLM:
    """An engine for one model.

    Not thread-safe: one thread calls it. ``add_request`` and ``abort`` may come between any two steps.

    Args:
        config: what to load and how to run it.
        progress: whether to draw progress bars while loading.

    Raises:
        InvalidInputError, UnsupportedError: the model cannot be found, or not be run this way.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        self.config = config
        loaded = loader.load(config, progress=progress)
        self.tokenizer = loaded.tokenizer
        self.model_config = loaded.config
        self.model_name = loaded.name
        self._eos_token_ids = loaded.eos_token_ids
        self.model = loaded.model
        self.acceleration = accelerate(self.model, level=config.acceleration)
        self.backend = FlashAttentionBackend(config.attention_backend, config.flash_attn_version)
        probe = probe_layers(self.model, loaded.config)
        (self.dtype,) = probe.dtypes
        self.device = next(self.model.parameters()).device
        num_pages, self.max_model_len = self._cache_size(probe.shapes(), loaded.max_model_len)
        self._kv = KVCache(probe.shapes(), num_pages, config.page_size, self.dtype, self.device)
        self._prefix_cache = PrefixCache(PagePool(num_pages), enabled=config.enable_prefix_cache)
        self._scheduler = Scheduler(
            self._prefix_cache,
            page_size=config.page_size,
            max_model_len=self.max_model_len,
            chunked_prefill_size=config.chunked_prefill_size,
            max_running_requests=config.max_running_requests,
        )
        self._runner = ModelRunner(
            self.model,
            PagedAttention(self.backend, probe.layers, self._kv),
            self.backend,
            max_sequences=config.max_running_requests,
            max_pages=kv_cache.pages_for(self.max_model_len, config.page_size),
        )
        self._requests: dict[str, Request] = {}
        self._seeds = random.Random(config.seed)
        self._prompt_tokens = 0
        self._output_tokens = 0

    # --- text and tokens --------------------------------------------------------------------------

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

    # --- requests ---------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None:
        """Queue a request.

        Raises:
            InvalidInputError: the id is in use; the prompt is empty, too long, or no list of tokens of
                the vocabulary.
        """
        if request_id in self._requests:
            raise InvalidInputError(
                "request_id", request_id, "an id that no unfinished request has"
            )
        prompt = list(prompt_token_ids)
        self._check_prompt(prompt)
        tokenizer, params = self.tokenizer, sampling_params
        detokenizer = None
        if tokenizer is not None:
            detokenizer = Detokenizer(
                _decoder(tokenizer), prompt, params.stop, params.include_stop_str_in_output
            )
        elif params.stop:
            raise InvalidInputError("stop", params.stop, "none: the model has no tokenizer")
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        self._requests[request_id] = Request(
            sequence=TokenSequence(request_id, prompt, len(prompt)),
            params=params,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            detokenizer=detokenizer,
            stop_token_ids=eos | frozenset(params.stop_token_ids),
        )
        self._scheduler.add(self._requests[request_id].sequence)
        self._prompt_tokens += len(prompt)

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
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise InvalidInputError(
                    "prompt_token_ids", repr(token), f"ids 0 to {vocabulary - 1}"
                )

    def has_unfinished(self) -> bool:
        """Whether another ``step`` would do anything."""
        return bool(self._requests)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its pages come back. None where no such request is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._finish(request, FinishReason.ABORT)

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what it added, one output for each request it touched.

        A failure in one request ends that request with FinishReason.ERROR. A failure of the model call
        ends the requests that were in it.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        try:
            logits = self._runner.run(chunks)
            sampled = self._sample(chunks, logits)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(chunks))
            return [self._fail(chunk.sequence.request_id, error) for chunk in chunks]
        outputs = []
        for chunk in chunks:
            samples = chunk.samples
            self._scheduler.advance(chunk)
            if samples:
                request = self._requests[chunk.sequence.request_id]
                try:
                    outputs.append(self._take(request, sampled[request.sequence.request_id]))
                except Exception as error:
                    outputs.append(self._fail(request.sequence.request_id, error))
        return outputs

    def _sample(self, chunks: Sequence[Chunk], logits: Tensor) -> dict[str, sampler.Sampled]:
        """One token for each sequence that samples, by request id."""
        ids = [chunk.sequence.request_id for chunk in chunks if chunk.samples]
        if not ids:
            return {}
        requests = [self._requests[name] for name in ids]
        rows = [sampler.Row(r.params, r.seed, r.sequence.num_output_tokens) for r in requests]
        try:
            return dict(zip(ids, sampler.sample(logits, rows), strict=True))
        except Exception:
            # One row's parameters broke the batch: row by row, the others still get their tokens.
            return {name: _sample_alone(logits[i], rows[i]) for i, name in enumerate(ids)}

    def _take(self, request: Request, sampled: sampler.Sampled) -> RequestOutput:
        """Add a sampled token to its request."""
        sequence, params = request.sequence, request.params
        if sampled.error is not None:
            return self._finish(request, FinishReason.ERROR, error=sampled.error)
        token = sampled.token_id
        sequence.tokens.append(token)
        self._output_tokens += 1
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        stopped = token in request.stop_token_ids
        text = ""
        if request.detokenizer is not None and (not stopped or params.include_stop_str_in_output):
            piece = request.detokenizer.add(token)
            text, stopped = piece.text, stopped or piece.stop is not None
        reason = None
        if stopped:
            reason = FinishReason.STOP
        elif (
            sequence.num_output_tokens >= params.max_tokens
            or len(sequence.tokens) >= self.max_model_len
        ):
            reason = FinishReason.LENGTH
        if reason is not None:
            return self._finish(request, reason, text, (token,), logprobs)
        return self._output(request, text, (token,), logprobs)

    def _fail(self, request_id: str, error: Exception) -> RequestOutput:
        message = f"{type(error).__name__}: {error}"
        return self._finish(self._requests[request_id], FinishReason.ERROR, error=message)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> RequestOutput:
        """Take a request out of the engine, with the text still withheld."""
        del self._requests[request.sequence.request_id]
        self._scheduler.remove(request.sequence)
        if request.detokenizer is not None and error is None:
            rest = request.detokenizer.finish()
            text += rest.text
            if rest.stop is not None and reason is FinishReason.LENGTH:
                reason = FinishReason.STOP
        return self._output(request, text, tokens, logprobs, reason, error)

    def _output(
        self,
        request: Request,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        sequence = request.sequence
        return RequestOutput(
            request_id=sequence.request_id,
            new_text=text,
            new_token_ids=tokens,
            new_logprobs=logprobs,
            finish_reason=reason,
            error=error,
            prompt_tokens=sequence.num_prompt_tokens,
            output_tokens=sequence.num_output_tokens,
            cached_tokens=sequence.cached_tokens or 0,
        )

    # --- whole completions ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete prompts (texts or token ids) together; results in the order of the prompts.

        Raises:
            InvalidInputError: a prompt is wrong (nothing is computed then), or there are requests in the
                engine already.
        """
        if self._requests:
            raise InvalidInputError(
                "generate", f"{len(self._requests)} unfinished requests", "none"
            )
        params = sampling_params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidInputError(
                "sampling_params", f"{len(each)} of them", f"one, or {len(prompts)}"
            )
        tokens = [self.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        try:
            for i, (prompt, one) in enumerate(zip(tokens, each, strict=True)):
                self.add_request(str(i), prompt, one)
        except InvalidInputError:
            for name in list(self._requests):
                self.abort(name)
            raise
        pieces: dict[str, list[RequestOutput]] = {str(i): [] for i in range(len(prompts))}
        with _completion_bar(len(prompts), show=progress) as advance:
            while self.has_unfinished():
                for output in self.step():
                    pieces[output.request_id].append(output)
                    if output.finish_reason is not None:
                        advance()
        return [_completion(tokens[int(name)], parts) for name, parts in pieces.items()]

    # --- state ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since the start, and what is going on now."""
        scheduler, cache = self._scheduler, self._prefix_cache
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=cache.num_used,
            pages_total=cache.pool.num_pages,
            prefix_cache_hit_tokens=scheduler.hit_tokens,
            prefix_cache_query_tokens=scheduler.query_tokens,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
        )

    def _cache_size(self, shapes: Sequence[kv_cache.KVShape], limit: int) -> tuple[int, int]:
        """Number of pages, and the longest sequence they allow (at most ``limit``)."""
        config = self.config
        size = config.page_size
        if config.kv_cache_tokens is not None:
            pages = config.kv_cache_tokens // size
        else:
            budget = config.kv_cache_memory_bytes or _free_bytes(self.device)
            pages = budget // (size * kv_cache.bytes_per_token(shapes, self.dtype))
            if config.kv_cache_memory_bytes is None:
                # No more than everything that could run at once would fill.
                pages = min(pages, config.max_running_requests * kv_cache.pages_for(limit, size))
        if pages < 1:
            raise InvalidInputError("kv_cache_tokens", f"{pages} pages", f"a page of {size} tokens")
        if pages * size >= limit:
            return pages, limit
        if config.max_model_len is not None:
            raise InvalidInputError(
                "max_model_len",
                config.max_model_len,
                f"at most {pages * size}, the tokens the KV cache holds",
            )
        return pages, pages * size


def _free_bytes(device: torch.device) -> int:
    """Memory the KV cache takes by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE["cuda"])
    return int(psutil.virtual_memory().available * MEMORY_SHARE["cpu"])


def _decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out, nothing tidied up."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _sample_alone(logits: Tensor, row: sampler.Row) -> sampler.Sampled:
    """One row by itself; its failure is its own."""
    try:
        return sampler.sample(logits[None], [row])[0]
    except Exception as error:
        return sampler.Sampled(error=f"{type(error).__name__}: {error}")


def _completion(prompt: Sequence[int], pieces: Sequence[RequestOutput]) -> Completion:
    """The pieces of a finished request, joined."""
    last = pieces[-1]
    assert last.finish_reason is not None
    return Completion(
        request_id=last.request_id,
        prompt_token_ids=tuple(prompt),
        text="".join(piece.new_text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.new_token_ids),
        finish_reason=last.finish_reason,
        logprobs=tuple(one for piece in pieces for one in piece.new_logprobs),
        cached_tokens=last.cached_tokens,
    )


@contextlib.contextmanager
def _completion_bar(total: int, *, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over finished prompts; yields what to call at each."""
    from rich.progress import Progress

    with Progress(disable=not show) as bars:
        task = bars.add_task("Completing", total=total)
        yield lambda: bars.advance(task)
