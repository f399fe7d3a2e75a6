"""The engine behind an asyncio face: one thread steps it, queues carry requests in and tokens out.

The thread alone touches the engine's scheduler. Everything else here runs on the event loop. A group is
what one HTTP request asks for: one engine request per prompt and choice, with one queue for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from headway.engine.request import EngineStats, FinishReason, RequestOutput, SamplingParams

log = logging.getLogger("headway.server")


class Engine(Protocol):
    """What the server needs of an engine; :class:`headway.engine.llm.LLM` is one."""

    @property
    def tokenizer(self) -> Any: ...  # a transformers tokenizer, or None
    @property
    def model_config(self) -> Any: ...  # transformers', with vocab_size
    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None: ...
    def step(self) -> list[RequestOutput]: ...
    def abort(self, request_id: str) -> object: ...
    def has_unfinished(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def encode(self, text: str) -> list[int]: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...


class EngineFailedError(Exception):
    """The engine failed while it worked on a request, or the server cancelled it."""


class EngineGoneError(EngineFailedError):
    """There is no engine any more."""


@dataclass(frozen=True)
class Job:
    """One engine request: one choice of one prompt."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams


@dataclass(frozen=True)
class Delivery:
    """One step's output of the job at ``index``, stamped (seconds, perf_counter) when the step ended."""

    index: int
    output: RequestOutput
    time: float


class Group:
    """The jobs of one HTTP request. Leaving the context cancels whatever has not finished."""

    def __init__(self, engine: AsyncEngine, jobs: Sequence[Job]) -> None:
        self._engine = engine
        self._index = {job.request_id: i for i, job in enumerate(jobs)}
        self._unfinished = set(self._index)
        self._arrived: list[Delivery] = []
        self._wake: asyncio.Future[None] | None = None  # of who waits for the next delivery

    async def __aenter__(self) -> Group:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Stop what is unfinished; its pages return to the pool before the engine's next step."""
        self._engine._cancel(sorted(self._unfinished))
        self._unfinished.clear()

    def __aiter__(self) -> AsyncIterator[list[Delivery]]:
        return self._batches()

    async def _batches(self) -> AsyncIterator[list[Delivery]]:
        """Everything that has arrived, at least one delivery at a time, until all jobs are finished."""
        waiting_for = len(self._index)
        while waiting_for:
            if not self._arrived:
                self._wake = asyncio.get_running_loop().create_future()
                try:
                    await self._wake
                finally:
                    self._wake = None
            batch, self._arrived = self._arrived, []
            for delivery in batch:
                _raise_failure(delivery.output)
                waiting_for -= delivery.output.finish_reason is not None
            yield batch

    def _deliver(self, output: RequestOutput, at: float) -> None:
        if output.finish_reason is not None:
            self._unfinished.discard(output.request_id)
        self._arrived.append(Delivery(self._index[output.request_id], output, at))
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _raise_failure(output: RequestOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise EngineFailedError(output.error or "the engine failed while it worked on this request")
    if output.finish_reason is FinishReason.ABORT:
        raise EngineFailedError("the request was cancelled by the server")


class AsyncEngine:
    """Runs an engine in its own thread.

    ``start`` inside a running event loop; ``stop`` ends the thread. ``stats`` is the engine's state after
    its latest step. ``failure`` is set when the engine can no longer be used.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = engine.stats()
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._groups: dict[str, Group] = {}
        self._inside: set[str] = set()  # requests the engine holds; the thread's own
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="headway-engine", daemon=True)
        # Tokenizers are not safe to share between threads, and long prompts must not block the loop.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="headway-tokenizer")

    # --- the event loop's side --------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        self._commands.put(self._end)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)

    async def tokenize(self, function: Callable[[Any], list[int]], text: Any) -> list[int]:
        """``function(text)`` on the tokenizer's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizer_thread, function, text)

    async def submit(self, jobs: Sequence[Job]) -> Group:
        """Hand jobs to the engine, all or none; returns once it has taken them.

        Raises what the engine's ``add_request`` raises, or EngineFailedError.
        """
        if self.failure is not None:
            raise EngineFailedError(f"the engine has stopped: {self.failure}")
        group = Group(self, jobs)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._groups.update((job.request_id, group) for job in jobs)
        self._commands.put(lambda: self._add(jobs, taken))
        try:
            await taken
        except BaseException:
            group.cancel()
            raise
        return group

    def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._groups.pop(request_id, None)
        if request_ids:
            self._commands.put(lambda: self._abort(request_ids))

    def cancel_all(self) -> None:
        """End every request; their groups raise EngineFailedError."""
        request_ids = list(self._groups)
        self._end_all(FinishReason.ABORT, None)
        self._commands.put(lambda: self._abort(request_ids))

    def _end_all(self, how: FinishReason, reason: str | None) -> None:
        self._deliver(_endings(list(self._groups), how, reason), time.perf_counter())

    def _deliver(self, outputs: Sequence[RequestOutput], at: float) -> None:
        for output in outputs:
            group = self._groups.get(output.request_id)
            if group is None:
                continue  # its client has gone
            if output.finish_reason is not None:
                del self._groups[output.request_id]
            group._deliver(output, at)

    # --- the thread's side ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._obey(wait=not self._inside)
                if self._inside:
                    self._step()
            except Exception as error:
                self._give_up(error)

    def _obey(self, wait: bool) -> None:
        if not wait and self._commands.empty():
            return
        self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        self.stats = self.engine.stats()

    def _end(self) -> None:
        self._stopping = True

    def _add(self, jobs: Sequence[Job], taken: asyncio.Future[None]) -> None:
        error: Exception | None = None
        try:
            if self.failure is not None:
                raise EngineFailedError(f"the engine has stopped: {self.failure}")
            for job in jobs:
                self.engine.add_request(job.request_id, job.prompt_token_ids, job.sampling_params)
                self._inside.add(job.request_id)
        except Exception as raised:
            error = raised  # submit() cancels the whole group, the jobs already inside included
            if isinstance(raised, EngineGoneError) and self.failure is None:
                self._give_up(raised)
        self._on_loop(lambda: _resolve(taken, error))

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id in self._inside:
                self._inside.discard(request_id)
                self.engine.abort(request_id)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            log.exception("engine step failed; %d requests fail with it", len(self._inside))
            self._fail_all(f"{type(error).__name__}: {error}")
            return
        at = time.perf_counter()
        self._inside.difference_update(o.request_id for o in outputs if o.finish_reason is not None)
        self.stats = self.engine.stats()
        if outputs:
            self._on_loop(lambda: self._deliver(outputs, at))

    def _fail_all(self, reason: str) -> None:
        """A step has failed: end every request and leave the engine empty, so that it can go on."""
        failed = sorted(self._inside)
        self._abort(failed)
        if self.engine.has_unfinished():
            self.failure = reason
        endings = _endings(failed, FinishReason.ERROR, reason)
        self._on_loop(lambda: self._deliver(endings, time.perf_counter()))

    def _give_up(self, error: Exception) -> None:
        """The engine cannot even be tidied up: say so to everyone, now and from now on."""
        log.error("the engine has failed and takes no more requests", exc_info=error)
        self.failure = reason = f"{type(error).__name__}: {error}"
        self._inside.clear()
        self._on_loop(lambda: self._end_all(FinishReason.ERROR, reason))

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def _endings(
    request_ids: Sequence[str], how: FinishReason, reason: str | None
) -> list[RequestOutput]:
    return [RequestOutput(i, "", (), finish_reason=how, error=reason) for i in request_ids]


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return  # its client has gone; submit() has cancelled the jobs
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
