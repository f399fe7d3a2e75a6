"""Many short requests, some cancelled at any moment, some failing: is anything lost, does anything leak?

``python -m headway.bench.churn MODEL --requests 10000 --output reading.json`` adds requests at random
times, takes some back, lets the text of some fail in the middle, and some steps as a whole. Afterwards
every request has ended once, every token was told, and every page is free; and the engine says what it
said before.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from headway import flags
from headway.bench import report
from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from headway.engine.request import FinishReason, RequestOutput, SamplingParams
from headway.engine.scheduler import Chunk
from headway.errors import HeadwayError


def params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw.choice((1, 2, 3, 4, 5, 6, 16)),  # some outgrow their pages
        temperature=draw.choice((0.0, 0.0, 1.0)),
        top_k=draw.choice((0, 5)),
        seed=draw.randrange(99),
        prompt_logprobs=draw.choice((None, None, None, 1)),
    )


class Ledger:
    """What has become of each request."""

    def __init__(self) -> None:
        self.ended: dict[str, FinishReason] = {}
        self._said: dict[str, int] = {}

    def take(self, output: RequestOutput) -> None:
        """Enter an output.

        Raises:
            HeadwayError: its request has ended before, or a token was lost on the way.
        """
        name = output.request_id
        if name in self.ended:
            raise HeadwayError(f"request {name} has ended and says something")
        self._said[name] = self._said.get(name, 0) + len(output.new_token_ids)
        # Where an error ends a request, its text failed and not its last token.
        told = (
            output.finish_reason is FinishReason.ERROR or self._said[name] == output.output_tokens
        )
        if not told:
            raise HeadwayError(f"request {name}: a token was lost")
        if output.finish_reason is not None:
            self.ended[name] = output.finish_reason


@contextlib.contextmanager
def failing_steps(llm: LLM, draw: random.Random) -> Iterator[None]:
    """One step in a hundred fails in its model call, before it computes or behind it."""
    runner: Any = llm._runner
    run = runner.run

    def run_or_fail(chunks: Sequence[Chunk]) -> Tensor:
        place = draw.randrange(200)
        if place == 0:
            raise HeadwayError("a step that fails before its model call")
        logits: Tensor = run(chunks)
        if place == 1:
            raise HeadwayError("a step that fails behind its model call")
        return logits

    runner.run = run_or_fail
    logger = logging.getLogger("headway.engine.llm")
    logger.addFilter(_is_meant)
    try:
        yield
    finally:
        runner.run = run
        logger.removeFilter(_is_meant)


def _is_meant(record: logging.LogRecord) -> bool:
    """Keep failures that are asked for out of the log."""
    error = record.exc_info and record.exc_info[1]
    return not (isinstance(error, HeadwayError) and str(error).startswith("a step that fails"))


def churn(llm: LLM, count: int, seed: int) -> Ledger:
    """Run ``count`` requests. Every step may bring arrivals and cancellations."""
    draw = random.Random(seed)
    with failing_steps(llm, random.Random(seed + 1)):
        return _churn(llm, count, draw)


def _churn(llm: LLM, count: int, draw: random.Random) -> Ledger:
    ledger = Ledger()
    added = 0
    vocabulary = min(256, llm.model_config.vocab_size)
    shared = [draw.randrange(vocabulary) for _ in range(24)]
    while added < count or llm.has_unfinished():
        for _ in range(min(draw.randint(0, 6), count - added)):
            own = [draw.randrange(vocabulary)] * draw.randint(1, 20)
            llm.add_request(str(added), shared[: draw.choice((0, 8, 24))] + own, params(draw))
            detokenizer: Any = llm._requests[str(added)].detokenizer
            if detokenizer is not None and draw.random() < 0.02:  # fails in the middle, and alone
                detokenizer._decode = lambda ids: 1 / 0
            added += 1
        for name in list(llm._requests):
            if draw.random() < 0.08 and (output := llm.abort(name)) is not None:
                ledger.take(output)
        for output in llm.step():
            ledger.take(output)
    for output in llm.step():  # what was under way when the last request ended
        raise HeadwayError(f"request {output.request_id} came back")
    return ledger


def check(llm: LLM, ledger: Ledger, count: int) -> None:
    """Raises HeadwayError where a request or a page is missing."""
    missing = set(map(str, range(count))) - set(ledger.ended)
    if missing:
        raise HeadwayError(f"{len(missing)} of {count} requests never ended")
    stats, cache = llm.stats(), llm._prefix_cache
    pages = range(cache.pool.num_pages)
    leaks = {
        "running requests": stats.running,
        "waiting requests": stats.waiting,
        "requests": len(llm._requests),
        "pages in use": stats.pages_used,
        "pages missing": cache.pool.num_pages - cache.num_available,
        "references": sum(cache.pool.references(page) for page in pages),
        "steps under way": int(llm._in_flight is not None and bool(llm._in_flight.drawings)),
    }
    cache.clear()
    leaks["pages lost"] = cache.pool.num_pages - len(set(cache.pool.free_pages()))
    left = {name: number for name, number in leaks.items() if number}
    if left:
        raise HeadwayError(f"left behind: {left}")


def survives(llm: LLM, count: int, seed: int = 1) -> Counter[str]:
    """Churn, check, and see that answers are what they were; how the requests ended."""
    greedy = SamplingParams(max_tokens=8, temperature=0)
    prompts = [[1, 2, 3], list(range(40))]
    before = [one.token_ids for one in llm.generate(prompts, greedy)]
    ledger = churn(llm, count, seed)
    check(llm, ledger, count)
    after = [one.token_ids for one in llm.generate(prompts, greedy)]
    if before != after:
        raise HeadwayError(f"answers have changed: {before} before, {after} after")
    return Counter(reason.value for reason in ledger.ended.values())


@flags.takes(EngineConfig, "config")
def command(
    config: EngineConfig,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 10000,
    output: Annotated[Path | None, typer.Option(help="Write the reading here.")] = None,
) -> None:
    """Requests that come, go and fail, and nothing else."""
    llm = LLM(config)
    start = time.perf_counter()
    ended = survives(llm, requests)
    named = {
        name: getattr(llm.config, name)
        for name in ("overlap", "speculative", "kv_cache_dtype", "page_size")
    }
    row: dict[str, Any] = named | {"requests": requests}
    row |= {f"ended_{reason}": number for reason, number in ended.items()}
    row |= {
        "lost_requests": 0,
        "lost_pages": 0,
        "preemptions": llm.stats().preemptions,
        "output_tokens": llm.stats().output_tokens,
        "graphs": llm.has_graphs,
        "seconds": time.perf_counter() - start,
    }
    print(row)
    if output is not None:
        held = asdict(llm.config) | {"model": Path(config.model).name}
        report.Reading("churn", held, [row]).save(output)


if __name__ == "__main__":
    typer.run(command)
