"""``headway bench generate``: tokens per second of a model in this process, without a server."""

from __future__ import annotations

import gc
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway import flags
from headway.bench import report
from headway.engine.config import EngineConfig
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    from headway.engine.llm import LLM


@dataclass(frozen=True)
class Run:
    """One batch, timed: seconds from the start to each request's first token and to the end."""

    first_token_s: tuple[float, ...]
    total_s: float


def time_batch(llm: LLM, prompts: list[list[int]], output_len: int) -> Run:
    """Generate ``output_len`` tokens, greedily, for all prompts together."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    first: dict[str, float] = {}
    tokens = 0
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        llm.add_request(str(i), prompt, params)
    while llm.has_unfinished():
        for output in llm.step():
            if output.error is not None:
                raise HeadwayError(f"generation failed: {output.error}")
            tokens += len(output.new_token_ids)
            first.setdefault(output.request_id, time.perf_counter() - start)
    total = time.perf_counter() - start
    if tokens != len(prompts) * output_len:
        raise HeadwayError(f"got {tokens} tokens; want {len(prompts)} times {output_len}")
    return Run(tuple(first.values()), total)


def measure(
    llm: LLM, batch_size: int, input_len: int, output_len: int, repeats: int, seed: int
) -> dict[str, Any]:
    """A reading's row: ``repeats`` runs on fresh random prompts, after one that warms up.

    ``output_throughput`` counts everything, prefill included, as generate() users see it;
    ``decode_throughput`` is that of the time after every request has its first token. Medians of runs.
    """
    draw = random.Random(seed)
    vocab_size = llm.model_config.vocab_size
    tokens = range(vocab_size // 10, vocab_size - vocab_size // 10)

    def run() -> Run:
        prompts = [draw.choices(tokens, k=input_len) for _ in range(batch_size)]
        gc.collect()
        return time_batch(llm, prompts, output_len)

    run()
    runs = [run() for _ in range(repeats)]
    totals = [one.total_s for one in runs]
    output = batch_size * output_len
    decode = [one.total_s - max(one.first_token_s) for one in runs]
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "repeats": repeats,
        "total_s": statistics.median(totals),
        "output_throughput": output / statistics.median(totals),
        "best_output_throughput": output / min(totals),
        "decode_throughput": batch_size * (output_len - 1) / statistics.median(decode)
        if output_len > 1
        else None,
        "ttft_ms": 1e3 * statistics.median(t for one in runs for t in one.first_token_s),
        "runs_s": totals,
    }


COLUMNS = (
    report.Column("batch_size", "sequences", "d"),
    report.Column("input_len", "in", "d"),
    report.Column("output_len", "out", "d"),
    report.Column("output_throughput", "tok/s", ".1f"),
    report.Column("best_output_throughput", "best tok/s", ".1f"),
    report.Column("decode_throughput", "decode tok/s", ".1f"),
    report.Column("ttft_ms", "TTFT (ms)", ".1f"),
)


@flags.takes(EngineConfig, "config")
def command(
    config: EngineConfig,
    batch_sizes: Annotated[
        str, typer.Option(help="Sequences generated together, a list like 1,16.")
    ] = "1,16",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each random prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each batch size.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this JSON file.")
    ] = None,
) -> None:
    """Measure a model in this process: greedy generation for batches of random prompts."""
    from rich.console import Console

    sizes = _sizes(batch_sizes)
    import torch

    from headway.engine.llm import LLM

    if threads is not None:
        torch.set_num_threads(threads)
    llm = LLM(config, progress=True)
    rows = [measure(llm, size, input_len, output_len, repeats, config.seed) for size in sizes]
    console = Console()
    title = f"{Path(config.model).stem}, {llm.dtype}, {llm.device}".replace("torch.", "")
    console.print(report.table(rows, COLUMNS, title))
    if output is not None:
        settings = asdict(config) | {
            "model": Path(config.model).name,
            "dtype": str(llm.dtype).removeprefix("torch."),
            "device": str(llm.device),
            "threads": torch.get_num_threads(),
        }
        report.Reading("generate", settings, rows).save(output)
        console.print(f"wrote {output}", markup=False)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InvalidInputError("batch_sizes", repr(text), "numbers of at least 1, like 1,16")
    return sizes
