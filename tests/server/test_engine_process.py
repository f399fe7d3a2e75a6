"""An engine in a process of its own: what comes through, what fails there, and how it ends."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from headway.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from headway.errors import InvalidInputError, UnsupportedError
from headway.server.engine_process import EngineProcess
from tests.server.live import eventually, serving
from tests.server.stand_in import FAIL, EchoEngine

GREEDY = SamplingParams(max_tokens=4, temperature=0)


def broken(message: str) -> EchoEngine:
    raise UnsupportedError(message, {"echo": ["cannot"]}, ["another"])


def crashing() -> EchoEngine:
    raise KeyError("weights")


def loading() -> EchoEngine:
    print(os.getpid(), flush=True)
    time.sleep(60)
    return EchoEngine()


SCORES = 20000


class Scoring(EchoEngine):
    """With an answer's first token many scores."""

    def __init__(self) -> None:
        super().__init__(num_pages=1 << 20, max_model_len=1 << 16, step_seconds=0.2)

    def step(self) -> list[RequestOutput]:
        return [
            dataclasses.replace(
                one, prompt_logprobs=tuple(TokenLogprob(i, -i / 7, ()) for i in range(SCORES))
            )
            if one.output_tokens == 1
            else one
            for one in super().step()
        ]


def pages(engine: EchoEngine) -> int:
    return engine.num_pages


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(EchoEngine, ask=pages) as made:
        yield made


def steps(engine: EngineProcess, until: int) -> list[RequestOutput]:
    """Outputs of steps until so many requests have ended."""
    found: list[RequestOutput] = []
    while sum(output.finish_reason is not None for output in found) < until:
        found += engine.step()
    return found


def test_it_stands_for_the_engine(engine: EngineProcess) -> None:
    assert (engine.model_name, engine.max_model_len, engine.answer) == ("echo", 1024, 4096)
    assert engine.model_config.vocab_size == 257
    assert engine.step() == []
    here = EchoEngine()
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    engine.add_request("a", [65, 66, 67], params)
    here.add_request("a", [65, 66, 67], params)
    wanted: list[RequestOutput] = []
    while here.has_unfinished():
        wanted += here.step()
    assert steps(engine, 1) == wanted  # whole objects, log-probabilities among them
    assert not engine.has_unfinished()
    assert engine.stats().output_tokens == here.stats().output_tokens == 4


def test_what_cannot_run_is_refused_on_this_side(engine: EngineProcess) -> None:
    for prompt, wanted in (([], "empty"), ([257], "ids 0 to 256"), ([1] * 1024, "at most 1023")):
        with pytest.raises(InvalidInputError, match=wanted):
            engine.add_request("a", prompt, GREEDY)
    assert not engine.has_unfinished()


def test_what_only_the_engine_can_refuse_ends_the_request() -> None:
    with EngineProcess(EchoEngine, ask=None) as engine:
        engine.max_model_len = 1 << 20
        engine.add_request("a", [1] * 20000, GREEDY)
        (ended,) = steps(engine, 1)
        assert ended.finish_reason is FinishReason.ERROR
        assert "at most 16384" in (ended.error or "")


def test_a_cancelled_request_gives_no_more(engine: EngineProcess) -> None:
    engine.add_request("long", [65], SamplingParams(max_tokens=1 << 20, temperature=0))
    while not engine.step():
        pass
    engine.abort("long")
    assert not engine.has_unfinished()
    engine.add_request("next", [66], GREEDY)
    assert {output.request_id for output in steps(engine, 1)} <= {"long", "next"}


def test_nobody_runs_once_all_are_cancelled(engine: EngineProcess) -> None:
    """Though no step follows that would tell."""
    for name in ("one", "two"):
        engine.add_request(name, [65], SamplingParams(max_tokens=1 << 10, temperature=0))
    while engine.stats().running < 2:
        engine.step()
    engine.abort("one")
    engine.abort("two")
    assert (engine.stats().running, engine.stats().pages_used) == (0, 0)


