"""An engine in a process of its own, for servers of fast devices.

Writing a token to each of 256 streams keeps the interpreter busy for most of a step of a GPU. In one
process the engine waits for it, several times a step; in two they only hand over tokens. Checks of requests
and everything about texts happen on the server's side, so that nothing waits for a reply.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import multiprocessing
import operator
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from headway.engine.collector import settled
from headway.engine.intake import Intake
from headway.engine.request import EngineStats, FinishReason, RequestOutput, SamplingParams
from headway.errors import HeadwayError, InvalidInputError
from headway.server.async_engine import Engine, EngineGoneError

log = logging.getLogger("headway.server")

#: How long a step waits for tokens before requests that came meanwhile are passed on, in seconds.
_TURN_SECONDS = 0.002

#: How long the process may take to end before it is killed, in seconds.
_END_SECONDS = 10.0

#: Outputs travel as tuples: half the time of pickling the objects.
_FIELDS = operator.attrgetter(*(field.name for field in dataclasses.fields(RequestOutput)))


@dataclasses.dataclass(frozen=True)
class _About:
    """What the server has to know of the engine, once."""

    tokenizer: Any
    model_config: Any
    model_name: str
    max_model_len: int
    stats: EngineStats
    answer: Any


class EngineProcess(Intake):
    """Starts a process with the engine that ``make(*arguments)`` gives there, and stands for that engine.

    Both have to be importable there. ``answer`` is what ``ask`` says of the engine; ``meanwhile`` is done
    here while that process makes it. For one thread, but for what :class:`.Intake` does. Leaving the
    context ends the process.

    Raises:
        HeadwayError, RuntimeError: what making the engine raises.
    """

    def __init__(
        self,
        make: Callable[..., Engine],
        *arguments: Any,
        ask: Callable[[Any], Any] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, there = context.Pipe()
        target = (there, make, arguments, ask)
        self._process = context.Process(
            target=_run, args=target, name="headway-engine", daemon=True
        )
        self._process.start()
        there.close()
        # Before multiprocessing's own, which would wait for a process that waits for us.
        atexit.register(self.close)
        try:
            meanwhile()
            about = self._hear()
        except BaseException:
            self.close()
            raise
        self.tokenizer = about.tokenizer
        self.model_config = about.model_config
        self.model_name = about.model_name
        self.max_model_len = about.max_model_len
        self.answer = about.answer
        self._stats: EngineStats = about.stats
        self._outputs: list[RequestOutput] = []
        self._failure: str | None = None
        self._halted = False
        self._unfinished: set[str] = set()
        self._cancelled = False  # since it was known to be idle

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        atexit.unregister(self.close)
        self._pipe.close()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    # --- what an engine does ----------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None:
        prompt = list(prompt_token_ids)
        self.check_request(prompt, sampling_params)
        self._unfinished.add(request_id)
        self._say("add_request", request_id, prompt, sampling_params)

    def abort(self, request_id: str) -> None:
        self._unfinished.discard(request_id)
        self._cancelled = True
        self._say("abort", request_id)

    def has_unfinished(self) -> bool:
        self._say("has_unfinished")
        while not isinstance(heard := self._hear(), bool):
            self._take(heard)
        return heard

    def stats(self) -> EngineStats:
        """After the latest step whose tokens have arrived, or after the last request was cancelled."""
        if self._cancelled and not self._unfinished:  # no step will tell
            self._cancelled = False
            self.has_unfinished()
            if self._failure is not None:  # of requests that nobody waits for
                self._failure = None
                self._say("resume")
        return self._stats

    def step(self) -> list[RequestOutput]:
        """What has arrived since the last call, perhaps nothing.

        Raises:
            RuntimeError: a step failed. The engine does nothing then until the next call.
        """
        if self._halted:
            self._say("resume")
            self._halted = False
        if not self._outputs and self._failure is None:
            self._pipe.poll(_TURN_SECONDS)
        while self._failure is None and self._pipe.poll():
            self._take(self._hear())
        outputs, self._outputs = self._outputs, []
        if outputs:
            return outputs
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._halted = True
            raise RuntimeError(failure)
        return []

    def _take(self, heard: tuple[list[tuple[Any, ...]], EngineStats] | str) -> None:
        if isinstance(heard, str):
            self._failure = heard
            return
        told, self._stats = heard
        outputs = [RequestOutput(*fields) for fields in told]
        self._unfinished -= {one.request_id for one in outputs if one.finish_reason is not None}
        self._outputs += outputs

    def _say(self, name: str, *arguments: Any) -> None:
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise EngineGoneError(self._how_it_ended()) from None

    def _hear(self) -> Any:
        try:
            heard = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise EngineGoneError(self._how_it_ended()) from None
        if isinstance(heard, Exception):
            raise heard
        return heard

    def _how_it_ended(self) -> str:
        self._process.join(_END_SECONDS)
        return f"the engine's process ended with exit code {self._process.exitcode}"


# --- the process --------------------------------------------------------------------------------------


def _run(
    pipe: Connection,
    make: Callable[..., Engine],
    arguments: tuple[Any, ...],
    ask: Callable[[Any], Any] | None,
) -> None:
    # The server drains on these, and says when that was all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    try:
        engine = make(*arguments)
        about = _About(
            engine.tokenizer,
            engine.model_config,
            engine.model_name,
            engine.max_model_len,
            engine.stats(),
            None if ask is None else ask(engine),
        )
    except HeadwayError as error:
        _tell(pipe, error)
        return
    except BaseException as error:
        _tell(pipe, RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    try:
        _tell(pipe, about)
        with settled():
            _work(pipe, engine)
    except (EOFError, OSError):  # the server has gone
        return


def _end_with_the_server() -> None:
    """Even while a model is loaded, and without a word from a server that was killed."""
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _work(pipe: Connection, engine: Engine) -> None:
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(pipe, commands), daemon=True)
    listener.start()
    halted = False
    while True:
        while halted or not engine.has_unfinished() or not commands.empty():
            heard = commands.get()
            if heard is None:
                return
            name, arguments = heard
            if name == "resume":
                halted = False
            else:
                _obey(pipe, engine, name, arguments)
        try:
            outputs = engine.step()
        except Exception as error:
            log.exception("a step has failed")
            _tell(pipe, f"{type(error).__name__}: {error}")
            halted = True
        else:
            _tell(pipe, ([*map(_FIELDS, outputs)], engine.stats()))


def _listen(pipe: Connection, commands: queue.SimpleQueue[Any]) -> None:
    """Take commands as they come: a server that waits until a long prompt is read does not read either."""
    try:
        while True:
            commands.put(pipe.recv())
    except (EOFError, OSError):
        commands.put(None)  # the server has gone


def _obey(pipe: Connection, engine: Engine, name: str, arguments: tuple[Any, ...]) -> None:
    if name == "has_unfinished":
        _tell(pipe, ([], engine.stats()))
        _tell(pipe, engine.has_unfinished())
        return
    try:
        getattr(engine, name)(*arguments)
    except InvalidInputError as error:  # not found by the checks on the server's side
        ended = RequestOutput(
            arguments[0], "", (), finish_reason=FinishReason.ERROR, error=str(error)
        )
        _tell(pipe, ([_FIELDS(ended)], engine.stats()))


def _tell(pipe: Connection, what: object) -> None:
    pipe.send_bytes(pickle.dumps(what, protocol=pickle.HIGHEST_PROTOCOL))
