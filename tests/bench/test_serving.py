"""The load generator: its figures from known timings, its requests against a real server."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

pytest.importorskip("fastapi")

import itertools

from headway.bench import serving as bench
from headway.bench.serving import LoadSettings, Sample
from headway.errors import HeadwayError, InvalidInputError
from tests.server.live import Live, serving
from tests.server.stand_in import EchoEngine


@pytest.fixture(scope="module")
def live() -> AsyncIterator[Live]:
    with serving(EchoEngine(step_seconds=0.002)) as server:
        yield server


def run(settings: LoadSettings) -> list[Sample]:
    samples, _ = asyncio.run(bench.run_load(settings))
    return samples


# --- figures ------------------------------------------------------------------------------------------

ONE = Sample(start=10.0, end=10.9, token_times=[10.3, 10.5, 10.9], input_tokens=7, output_tokens=3)
TWO = Sample(start=10.5, end=12.5, token_times=[11.5, 12.5], input_tokens=5, output_tokens=2)
THREE = Sample(start=12.6, end=13.0, token_times=[13.0], input_tokens=1, output_tokens=1)
FAILED = Sample(start=12.6, end=12.7, error="refused")


def test_latencies_of_one_request() -> None:
    assert ONE.ttft == pytest.approx(0.3)
    assert ONE.itls == pytest.approx([0.2, 0.4])
    assert ONE.tpot == pytest.approx(0.3)
    assert THREE.tpot is None


def test_summary_follows_the_definitions() -> None:
    result = bench.summarise([ONE, TWO, THREE, FAILED])
    assert (result.successful_requests, result.failed_requests) == (3, 1)
    assert result.duration_s == pytest.approx(3.0)
    assert (result.input_tokens, result.output_tokens) == (13, 6)
    assert result.request_throughput == pytest.approx(1.0)
    assert result.output_throughput == pytest.approx(2.0)
    assert result.total_throughput == pytest.approx(19 / 3)
    assert result.mean_ttft_ms == pytest.approx(1e3 * (0.3 + 1.0 + 0.4) / 3)
    assert result.median_ttft_ms == pytest.approx(400)
    assert result.mean_tpot_ms == pytest.approx(1e3 * (0.3 + 1.0) / 2)
    assert result.median_itl_ms == pytest.approx(400)
    assert result.mean_e2el_ms == pytest.approx(1e3 * (0.9 + 2.0 + 0.4) / 3)
    assert result.peak_output_throughput == 3  # within the first second
    assert result.peak_concurrency == 2


def test_chunks_of_several_tokens_count_all_of_them_in_the_peak() -> None:
    sample = Sample(start=0.0, end=1.0, token_times=[0.1, 0.2], output_tokens=8)
    assert bench.peak_output_throughput([sample]) == 8


def test_a_request_that_begins_as_another_ends_is_not_concurrent_with_it() -> None:
    samples = [Sample(start=float(i), end=i + 1.0) for i in range(5)]
    assert bench.peak_concurrency(samples) == 1


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(count: int) -> None:
    numpy = pytest.importorskip("numpy")
    values = [float((i * 37) % 101) for i in range(count)]
    for percent in (0, 50, 99, 100):
        assert bench.percentile(values, percent) == pytest.approx(
            float(numpy.percentile(values, percent))
        )


def test_arrivals_are_a_poisson_process_of_the_rate_asked_for() -> None:
    times = bench.arrivals(LoadSettings(request_rate=20.0, num_prompts=4000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert bench.arrivals(LoadSettings(num_prompts=3)) == [0.0] * 3


# --- prompts ------------------------------------------------------------------------------------------


def test_random_prompts_have_exactly_the_lengths_asked_for_and_repeat() -> None:
    settings = LoadSettings(random_input_len=50, random_output_len=9)
    prompts = bench.make_prompts(settings, 20, 257, seed=3)
    assert {len(p.content) for p in prompts} == {50}
    assert {p.output_len for p in prompts} == {9}
    assert all(0 <= token < 257 for p in prompts for token in p.content)
    assert prompts == bench.make_prompts(settings, 20, 257, seed=3)
    assert prompts != bench.make_prompts(settings, 20, 257, seed=4)


def test_range_ratio_varies_lengths_within_bounds() -> None:
    settings = LoadSettings(random_input_len=100, random_output_len=10, random_range_ratio=0.5)
    prompts = bench.make_prompts(settings, 300, None, seed=0)
    inputs = [len(p.content) for p in prompts]
    assert min(inputs) >= 50
    assert max(inputs) <= 150
    assert len(set(inputs)) > 50
    assert {p.output_len for p in prompts} == set(range(5, 16))


def test_prompts_of_a_file_text_or_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('first one\n\n{"prompt": "second", "output_len": 3}\n{"prompt": "third"}\n')
    settings = LoadSettings(prompts_file=path, random_output_len=8)
    prompts = bench.make_prompts(settings, 4, None, seed=0)
    assert [p.content for p in prompts] == ["first one", "second", "third", "first one"]
    assert [p.output_len for p in prompts] == [8, 3, 8, 8]


@pytest.mark.parametrize("text", ["", "{broken", '{"text": "x"}', '{"prompt": 3}'])
def test_wrong_prompt_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="prompts_file"):
        bench.read_prompts(path, 8)
    with pytest.raises(InvalidInputError, match="No such file"):
        bench.read_prompts(tmp_path / "none", 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompts": 0},
        {"request_rate": 0.0},
        {"random_range_ratio": 1.0},
        {"url": "host:1"},
        {"max_concurrency": 0},
        {"timeout_s": 0.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        LoadSettings(**wrong)


# --- against a server ---------------------------------------------------------------------------------


def test_completions_load_counts_every_token(live: Live) -> None:
    settings = LoadSettings(
        url=live.url, num_prompts=12, random_input_len=10, random_output_len=6, ignore_eos=True
    )
    samples = run(settings)
    assert [s.error for s in samples] == [None] * 12
    assert all((s.input_tokens, s.output_tokens) == (10, 6) for s in samples)
    assert all(len(s.token_times) == 6 for s in samples)
    assert all(s.start < s.token_times[0] <= s.end for s in samples)
    assert all(s.token_times == sorted(s.token_times) for s in samples)
    result = bench.summarise(samples)
    assert (result.input_tokens, result.output_tokens) == (120, 72)
    # A step of the stand-in takes 2 ms at least, and a request needs six.
    assert all(s.end - s.start >= 6 * 0.002 for s in samples)


def test_chat_load_counts_tokens_not_openings(live: Live) -> None:
    settings = LoadSettings(
        url=live.url, endpoint="chat", num_prompts=5, random_input_len=3, random_output_len=7
    )
    samples = run(settings)
    assert [len(s.token_times) for s in samples] == [7] * 5
    assert [s.output_tokens for s in samples] == [7] * 5
    assert all(s.input_tokens > 3 for s in samples)


def test_max_concurrency_is_kept(live: Live) -> None:
    settings = LoadSettings(
        url=live.url, num_prompts=12, max_concurrency=3, random_output_len=5, random_input_len=8
    )
    assert bench.peak_concurrency(run(settings)) == 3
    free = replace(settings, max_concurrency=None)
    assert bench.peak_concurrency(run(free)) > 3


def test_with_a_request_rate_no_request_starts_before_its_time(live: Live) -> None:
    settings = LoadSettings(
        url=live.url, num_prompts=20, request_rate=100.0, random_output_len=1, random_input_len=4
    )
    samples = run(settings)
    first = samples[0].start
    for sample, at in zip(samples, bench.arrivals(settings), strict=True):
        assert sample.start - first >= at - 0.02


def test_refused_requests_are_failures_with_their_reason(live: Live) -> None:
    settings = LoadSettings(url=live.url, num_prompts=2, num_warmups=0, random_input_len=5000)
    samples = run(settings)
    assert all("5000" in (s.error or "") for s in samples)
    assert bench.summarise(samples).failed_requests == 2


def test_no_server_and_unknown_models_are_told(live: Live) -> None:
    with pytest.raises(HeadwayError, match="no server answers at"):
        run(LoadSettings(url="http://127.0.0.1:1", num_prompts=1))
    with pytest.raises(InvalidInputError, match="echo"):
        run(LoadSettings(url=live.url, model="other", num_prompts=1))


def test_streams_cut_anywhere_are_read_alike() -> None:
    chunks = [{"choices": [{"index": 0, "text": t}], "usage": None} for t in ("a", "é", "")]
    chunks.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
    events = [f"data: {json.dumps(c, ensure_ascii=False)}\r\n\r\n" for c in chunks]
    raw = (": a comment\r\n\r\n" + "".join(events) + "data: [DONE]\r\n\r\n").encode()
    for size in (1, 7, len(raw)):

        async def pieces(size: int = size) -> AsyncIterator[bytes]:
            for i in range(0, len(raw), size):
                yield raw[i : i + size]

        sample = Sample(0.0)
        asyncio.run(bench._read_stream(pieces(), sample))
        assert len(sample.token_times) == 3
        assert (sample.input_tokens, sample.output_tokens) == (4, 3)


def test_a_stream_that_ends_in_an_error_is_a_failure(live: Live) -> None:
    settings = LoadSettings(url=live.url, endpoint="chat")
    prompt = bench.Prompt("!fail", 4)

    async def go() -> Sample:
        async with aiohttp.ClientSession() as session:
            return await bench.send(session, settings, "echo", prompt)

    assert "told to fail" in (asyncio.run(go()).error or "")


def test_rows_are_json(live: Live) -> None:
    result = bench.summarise([ONE, TWO])
    row = bench.as_row(LoadSettings(), result)
    assert math.isinf(LoadSettings().request_rate)
    assert json.loads(json.dumps(row, allow_nan=False))["request_rate"] == "inf"
