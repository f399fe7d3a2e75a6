"""LLM: the built-in engine. Requests go in, tokens come out, one step at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch
from torch import Tensor

from headway import devices
from headway.engine import early, kv_cache, loader, parallel, sampler
from headway.engine.acceleration import Acceleration, accelerate
from headway.engine.attention import PagedAttention, probe_layers
from headway.engine.calibration import kv_scales
from headway.engine.config import EngineConfig
from headway.engine.detokenizer import Decode, Detokenizer
from headway.engine.graphs import CudaRecorder, DecodeGraphs, Record, batch_sizes
from headway.engine.intake import Intake
from headway.engine.kv_cache import KVCache, PagePool
from headway.engine.latent import keep_latent
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
from headway.engine.scheduler import PENDING, Chunk, Scheduler
from headway.engine.scheduler import Sequence as TokenSequence
from headway.engine.speculation import NgramIndex, accepted
from headway.engine.transfer import upload
from headway.errors import InvalidInputError, UnsupportedError
from headway.serving.base import AttentionBackend, AttentionLayer, GraphLimits
from headway.serving.flash import FlashAttentionBackend
from headway.serving.mla import MLABackend, MLALayer

if TYPE_CHECKING:
    from headway.engine.fusion import Fusion
    from headway.engine.pieces import Pieces

logger = logging.getLogger(__name__)

#: Prompt tokens of a step whose logits may be asked for, however little memory is free.
LEAST_READ = 512


@dataclass(eq=False)
class Request:
    """A request inside the engine."""

    sequence: TokenSequence
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer | None
    stop_token_ids: frozenset[int]
    guesses: NgramIndex | None = None
    prompt_scores: dict[int, TokenLogprob] = field(default_factory=dict)  # by place in the prompt


@dataclass(frozen=True)
class Drawing:
    """A request that draws in a step: one token, and one more for every guess that turns out right."""

    request: Request
    drafts: tuple[int, ...]


@dataclass(frozen=True)
class Scoring:
    """A stretch of a request's prompt, from ``first`` on, whose tokens' probabilities are wanted."""

    request: Request
    first: int
    scores: sampler.PromptScores


@dataclass(frozen=True)
class Step:
    """A step that is launched: who draws in it, and the tokens, once they are known."""

    drawings: list[Drawing]
    drawn: Draws
    scorings: list[Scoring]


@dataclass(frozen=True)
class Known:
    """A token that a request has got: its ``output_tokens``-th, and why it ends there, if it does."""

    sampled: sampler.Sampled
    output_tokens: int
    reason: FinishReason | None


@dataclass(frozen=True)
class Settled:
    """The tokens that a step gave a request, in order; their text is not told yet."""

    request: Request
    known: list[Known]


class Draws(Protocol):
    """Tokens that are drawn, or will be."""

    tokens: Tensor

    def collect(self) -> list[sampler.Sampled]: ...


class DrawsAlone:
    """Each row drawn by itself, so that one that cannot be leaves the others their tokens."""

    def __init__(self, logits: Tensor, rows: Sequence[sampler.Row]) -> None:
        self._sampled = [_sample_alone(one, row) for one, row in zip(logits, rows, strict=True)]
        ids = [max(one.token_id, 0) for one in self._sampled]
        self.tokens = torch.tensor(ids, device=logits.device)

    def collect(self) -> list[sampler.Sampled]:
        return self._sampled


class LLM(Intake):
    """An engine for one model.

    Not thread-safe: one thread calls it. ``add_request`` and ``abort`` may come between any two steps.

    Args:
        config: what to load and how to run it.
        progress: whether to draw progress bars while loading.

    Raises:
        InvalidInputError, UnsupportedError: the model cannot be found, or not be run this way.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        if not isinstance(config, EngineConfig):
            raise InvalidInputError("config", config, "EngineConfig(model=..)")
        early.insist(config)
        loaded = loader.load(config, progress=progress)
        self.device = next(loaded.model.parameters()).device
        self.config = config = config.resolved(self.device.type)
        assert config.chunked_prefill_size is not None
        assert config.max_running_requests is not None
        self.tokenizer = loaded.tokenizer
        self.model_config = loaded.config
        self.model_name = loaded.name
        self._eos_token_ids = loaded.eos_token_ids
        self.model = loaded.model
        keep_latent(self.model)
        # Twice: what cannot run is said before anything is exchanged; what is exchanged is what will run.
        probe_layers(self.model, loaded.config)
        self.acceleration = self._accelerate(loaded.max_model_len)
        self.probe = probe = probe_layers(self.model, loaded.config)
        (self.dtype,) = probe.dtypes
        layers = probe.layers
        self.backend = backend_for(layers.values(), config)
        if config.kv_cache_dtype == "fp8_e4m3":
            layers = self._in_float8(layers)
        num_pages, self.max_model_len = self._cache_size(probe.shapes(), loaded.max_model_len)
        self._kv = self._allocated(probe.shapes(), num_pages)
        self._prefix_cache = PrefixCache(
            PagePool(num_pages), enabled=not config.disable_prefix_cache
        )
        self._scheduler = Scheduler(
            self._prefix_cache,
            page_size=config.page_size,
            max_model_len=self.max_model_len,
            chunked_prefill_size=config.chunked_prefill_size,
            max_running_requests=config.max_running_requests,
            propose=self._propose if config.speculative == "ngram" else None,
            uniform_drafts=self._uniform_drafts(),
        )
        self._layers = layers
        self._attention = PagedAttention(self.backend, layers, self._kv)
        self._runner = ModelRunner(
            self.model,
            self._attention,
            self.backend,
            max_sequences=config.max_running_requests,
            max_pages=kv_cache.pages_for(self.max_model_len, config.page_size),
            graphs=self._capture(num_pages, config.max_running_requests, progress=progress),
            pieces=self._capture_pieces(progress=progress),
        )
        self._scheduler.most_read = self._most_read()
        self._in_flight: Step | None = None
        self._requests: dict[str, Request] = {}
        self._seeds = random.Random(config.seed)
        self._prompt_tokens = 0
        self._output_tokens = 0

    def _accelerate(self, longest: int) -> Acceleration | Fusion:
        """Exchange parts of the model for faster ones, as its device wants it; sequences have up to
        ``longest`` tokens."""
        if self.config.tensor_parallel_size > 1:  # its modules are those that talk to each other
            return Acceleration(left_alone={"": "tensor parallel keeps the model's own modules"})
        if self.device.type == "cuda" and self.config.acceleration == "auto":
            from headway.engine.fusion import fuse

            return fuse(self.model, longest)
        return accelerate(self.model, level=self.config.acceleration)

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs."""
        return bool(self._runner.graphs)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the KV cache."""
        return torch.float8_e4m3fn if self.config.kv_cache_dtype == "fp8_e4m3" else self.dtype

    def _in_float8(self, layers: Mapping[int, AttentionLayer]) -> dict[int, AttentionLayer]:
        """The layers with the scales of their float8 caches."""
        folder, size = Path(self.config.model), self.model_config.vocab_size
        scales = kv_scales(self.model, layers, folder, size)
        found: dict[int, AttentionLayer] = {}
        for index, layer in layers.items():
            k, v = scales[index]
            if isinstance(layer, MLALayer):  # what is stored once has one scale
                k = v = torch.maximum(k, v)
            found[index] = dataclasses.replace(layer, k_descale=k, v_descale=v)
        return found

    # --- requests ---------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None:
        """Queue a request.

        Raises:
            InvalidInputError: the id is in use; see also :meth:`.Intake.check_request`.
        """
        if request_id in self._requests:
            raise InvalidInputError(
                "request_id", request_id, "an id that no unfinished request has"
            )
        prompt = list(prompt_token_ids)
        self.check_request(prompt, sampling_params)
        tokenizer, params = self.tokenizer, sampling_params
        detokenizer = None
        if tokenizer is not None:
            detokenizer = Detokenizer(
                _decoder(tokenizer), prompt, params.stop, params.include_stop_str_in_output
            )
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        self._requests[request_id] = Request(
            sequence=TokenSequence(
                request_id,
                prompt,
                len(prompt),
                limit=min(len(prompt) + params.max_tokens, self.max_model_len),
                reads_prompt=params.prompt_logprobs is not None,
            ),
            params=params,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            detokenizer=detokenizer,
            stop_token_ids=eos | frozenset(params.stop_token_ids),
            guesses=NgramIndex() if self._speculates(params) else None,
        )
        self._scheduler.add(self._requests[request_id].sequence)
        self._prompt_tokens += len(prompt)

    def _speculates(self, params: SamplingParams) -> bool:
        return self.config.speculative == "ngram" and params.temperature == 0

    def _uniform_drafts(self) -> int:
        """How many guesses every sequence of a step has, right or not, so that a graph covers it."""
        return self.config.most_guesses if self.config.cuda_graphs else 0

    def _propose(self, sequence: TokenSequence) -> tuple[int, ...]:
        """Guesses at what a sequence says next."""
        request = self._requests[sequence.request_id]
        if request.guesses is None:
            return ()
        return request.guesses.propose(sequence.tokens, self.config.num_draft_tokens)

    def has_unfinished(self) -> bool:
        """Whether another ``step`` would do anything."""
        return bool(self._requests)

    def unfinished(self) -> tuple[str, ...]:
        """Ids of the requests that have not ended."""
        return tuple(self._requests)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its pages come back. None where no such request is unfinished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._finish(request, FinishReason.ABORT)

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what it added, one output for each request it touched.

        With overlap the step is launched, and what the one before added is returned: the device computes
        while the host prepares. Guesses are made from tokens that are known, so with them only texts are
        left for after the launch.

        A failure in one request ends that request with FinishReason.ERROR. A failure of the model call
        ends the requests that were in it.
        """
        settled: list[Settled] = []
        # Of this thread, which may be another than the one that made the engine.
        with devices.use(self.device):
            if self._in_flight is not None and self.config.speculative != "off":
                settled, self._in_flight = self._settle(self._in_flight), None
            outputs, launched = self._start()
            if self.config.overlap:
                launched, self._in_flight = self._in_flight, launched
            if launched is not None:
                settled += self._settle(launched)
        return outputs + self._tell(settled)

    def _start(self) -> tuple[list[RequestOutput], Step | None]:
        """Launch the next step, if there is one; outputs are of requests that it failed with."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return [], None
        try:
            return [], self._launch(chunks)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(chunks))
            return [self._fail(chunk.sequence.request_id, error) for chunk in chunks], None

    def _launch(self, chunks: Sequence[Chunk]) -> Step:
        """Start a step; its sequences go on as if its tokens were known."""
        logits = self._runner.run(chunks)
        rows: list[int] = []
        drawings: list[Drawing] = []
        scorings: list[Scoring] = []
        first = 0
        for chunk in chunks:
            request = self._requests[chunk.sequence.request_id]
            last = first + chunk.num_rows
            if chunk.samples:
                rows += range(last - 1 - len(chunk.drafts), last)
                drawings.append(Drawing(request, chunk.drafts))
            if chunk.sequence.reads_prompt:
                scorings += self._score(request, logits[first:last])
            first = last
        drawn = self._draw(drawings, self._rows_of(logits, rows))
        if self.config.overlap:
            self._runner.drew([one.request.sequence for one in drawings], drawn.tokens)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        for one in drawings:
            one.request.sequence.tokens.append(PENDING)
            one.request.sequence.num_pending += 1
        return Step(drawings, drawn, scorings)

    def _rows_of(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Some rows of the logits; usually they are all."""
        if rows == list(range(logits.shape[0])):
            return logits
        return logits[upload(rows, torch.int64, self.device)]

    def _score(self, request: Request, logits: Tensor) -> Iterator[Scoring]:
        """The probabilities of the prompt's tokens behind those of a chunk that is running."""
        sequence, start = request.sequence, request.sequence.num_computed
        tokens = sequence.tokens[start + 1 : start + 1 + logits.shape[0]]
        tokens = tokens[: max(0, sequence.num_prompt_tokens - start - 1)]
        if tokens:
            most = request.params.prompt_logprobs or 0
            scores = sampler.PromptScores(logits[: len(tokens)], tokens, most)
            yield Scoring(request, start + 1, scores)

    def _draw(self, drawings: Sequence[Drawing], logits: Tensor) -> Draws:
        """One token for each row of logits."""
        rows = []
        for one in drawings:
            sequence = one.request.sequence
            drawn = len(sequence.tokens) - sequence.num_prompt_tokens
            for index in range(drawn, drawn + 1 + len(one.drafts)):
                rows.append(sampler.Row(one.request.params, one.request.seed, index))
        settle = parallel.share if self.config.tensor_parallel_size > 1 else None
        try:
            return sampler.draw(logits, rows, settle)
        except Exception:
            logger.exception("drawing %d tokens together failed", len(rows))
            return DrawsAlone(logits, rows)

    def _settle(self, step: Step) -> list[Settled]:
        """Wait for a step's tokens and let the requests that are still there have them."""
        for scoring in step.scorings:
            entries = scoring.scores.collect()
            scoring.request.prompt_scores.update(enumerate(entries, scoring.first))
        settled = []
        sampled = iter(step.drawn.collect())
        for one in step.drawings:
            mine = [next(sampled) for _ in range(1 + len(one.drafts))]
            if self._is_here(one.request):  # not aborted, nor ended by the step before
                settled.append(Settled(one.request, self._known(one, mine)))
        return settled

    def _is_here(self, request: Request) -> bool:
        return self._requests.get(request.sequence.request_id) is request

    def _known(self, drawing: Drawing, sampled: Sequence[sampler.Sampled]) -> list[Known]:
        """Enter a request's token, and those that its guesses were right about, up to its end."""
        request, sequence = drawing.request, drawing.request.sequence
        right = accepted(drawing.drafts, [one.token_id for one in sampled])
        known: list[Known] = []
        for one in sampled[: 1 + right]:
            if known:
                # The guess before this token was right: it is in the cache.
                sequence.num_computed += 1
                sequence.tokens.append(PENDING)
                sequence.num_pending += 1
            if one.error is None:
                sequence.tokens[-sequence.num_pending] = one.token_id
                sequence.num_pending -= 1
                self._scheduler.remember(sequence)
                self._output_tokens += 1
            reason = self._ends(request, one)
            known.append(Known(one, sequence.num_output_tokens, reason))
            if reason is not None:
                sequence.is_over = True
                break
        return known

    def _ends(self, request: Request, sampled: sampler.Sampled) -> FinishReason | None:
        """Whether a request ends with its latest token, whatever the text says."""
        if sampled.error is not None:
            return FinishReason.ERROR
        if sampled.token_id in request.stop_token_ids:
            return FinishReason.STOP
        sequence = request.sequence
        if sequence.num_known >= (sequence.limit or self.max_model_len):
            return FinishReason.LENGTH
        return None

    def _tell(self, settled: Sequence[Settled]) -> list[RequestOutput]:
        """What the requests say with their new tokens."""
        outputs = []
        for one in settled:
            if not self._is_here(one.request):
                continue  # it failed with the step that was launched since
            try:
                outputs.append(self._tell_all(one))
            except Exception as error:
                outputs.append(self._fail(one.request.sequence.request_id, error))
        return outputs

    def _tell_all(self, settled: Settled) -> RequestOutput:
        outputs = []
        for known in settled.known:
            outputs.append(self._tell_one(settled.request, known))
            if outputs[-1].finish_reason is not None:
                break
        return outputs[0] if len(outputs) == 1 else _joined(outputs)

    def _tell_one(self, request: Request, known: Known) -> RequestOutput:
        """The output for one token; its text may end the request."""
        sampled, reason, count = known.sampled, known.reason, known.output_tokens
        if sampled.error is not None:
            return self._finish(request, FinishReason.ERROR, error=sampled.error)
        token = sampled.token_id
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        stopped = reason is FinishReason.STOP
        text = ""
        if request.detokenizer is not None and (
            not stopped or request.params.include_stop_str_in_output
        ):
            piece = request.detokenizer.add(token)
            text = piece.text
            reason = FinishReason.STOP if piece.stop is not None else reason
        if reason is not None:
            return self._finish(request, reason, text, (token,), logprobs, output_tokens=count)
        return self._output(request, text, (token,), logprobs, output_tokens=count)

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
        output_tokens: int | None = None,
    ) -> RequestOutput:
        """Take a request out of the engine, with the text still withheld."""
        del self._requests[request.sequence.request_id]
        self._scheduler.remove(request.sequence)
        if request.detokenizer is not None and error is None:
            rest = request.detokenizer.finish()
            text += rest.text
            if rest.stop is not None and reason is FinishReason.LENGTH:
                reason = FinishReason.STOP
        return self._output(request, text, tokens, logprobs, reason, error, output_tokens)

    def _output(
        self,
        request: Request,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None = None,
        error: str | None = None,
        output_tokens: int | None = None,
    ) -> RequestOutput:
        """``output_tokens`` are counted with the last of ``tokens``; default: all that are known."""
        sequence = request.sequence
        count = sequence.num_output_tokens if output_tokens is None else output_tokens
        return RequestOutput(
            request_id=sequence.request_id,
            new_text=text,
            new_token_ids=tokens,
            new_logprobs=logprobs,
            finish_reason=reason,
            error=error,
            prompt_tokens=sequence.num_prompt_tokens,
            output_tokens=count,
            cached_tokens=sequence.cached_tokens or 0,
            prompt_logprobs=self._prompt_logprobs(request) if tokens and count == 1 else (),
        )

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprob, ...]:
        """The prompt's entries."""
        if request.params.prompt_logprobs is None:
            return ()
        return tuple(entry for _, entry in sorted(request.prompt_scores.items()))

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
        if isinstance(prompts, str):  # a sequence too, of letters
            raise InvalidInputError("prompts", "one text", "a list of texts or of lists of tokens")
        if self._requests:
            raise InvalidInputError(
                "generate", f"{len(self._requests)} unfinished requests", "none"
            )
        params = SamplingParams() if sampling_params is None else sampling_params
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
        with _bar("Completing", len(prompts), show=progress) as advance:
            while self.has_unfinished():
                for output in self.step():
                    pieces[output.request_id].append(output)
                    if output.finish_reason is not None:
                        advance()
        return [_completion(tokens[int(name)], parts) for name, parts in pieces.items()]

    # --- state ------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forget what was computed: the prefix cache and all counters.

        Raises:
            InvalidInputError: there are unfinished requests.
        """
        if self._requests:
            raise InvalidInputError("forget", f"{len(self._requests)} unfinished requests", "none")
        self._prefix_cache.clear()
        self._scheduler.forget()
        self._prompt_tokens = self._output_tokens = 0

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

    def _capture(
        self, padding_page: int, most: int, *, progress: bool = False
    ) -> list[DecodeGraphs]:
        """Decode steps as CUDA graphs, with and without guesses; none where they are off, or the model
        cannot be captured."""
        if not self.config.cuda_graphs:
            return []
        record, sizes = CudaRecorder(self.device), batch_sizes(most)
        captured = []
        for tokens in sorted({1, 1 + self._scheduler.uniform_drafts}):
            title = "Capturing decode steps" if tokens == 1 else "Capturing checks of guesses"
            try:
                with _bar(title, len(sizes), show=progress) as advance:
                    graphs = self.graphs_of(tokens, padding_page, sizes, record, advance)
            except Exception as error:  # whatever a model does that cannot be captured
                what = "decode runs" if tokens == 1 else "guesses are checked"
                message = f"{type(error).__name__}: {error}"
                logger.warning("%s without CUDA graphs: %s", what, message)
                self._scheduler.uniform_drafts = 0
                break
            captured.append(graphs)
        return captured

    def _capture_pieces(self, *, progress: bool = False) -> Pieces | None:
        """What lies between the attention calls of plain layers, for steps that are not decode alone."""
        config = self.config
        if not config.cuda_graphs or not getattr(self.acceleration, "layers", 0):
            return None
        from headway.engine.pieces import pieces_of, plain_layers, row_counts

        layer, most = plain_layers(self.model)[0], self._most_tokens(self.max_model_len)
        counts = row_counts(most, layer.row_bytes, _free_bytes(self.device))
        try:
            with _bar("Capturing pieces of prefill", len(counts), show=progress) as advance:
                return pieces_of(self.model, counts, CudaRecorder(self.device), advance)
        except Exception as error:  # whatever a model does that cannot be captured
            logger.warning("prefill runs without CUDA graphs: %s: %s", type(error).__name__, error)
            return None

    def graphs_of(
        self,
        tokens_per_sequence: int,
        padding_page: int,
        sizes: Sequence[int],
        record: Record,
        advance: Callable[[], None] = lambda: None,
    ) -> DecodeGraphs:
        """Captured steps in which every sequence has so many new tokens; ``advance`` after each size."""
        limits = GraphLimits(
            max_batch_size=sizes[-1],
            max_pages=kv_cache.pages_for(self.max_model_len, self.config.page_size),
            max_seqlen_k=self.max_model_len,
            padding_page=padding_page,
            device=self.device,
            tokens_per_sequence=tokens_per_sequence,
        )
        backend, attention = self.backend, self._attention
        if tokens_per_sequence > 1:  # a backend holds what the captured steps of one kind read
            backend = backend_for(self._layers.values(), self.config)
            attention = PagedAttention(backend, self._layers, self._kv)

        def forward(ids: Tensor, positions: Tensor) -> Tensor:
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, headway=attention
            ).logits[0]
            return logits

        graphs = DecodeGraphs(forward, backend, limits, sizes, record)
        graphs.capture(advance)
        return graphs

    def _allocated(self, shapes: Sequence[kv_cache.KVShape], num_pages: int) -> KVCache:
        """The cache; one page more than are given out: what rows of padding write goes there."""
        size = self.config.page_size
        try:
            return KVCache(shapes, num_pages + 1, size, self.kv_dtype, self.device)
        except torch.OutOfMemoryError as error:
            needed = (num_pages + 1) * size * kv_cache.bytes_per_token(shapes, self.kv_dtype)
            given = f"{num_pages} pages of {size} tokens, {needed >> 20} MiB"
            raise InvalidInputError("kv_cache_tokens", given, f"fewer: {error}") from error

    def _most_tokens(self, longest: int) -> int:
        """Of a step, where no sequence has more than ``longest``."""
        config = self.config
        running, prompts = config.max_running_requests or 1, config.chunked_prefill_size or 1
        return min(prompts + running * (1 + config.most_guesses), running * longest)

    def _most_read(self) -> int:
        """Prompt tokens of a step whose logits there is room for: in a quarter of what is free by now."""
        row_bytes = self.model_config.vocab_size * self.dtype.itemsize
        rows = max(LEAST_READ, _free_bytes(self.device) // (4 * row_bytes))
        return parallel.agreed(rows, self.config.tensor_parallel_size, self.device)

    def _step_bytes(self, longest: int) -> int:
        """What a full step takes beside the KV cache; 0 where that is not known."""
        if self.device.type != "cuda" or not getattr(self.acceleration, "layers", 0):
            return 0
        from headway.engine.pieces import plain_layers

        return self._most_tokens(longest) * plain_layers(self.model)[0].row_bytes

    def _cache_size(self, shapes: Sequence[kv_cache.KVShape], limit: int) -> tuple[int, int]:
        """Number of pages, and the longest sequence they allow (at most ``limit``)."""
        config = self.config
        size = config.page_size
        page_bytes = size * kv_cache.bytes_per_token(shapes, self.kv_dtype)
        left = max(0, _free_bytes(self.device) - self._step_bytes(limit))
        if config.kv_cache_tokens is not None:
            asked, pages = "kv_cache_tokens", config.kv_cache_tokens // size
        elif config.kv_cache_memory_bytes is not None:
            asked, pages = "kv_cache_memory_bytes", config.kv_cache_memory_bytes // page_bytes
        else:
            asked, pages = "mem_fraction", int(left * (config.mem_fraction or 1)) // page_bytes
            # No more than everything that could run at once would fill.
            most = config.max_running_requests or 1
            pages = min(pages, most * kv_cache.pages_for(limit, size))
        pages = parallel.agreed(pages, config.tensor_parallel_size, self.device)
        if pages * size < 2:  # a token of a prompt, and one that follows
            wanted = f"room for two tokens, in pages of {size} ({page_bytes} bytes each)"
            if asked == "mem_fraction":
                wanted += (
                    f", in the {left >> 20} MiB that the model and a full step leave; a smaller "
                )
                wanted += "chunked_prefill_size leaves more"
            raise InvalidInputError(asked, getattr(config, asked), wanted)
        if pages * size >= limit:
            return pages, limit
        if config.max_model_len is not None:
            raise InvalidInputError(
                "max_model_len",
                config.max_model_len,
                f"at most {pages * size}, the tokens the KV cache holds",
            )
        return pages, pages * size


def backend_for(layers: Collection[AttentionLayer], config: EngineConfig) -> AttentionBackend:
    """What attends for a model's layers."""
    latent = [isinstance(layer, MLALayer) for layer in layers]
    if any(latent) and not all(latent):
        raise UnsupportedError("some layers keep latent vectors, others keys and values")
    asked = config.attention_backend, config.flash_attn_version
    if not any(latent):
        return FlashAttentionBackend(*asked)
    fp8 = {"auto": None, "bfloat16": False, "float8": True}[config.mla_prefill_dtype]
    return MLABackend(*asked, fp8_prefill=fp8)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


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


def _joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """What one step added to a request, token by token, as one output."""
    return dataclasses.replace(
        outputs[-1],
        new_text="".join(one.new_text for one in outputs),
        new_token_ids=tuple(token for one in outputs for token in one.new_token_ids),
        new_logprobs=tuple(entry for one in outputs for entry in one.new_logprobs),
        prompt_logprobs=outputs[0].prompt_logprobs,
    )


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
        prompt_logprobs=tuple(one for piece in pieces for one in piece.prompt_logprobs),
        error=last.error,
    )


@contextlib.contextmanager
def _bar(title: str, total: int, *, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over ``total`` things; yields what to call at each."""
    from rich.progress import Progress

    with Progress(disable=not show) as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)
