"""A real server on a real socket, in a thread of the test process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import openai
import uvicorn

from headway.server.app import create_app
from headway.server.async_engine import Engine
from headway.server.context import ServerContext, ServerSettings
from headway.server.run import bind

DEADLINE_SECONDS = 20.0


@dataclass(frozen=True)
class Live:
    url: str
    context: ServerContext
    server: uvicorn.Server

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        return httpx.get(self.url + path, **kwargs)  # type: ignore[arg-type]

    def post(self, path: str, json: object) -> httpx.Response:
        return httpx.post(self.url + path, json=json, timeout=DEADLINE_SECONDS)

    def metric(self, name: str, **labels: str) -> float:
        value = self.context.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextlib.contextmanager
def serving(engine: Engine, settings: ServerSettings | None = None) -> Iterator[Live]:
    listener = bind("127.0.0.1", 0)
    app = create_app(engine, settings or ServerSettings())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started, "the server starts")
        port = listener.getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", app.state.context, server)
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive(), "the server did not stop"


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < end, f"never came true: {what}"
        time.sleep(0.005)
