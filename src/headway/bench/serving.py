"""``headway bench serve``: load for any OpenAI-compatible server, and what its clients see.

Every request streams. Definitions are those of vLLM's serving benchmark:

- TTFT: from sending a request to its first token;
- ITL: the time between two consecutive chunks that carry tokens, over all requests;
- TPOT: of each request, (its latency - TTFT) / (output tokens - 1), where it has more than one;
- throughputs: totals of the successful requests over the duration of the whole run;
- peak output throughput: most tokens that arrived within one second, seconds counted from the start.

Peak concurrency is exact: the most requests that were under way at one moment. A chat chunk that only
opens or closes a message carries no token and is not counted.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from headway import flags
from headway.bench import report
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    import aiohttp
    from rich.console import Console

T = TypeVar("T")
Endpoint = Literal["completions", "chat"]

_PATHS: dict[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}
#: Vocabulary assumed where the server's model card tells none; hardly any model's is smaller.
_COMMON_VOCABULARY = 32000
#: Words that are one token each, with the space before them, in the tokenizers of common models.
_WORDS = (
    "the of and to in is that it was for on are as with they be at one have this from by hot but some what "
    "there we can out other were all your when up use how said an each she which their time if will way "
    "about many then them would write like so these her long make thing see him two has look more day"
)


@dataclass(frozen=True)
class LoadSettings:
    """What load to make.

    Args:
        url: where the server is.
        model: model to ask for; default: the first that the server lists.
        endpoint: completions takes token ids, so that random prompts have exactly the length asked for.
        num_prompts: how many requests to make.
        request_rate: requests per second, arriving as a Poisson process; inf: all at once.
        max_concurrency: most requests under way together; default: no limit.
        random_input_len: tokens of a random prompt.
        random_output_len: tokens to generate.
        random_range_ratio: r varies both lengths, uniformly between (1 - r) and (1 + r) times.
        prompts_file: a prompt a line, or JSON objects with "prompt" and, if wished, "output_len".
        seed: of prompts, lengths and arrival times.
        ignore_eos: generate to the full output length (vLLM, SGLang and Headway understand it).
        temperature: 0 is greedy.
        num_warmups: requests sent before the run and not counted.
        timeout_s: longest time for one request, in seconds.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    endpoint: Endpoint = "completions"
    num_prompts: int = 100
    request_rate: float = math.inf
    max_concurrency: int | None = None
    random_input_len: int = 128
    random_output_len: int = 64
    random_range_ratio: float = 0.0
    prompts_file: Path | None = None
    seed: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    num_warmups: int = 1
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, bool, str], ...] = (
            ("num_prompts", self.num_prompts >= 1, "at least 1"),
            ("request_rate", self.request_rate > 0, "more than 0, or inf"),
            (
                "max_concurrency",
                self.max_concurrency is None or self.max_concurrency >= 1,
                "at least 1, or None",
            ),
            ("random_input_len", self.random_input_len >= 1, "at least 1"),
            ("random_output_len", self.random_output_len >= 1, "at least 1"),
            ("random_range_ratio", 0 <= self.random_range_ratio < 1, "at least 0, less than 1"),
            ("num_warmups", self.num_warmups >= 0, "0 or more"),
            ("timeout_s", self.timeout_s > 0, "more than 0 seconds"),
            ("url", self.url.startswith(("http://", "https://")), "http://HOST:PORT"),
        )
        for name, holds, wanted in limits:
            if not holds:
                raise InvalidInputError(name, getattr(self, name), wanted)


@dataclass(frozen=True)
class Prompt:
    """One request to make: token ids, or text, and how much to generate."""

    content: str | list[int]
    output_len: int


