"""Models, health, metrics, many clients, clients that vanish, and draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest

from headway.errors import InvalidInputError
from headway.server.context import ServerSettings
from headway.server.run import bind
from tests.server.live import Live, eventually, serving
from tests.server.stand_in import EchoEngine


def test_models_are_listed_with_their_limits(live: Live) -> None:
    (card,) = live.client().models.list().data
    assert card.id == "echo"
    assert card.max_model_len == 1024
    assert live.client().models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError):
        live.client().models.retrieve("other")


def test_served_names_replace_the_model_name() -> None:
    names = ServerSettings(served_model_names=("small", "org/small"))
    with serving(EchoEngine(), names) as live:
        assert [card.id for card in live.client().models.list()] == ["small", "org/small"]
        assert live.client().models.retrieve("org/small").id == "org/small"
        answer = live.client().completions.create(model="org/small", prompt="x")
        assert answer.model == "org/small"
        with pytest.raises(openai.NotFoundError):
            live.client().completions.create(model="echo", prompt="x")


def test_metrics_count_what_happened() -> None:
    with serving(EchoEngine(num_pages=100)) as live:
        client = live.client()
        client.completions.create(model="echo", prompt="0123456789", n=2, max_tokens=5)
        client.completions.create(model="echo", prompt="0123456789", max_tokens=9, stop="3")
        assert live.post("/v1/completions", {"prompt": 3}).status_code == 400
        assert live.metric("headway_prompt_tokens_total") == 30
        assert live.metric("headway_output_tokens_total") == 14
        assert live.metric("headway_time_to_first_token_seconds_count") == 3
        assert live.metric("headway_inter_token_latency_seconds_count") == 11
        assert live.metric("headway_request_duration_seconds_count") == 3
        assert live.metric("headway_choices_finished_total", finish_reason="length") == 2
        assert live.metric("headway_choices_finished_total", finish_reason="stop") == 1
        assert live.metric("headway_prefix_cache_hit_rate") == pytest.approx(16 / 30)
        assert live.metric("headway_kv_cache_pages_total") == 100
        assert live.metric("headway_kv_cache_pages_used") == 0
        text = live.get("/metrics").text
    for status, count in (("200", 2), ("400", 1)):
        line = f'headway_requests_total{{endpoint="/v1/completions",status="{status}"}} {count}.0'
        assert line in text


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    with serving(EchoEngine()) as one, serving(EchoEngine()) as other:
        one.client().completions.create(model="echo", prompt="x")
        assert one.metric("headway_request_duration_seconds_count") == 1
        assert other.metric("headway_request_duration_seconds_count") == 0


def test_64_concurrent_requests_each_get_their_own_answer() -> None:
    engine = EchoEngine(num_pages=200, step_seconds=0.001)  # room for about 20 at a time

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        prompt = f"request {i:02d} "
        if i % 2:
            answer = await client.completions.create(model="echo", prompt=prompt, max_tokens=30)
            return answer.choices[0].text
        stream = await client.completions.create(
            model="echo", prompt=prompt, max_tokens=30, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all(live: Live) -> list[str]:
        async with live.async_client() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    with serving(engine) as live:
        texts = asyncio.run(ask_all(live))
        assert texts == [(f"request {i:02d} " * 3)[:30] for i in range(64)]
        assert engine.pages_used == 0
        assert live.metric("headway_requests_waiting") == 0


# --- clients that vanish ------------------------------------------------------------------------------


def request_bytes(path: str, body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


def raw_client(live: Live, path: str, body: dict[str, object]) -> socket.socket:
    address = httpx.URL(live.url)
    client = socket.create_connection((address.host, address.port), timeout=20)
    client.sendall(request_bytes(path, body))
    return client


CHAT_BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 900}
TEXT_BODY = {"prompt": ["hi", "there"], "n": 2, "max_tokens": 900}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT_BODY), ("/v1/completions", TEXT_BODY)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_vanished_client_leaves_nothing_behind(
    path: str, body: dict[str, object], stream: bool
) -> None:
    engine = EchoEngine(step_seconds=0.002)
    with serving(engine) as live:
        client = raw_client(live, path, body | {"stream": stream})
        eventually(lambda: engine.pages_used > 0, "the request runs")
        if stream:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
        eventually(lambda: not engine.has_unfinished(), "the request is cancelled")
        assert engine.pages_used == 0
        assert len(engine.aborted) == (4 if path == "/v1/completions" else 1)
        gone = {"endpoint": path, "status": "499"}
        eventually(
            lambda: live.metric("headway_requests_total", **gone) == 1, "it is counted as gone"
        )
        assert live.get("/health").status_code == 200


def test_a_client_that_vanishes_while_it_waits_is_forgotten() -> None:
    engine = EchoEngine(num_pages=300, step_seconds=0.002)
    with serving(engine) as live:
        running = raw_client(live, "/v1/completions", {"prompt": "a", "max_tokens": 1000})
        eventually(lambda: engine.pages_used > 0, "the first request runs")
        waiting = raw_client(live, "/v1/completions", {"prompt": "b", "max_tokens": 1000})
        eventually(lambda: engine.stats().waiting == 1, "the second one waits")
        waiting.close()
        eventually(lambda: engine.stats().waiting == 0, "the second one is forgotten")
        assert engine.stats().running == 1
        running.close()
        eventually(lambda: engine.pages_used == 0, "the pages come back")


def test_the_openai_client_can_leave_a_stream_early() -> None:
    engine = EchoEngine(step_seconds=0.002)
    with serving(engine) as live, live.client() as client:
        stream = client.completions.create(model="echo", prompt="a", max_tokens=900, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: not engine.has_unfinished(), "the request is cancelled")
        assert engine.pages_used == 0


# --- draining -----------------------------------------------------------------------------------------

SERVER = """
import sys
from headway.server.context import ServerSettings
from headway.server.run import bind, serve
from tests.server.stand_in import EchoEngine
listener = bind("127.0.0.1", 0)
port = listener.getsockname()[1]
ready = lambda: print(port, flush=True)
engine = EchoEngine(step_seconds=0.01)
serve(engine, ServerSettings(), listener, drain_timeout=float(sys.argv[1]), ready=ready)
"""


class Process:
    def __init__(self, drain_timeout: float) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", SERVER, str(drain_timeout)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.answers: list[httpx.Response] = []

    def ask_in_background(self, **body: object) -> threading.Thread:
        def ask() -> None:
            url = f"{self.url}/v1/completions"
            self.answers.append(httpx.post(url, json=body, timeout=30))

        thread = threading.Thread(target=ask)
        thread.start()
        running = "headway_requests_running 1.0"
        eventually(lambda: running in httpx.get(f"{self.url}/metrics").text, "it runs")
        return thread

    def signal(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def health(self) -> int:
        return httpx.get(f"{self.url}/health").status_code


def test_sigterm_finishes_what_runs_and_exits_with_0() -> None:
    server = Process(drain_timeout=30)
    thread = server.ask_in_background(prompt="ab", max_tokens=100)
    server.signal()
    eventually(lambda: server.health() == 503, "health says that the server drains")
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    thread.join(20)
    assert server.answers[0].json()["choices"][0]["text"] == "ab" * 50
    assert server.process.wait(10) == 0


def test_sigterm_gives_up_on_long_requests_after_its_time() -> None:
    server = Process(drain_timeout=0.3)
    thread = server.ask_in_background(prompt="ab", max_tokens=1000)
    server.signal()
    thread.join(20)
    assert server.answers[0].status_code == 503
    assert server.process.wait(10) == 0


def test_sigterm_on_an_idle_server_exits_at_once() -> None:
    server = Process(drain_timeout=600)
    assert server.health() == 200
    server.signal()
    assert server.process.wait(10) == 0


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    taken = bind("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(InvalidInputError, match="free port"):
        bind("127.0.0.1", taken.getsockname()[1])
    taken.close()
