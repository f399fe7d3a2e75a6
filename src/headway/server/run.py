"""Runs the server in this process until a signal drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from headway.errors import InvalidInputError
from headway.server.app import create_app
from headway.server.async_engine import Engine
from headway.server.context import ServerContext, ServerSettings

log = logging.getLogger("headway.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FLUSH_SECONDS = 5  # for answers already computed to reach slow clients, after the drain

#: How long the event loop may keep the interpreter while the engine's thread wants it, in seconds. The
#: engine asks several times a step; at Python's own 5 ms a step would wait longer than a GPU computes it.
_TURN_SECONDS = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a taken port is known before a model is loaded.

    ``port`` 0 takes any free one. Raises InvalidInputError where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        wanted = "an address of this machine and a free port"
        raise InvalidInputError("host, port", f"{host}:{port} ({error})", wanted) from None
    return bound


class DrainingServer(uvicorn.Server):
    """uvicorn, with a drain before its shutdown.

    On the first SIGTERM or SIGINT the listener stays, so that /health can say 503, while running requests
    finish; then the server closes. A second signal closes it at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        context: ServerContext,
        drain_timeout: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._context = context
        self._drain_timeout = drain_timeout
        self._ready = ready
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        active = self._context.traffic.active
        log.info("draining: %d requests to finish, %g s at most", active, self._drain_timeout)
        if not await self._context.drain(self._drain_timeout):
            log.warning(
                "cancelled the requests still running after %g seconds", self._drain_timeout
            )
        self.should_exit = True


def serve(
    engine: Engine,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    drain_timeout: float = 60.0,
    access_log: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal. Returns when everything has been answered, or ``drain_timeout`` seconds later.

    ``ready`` is called once requests are accepted.
    """
    sys.setswitchinterval(_TURN_SECONDS)
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app,
        access_log=access_log,
        log_level="info" if access_log else "warning",
        lifespan="on",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    server = DrainingServer(config, app.state.context, drain_timeout, ready)
    server.run(sockets=[listener])