@dataclass
class Sample:
    """What became of one request. Times are perf_counter's, in seconds."""

    start: float
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)  # of the chunks that carried tokens
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def itls(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is no second one."""
        if self.output_tokens < 2:
            return None
        return (self.end - self.start - self.ttft) / (self.output_tokens - 1)


# --- prompts ------------------------------------------------------------------------------------------


def make_prompts(
    settings: LoadSettings, count: int, vocab_size: int | None, seed: int
) -> list[Prompt]:
    """The prompts of a run: from the file, or random ones of exactly the lengths drawn.

    Completions are sent token ids, so their count is exact on every server. A chat takes text: one
    common word per token wished for, and the counts reported are the server's own.
    """
    if settings.prompts_file is not None:
        given = read_prompts(settings.prompts_file, settings.random_output_len)
        return [given[i % len(given)] for i in range(count)]
    draw = random.Random(seed)
    size = vocab_size or _COMMON_VOCABULARY
    # The ends of a vocabulary are where special tokens live.
    tokens = range(size // 10, max(size // 10 + 1, size - size // 10))
    words = _WORDS.split()

    def length(middle: int) -> int:
        ratio = settings.random_range_ratio
        low, high = math.floor(middle * (1 - ratio)), math.ceil(middle * (1 + ratio))
        return draw.randint(max(1, low), high)

    def prompt() -> Prompt:
        size = length(settings.random_input_len)
        if settings.endpoint == "chat":
            content: str | list[int] = " ".join(draw.choices(words, k=size))
        else:
            content = draw.choices(tokens, k=size)
        return Prompt(content, length(settings.random_output_len))

    return [prompt() for _ in range(count)]


def read_prompts(path: Path, output_len: int) -> list[Prompt]:
    """Prompts of a file: one a line, as text or as JSON objects with a field ``prompt``."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InvalidInputError("prompts_file", f"{path} ({error.strerror})", "a file") from None
    if not lines:
        raise InvalidInputError("prompts_file", f"{path}, empty", "a prompt a line")
    return [_read_prompt(path, i, line, output_len) for i, line in enumerate(lines, 1)]


def _read_prompt(path: Path, number: int, line: str, output_len: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(line, output_len)
    wanted = 'text, or a JSON object like {"prompt": "...", "output_len": 64}'
    try:
        item = json.loads(line)
        prompt, length = item["prompt"], int(item.get("output_len", output_len))
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError("prompts_file", f"{path}, line {number}", wanted) from None
    if not isinstance(prompt, str) or length < 1:
        raise InvalidInputError("prompts_file", f"{path}, line {number}", wanted)
    return Prompt(prompt, length)


def payload(settings: LoadSettings, model: str, prompt: Prompt) -> dict[str, Any]:
    """The body of one request."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": prompt.output_len,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt.content}]
    else:
        body["prompt"] = prompt.content
    if settings.ignore_eos:
        body["ignore_eos"] = True
    return body


# --- one request --------------------------------------------------------------------------------------


async def send(
    session: aiohttp.ClientSession, settings: LoadSettings, model: str, prompt: Prompt
) -> Sample:
    """Make one request and time its stream. Failures are in ``Sample.error``, never raised."""
    import aiohttp

    body = payload(settings, model, prompt)
    sample = Sample(time.perf_counter())
    try:
        async with session.post(
            _address(settings, _PATHS[settings.endpoint]), json=body
        ) as response:
            if response.status != 200:
                sample.error = _reason(response.status, await response.read())
            else:
                await _read_stream(response.content.iter_any(), sample)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = sample.end or time.perf_counter()
    if sample.error is None and not sample.token_times:
        sample.error = "the stream carried no token"
    if sample.error is None and sample.output_tokens == 0:
        sample.output_tokens = len(sample.token_times)  # a server that reports no usage
    return sample


def _address(settings: LoadSettings, path: str) -> str:
    return settings.url.rstrip("/") + path


def _reason(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"


async def _read_stream(pieces: AsyncIterator[bytes], sample: Sample) -> None:
    buffer = b""
    async for piece in pieces:
        now = time.perf_counter()
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and event[5:].strip() != b"[DONE]":
                _take_event(json.loads(event[5:]), now, sample)


def _take_event(data: dict[str, Any], now: float, sample: Sample) -> None:
    if "error" in data:
        sample.error = str(data["error"])
        return
    if any(_carries_token(choice) for choice in data.get("choices", ())):
        sample.token_times.append(now)
        sample.end = now
    usage = data.get("usage")
    if usage:
        sample.input_tokens = usage.get("prompt_tokens", 0)
        sample.output_tokens = usage.get("completion_tokens", 0)


def _carries_token(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return "text" in choice
    texts = [delta.get(name) for name in ("content", "reasoning_content", "reasoning")]
    return any(text is not None for text in texts) and (any(texts) or "role" not in delta)


# --- many requests ------------------------------------------------------------------------------------


async def run_load(
    settings: LoadSettings,
    *,
    api_key: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Sample], str]:
    """Warm up, make the load, and return one sample per request and the model's name.

    ``advance`` is called as each request ends. Raises HeadwayError where the server cannot be used.
    """
    import aiohttp

    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    seconds = settings.timeout_s
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=timeout,
        trust_env=True,
    ) as session:
        card = await _model_card(session, settings)
        model = str(card["id"])
        vocab_size = card.get("vocab_size")
        for prompt in make_prompts(settings, settings.num_warmups, vocab_size, settings.seed + 1):
            sample = await send(session, settings, model, prompt)
            if sample.error is not None:
                raise HeadwayError(f"the warm-up request failed: {sample.error}")
        prompts = make_prompts(settings, settings.num_prompts, vocab_size, settings.seed)
        return await _send_all(session, settings, model, prompts, advance), model


async def _send_all(
    session: aiohttp.ClientSession,
    settings: LoadSettings,
    model: str,
    prompts: Sequence[Prompt],
    advance: Callable[[], None],
) -> list[Sample]:
    places = asyncio.Semaphore(settings.max_concurrency or len(prompts))

    async def one(prompt: Prompt) -> Sample:
        async with places:
            sample = await send(session, settings, model, prompt)
        advance()
        return sample

    tasks = []
    started = time.perf_counter()
    for at, prompt in zip(arrivals(settings), prompts, strict=True):
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(prompt)))
    return list(await asyncio.gather(*tasks))


def arrivals(settings: LoadSettings) -> list[float]:
    """When each request is sent, in seconds from the start."""
    if math.isinf(settings.request_rate):
        return [0.0] * settings.num_prompts
    draw = random.Random(settings.seed)
    at, times = 0.0, []
    for _ in range(settings.num_prompts):
        times.append(at)
        at += draw.expovariate(settings.request_rate)
    return times


async def _model_card(session: aiohttp.ClientSession, settings: LoadSettings) -> dict[str, Any]:
    """The card of the model asked for, or of the server's first one."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with session.get(_address(settings, "/v1/models"), timeout=timeout) as response:
            status, body = response.status, await response.read()
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise HeadwayError(
            f"no server answers at {settings.url} ({type(error).__name__}: {error}); "
            "start one, or name another with --url"
        ) from None
    if status != 200:
        if settings.model is not None and status in (404, 405, 501):
            return {"id": settings.model}
        raise HeadwayError(f"{settings.url}/v1/models: {_reason(status, body)}")
    cards: list[dict[str, Any]] = json.loads(body)["data"]
    if settings.model is None:
        return cards[0]
    found = next((card for card in cards if card["id"] == settings.model), None)
    if found is None:
        names = " or ".join(str(card["id"]) for card in cards)
        raise InvalidInputError("model", settings.model, f"a model served there: {names}")
    return found


# --- what it comes to ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadResult:
    """One run, summed up. Latencies in milliseconds, throughputs per second."""

    successful_requests: int
    failed_requests: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    peak_output_throughput: float
    peak_concurrency: int
    mean_ttft_ms: float | None
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    mean_tpot_ms: float | None
    median_tpot_ms: float | None
    p99_tpot_ms: float | None
    mean_itl_ms: float | None
    median_itl_ms: float | None
    p99_itl_ms: float | None
    mean_e2el_ms: float | None
    median_e2el_ms: float | None
    p99_e2el_ms: float | None


def summarise(samples: Sequence[Sample]) -> LoadResult:
    """The figures of a run."""
    good = [sample for sample in samples if sample.error is None]
    duration = max(s.end for s in samples) - min(s.start for s in samples)
    output = sum(sample.output_tokens for sample in good)
    total = output + sum(sample.input_tokens for sample in good)
    latencies: dict[str, list[float]] = {
        "ttft": [sample.ttft for sample in good],
        "tpot": [sample.tpot for sample in good if sample.tpot is not None],
        "itl": [itl for sample in good for itl in sample.itls],
        "e2el": [sample.end - sample.start for sample in good],
    }
    figures = {}
    for name, values in latencies.items():
        figures[f"mean_{name}_ms"] = 1e3 * statistics.fmean(values) if values else None
        figures[f"median_{name}_ms"] = 1e3 * statistics.median(values) if values else None
        figures[f"p99_{name}_ms"] = 1e3 * percentile(values, 99) if values else None
    return LoadResult(
        successful_requests=len(good),
        failed_requests=len(samples) - len(good),
        duration_s=duration,
        input_tokens=total - output,
        output_tokens=output,
        request_throughput=len(good) / duration,
        output_throughput=output / duration,
        total_throughput=total / duration,
        # A run of less than a second has no second to be counted in.
        peak_output_throughput=max(peak_output_throughput(good), output / duration),
        peak_concurrency=peak_concurrency(samples),
        **figures,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def peak_output_throughput(samples: Sequence[Sample]) -> float:
    """Most tokens within one second. Where chunks carry several tokens, each counts for its share."""
    if not samples:
        return 0.0
    start = min(sample.start for sample in samples)
    seconds: dict[int, float] = {}
    for sample in samples:
        share = sample.output_tokens / len(sample.token_times)
        for at in sample.token_times:
            second = int(at - start)
            seconds[second] = seconds.get(second, 0.0) + share
    return max(seconds.values())


def peak_concurrency(samples: Sequence[Sample]) -> int:
    """Most requests under way at one moment."""
    events = [(s.start, 1) for s in samples] + [(s.end, -1) for s in samples]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def as_row(settings: LoadSettings, result: LoadResult) -> dict[str, Any]:
    """The result as a reading's row, with the load that made it."""
    rate = settings.request_rate
    load = {
        "endpoint": settings.endpoint,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "max_concurrency": settings.max_concurrency,
    }
    return load | asdict(result)


# --- the command --------------------------------------------------------------------------------------

_LINES = (
    ("Successful requests", "successful_requests", "d"),
    ("Failed requests", "failed_requests", "d"),
    ("Benchmark duration (s)", "duration_s", ".2f"),
    ("Total input tokens", "input_tokens", "d"),
    ("Total generated tokens", "output_tokens", "d"),
    ("Request throughput (req/s)", "request_throughput", ".2f"),
    ("Output token throughput (tok/s)", "output_throughput", ".2f"),
    ("Peak output token throughput (tok/s)", "peak_output_throughput", ".2f"),
    ("Peak concurrent requests", "peak_concurrency", "d"),
    ("Total token throughput (tok/s)", "total_throughput", ".2f"),
)
_LATENCIES = (
    ("Time to first token (TTFT)", "ttft"),
    ("Time per output token after the first (TPOT)", "tpot"),
    ("Inter-token latency (ITL)", "itl"),
    ("End-to-end latency", "e2el"),
)


@flags.takes(LoadSettings, "settings")
def command(
    settings: LoadSettings,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWAY_API_KEY", help="The server's API key.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this JSON file.")
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(
            help="Start, load and stop a server for each value of a flag, like backend=auto,fa3; "
            "may be repeated for all combinations. Needs --serve-model."
        ),
    ] = None,
    serve_model: Annotated[
        str | None, typer.Option(help="Model that the servers of --matrix serve.")
    ] = None,
    serve_flags: Annotated[
        str, typer.Option(help="Flags of headway serve that all of them get.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the servers of --matrix into this PNG file.")
    ] = None,
) -> None:
    """Put load on an OpenAI-compatible server and measure what its clients see."""
    console = report.console()
    if matrix:
        _compare(console, settings, matrix, serve_model, serve_flags, output, plot)
        return
    if serve_model is not None or plot is not None:
        name, given = ("serve_model", serve_model) if serve_model else ("plot", plot)
        raise InvalidInputError(name, given, "none without --matrix")
    samples, model = _load(settings, api_key)
    failures = [sample.error for sample in samples if sample.error is not None]
    if len(failures) == len(samples):
        raise HeadwayError(f"all {len(samples)} requests failed; the first: {failures[0]}")
    result = summarise(samples)
    _show(console, result, f"{model} at {settings.url}")
    if failures:
        console.print(f"the first of {len(failures)} failures: {failures[0]}", markup=False)
    if output is not None:
        asked = asdict(settings) | {"model": model, "request_rate": str(settings.request_rate)}
        if settings.prompts_file is not None:
            asked["prompts_file"] = settings.prompts_file.name
        report.Reading("serve", asked, [as_row(settings, result)]).save(output)
        console.print(f"wrote {output}", markup=False)


def _load(settings: LoadSettings, api_key: str | None) -> tuple[list[Sample], str]:
    """``run_load`` with a bar where somebody is watching."""
    from rich.console import Console
    from rich.progress import Progress

    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("Requests", total=settings.num_prompts)
        advance = functools.partial(progress.advance, bar)
        return _run_fast(run_load(settings, api_key=api_key, advance=advance))


def _run_fast(work: Coroutine[Any, Any, T]) -> T:
    """By uvloop where it is: a client that is slower than the server measures itself."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _compare(
    console: Console,
    settings: LoadSettings,
    dimensions: Sequence[str],
    model: str | None,
    flags_: str,
    output: Path | None,
    plot: Path | None,
) -> None:
    """``--matrix``: one server after the other, one table of them all."""
    from headway.bench import matrix

    if model is None:
        raise InvalidInputError("serve_model", None, "the model that the servers serve")

    def load(url: str) -> dict[str, Any]:
        here = replace(settings, url=url)
        samples, _ = _load(here, None)
        if all(sample.error is not None for sample in samples):
            raise HeadwayError(f"all {len(samples)} requests failed: {samples[0].error}")
        return as_row(here, summarise(samples))

    def told(text: str) -> None:
        console.print(text, markup=False)

    asked = asdict(settings) | {"model": Path(model).name, "matrix": list(dimensions)}
    asked |= {"request_rate": str(settings.request_rate), "serve_flags": flags_}
    asked.pop("prompts_file")

    def so_far(rows: list[dict[str, Any]]) -> None:
        if output is not None:  # a run that is stopped has these
            report.Reading("serve", asked, rows).save(output)

    rows = matrix.run(model, flags_, dimensions, load, told, so_far)
    measured = [row for row in rows if "error" not in row]
    if not measured:
        raise HeadwayError("no server could be measured; the reasons are above")
    console.print(report.table(measured, matrix.COLUMNS, Path(model).name))
    if plot is not None:
        matrix.plot(measured, plot)
        console.print(f"wrote {plot}", markup=False)
    if output is not None:
        console.print(f"wrote {output}", markup=False)


def _show(console: Console, result: LoadResult, title: str) -> None:
    from rich.table import Table

    figures = asdict(result)
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, key, form in _LINES:
        table.add_row(label, format(figures[key], form))
    for label, key in _LATENCIES:
        table.add_section()
        for kind in ("mean", "median", "p99"):
            value = figures[f"{kind}_{key}_ms"]
            table.add_row(f"{label}, {kind} (ms)", "-" if value is None else f"{value:.2f}")
    console.print(table)