def test_a_step_that_failed_for_a_cancelled_request_fails_no_other(engine: EngineProcess) -> None:
    engine.add_request("bad", list(FAIL), GREEDY)
    while not engine._pipe.poll():  # the failure is on its way
        time.sleep(0.001)
    engine.abort("bad")
    assert engine.stats().running == 0
    engine.add_request("good", [65], GREEDY)
    told = [output for output in steps(engine, 1) if output.request_id == "good"]
    assert "".join(output.new_text for output in told) == "AAAA"


def test_much_may_be_said_in_both_directions_at_once() -> None:
    """More than a pipe holds: prompts on their way in while scores of others are on theirs out."""
    with EngineProcess(Scoring) as engine:
        for number in range(8):
            engine.add_request(str(number), [65] * 50000, SamplingParams(max_tokens=1))
        told = steps(engine, 8)
    assert sum(len(output.prompt_logprobs) for output in told) == 8 * SCORES


def test_a_failed_step_is_told_and_the_engine_goes_on(engine: EngineProcess) -> None:
    engine.add_request("bad", list(FAIL), GREEDY)
    with pytest.raises(RuntimeError, match="told to fail"):
        steps(engine, 1)
    engine.abort("bad")
    assert not engine.has_unfinished()
    engine.add_request("good", [65], GREEDY)
    assert "".join(output.new_text for output in steps(engine, 1)) == "AAAA"


def test_why_it_cannot_be_made_is_told() -> None:
    with pytest.raises(UnsupportedError, match="no room") as refused:
        EngineProcess(broken, "no room")
    assert refused.value.alternatives == ("another",)
    with pytest.raises(RuntimeError, match="KeyError: 'weights'"):
        EngineProcess(crashing)


def test_a_server_of_it_streams_fails_and_survives_its_death() -> None:
    with EngineProcess(EchoEngine) as own, serving(own) as live:
        client = live.client()
        stream = client.completions.create(model="echo", prompt="abc", max_tokens=5, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "abcab"
        answers: Any = client.completions.create(model="echo", prompt="xy", n=3, max_tokens=6)
        assert answers.choices[0].text == "xyxyxy"
        assert live.post("/v1/completions", {"prompt": FAIL.decode()}).status_code == 500
        assert client.completions.create(model="echo", prompt="ok", max_tokens=2).choices
        assert own._process.pid is not None
        os.kill(own._process.pid, signal.SIGKILL)
        answer = live.post("/v1/completions", {"prompt": "abc"})
        assert answer.status_code == 500
        assert "exit code -9" in answer.text
        eventually(lambda: live.get("/health").status_code == 503, "the server says it is ill")


def test_what_fails_here_meanwhile_ends_the_process() -> None:
    """And that one says nothing of it: who gave up knows why."""
    before = multiprocessing.active_children()
    during: list[Any] = []

    def fail() -> None:
        during.extend(multiprocessing.active_children())
        raise OSError("no such module")

    with pytest.raises(OSError, match="no such module"):
        EngineProcess(EchoEngine, meanwhile=fail)
    (started,) = (child for child in during if child not in before)
    assert started.exitcode == 0


def test_a_process_ends_with_a_server_that_is_killed_while_it_loads() -> None:
    here = "from headway.server.engine_process import EngineProcess"
    there = "from tests.server.test_engine_process import loading"
    command = [sys.executable, "-c", f"{here}; {there}; EngineProcess(loading)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        engine = psutil.Process(int(server.stdout.readline()))
        assert engine.is_running()
        server.kill()

        def ended() -> bool:
            try:
                return engine.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True

        eventually(ended, "the engine's process ends")


def test_closing_ends_a_busy_process() -> None:
    engine = EngineProcess(EchoEngine)
    engine.add_request("long", [65], SamplingParams(max_tokens=1 << 20, temperature=0))
    begin = time.monotonic()
    engine.close()
    assert engine._process.exitcode == 0
    assert time.monotonic() - begin < 5
