"""``headway bench generate``: tokens per second of a model in this process, alone or beside peers.

With ``--peers`` other engines run the same prompts in the same run, turn by turn, so that a noisy machine
treats all alike.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway import __version__, flags
from headway.bench import report
from headway.bench.peers import Peer, Run, TransformersPeer, VllmPeer, export
from headway.bench.serving import Sample, summarise
from headway.engine import parallel
from headway.engine.collector import settled
from headway.engine.config import EngineConfig
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    from headway.engine.llm import LLM


#: Output tokens of the round that warms up, and the most prompt tokens together where nothing is decoded.
WARM_UP_TOKENS, WARM_UP_PROMPT_TOKENS = 8, 1 << 18


class Headway(Peer):
    """The built-in engine."""

    name = "headway"
    version = __version__

    def __init__(self, llm: LLM, name: str = "headway") -> None:
        self._llm = llm
        self.name = name

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        samples = [Sample(start, input_tokens=len(prompt)) for prompt in prompts]
        for i, prompt in enumerate(prompts):
            self._llm.add_request(str(i), prompt, params)
        while self._llm.has_unfinished():
            outputs = self._llm.step()
            now = time.perf_counter()
            for output in outputs:
                if output.error is not None:
                    raise HeadwayError(f"generation failed: {output.error}")
                sample = samples[int(output.request_id)]
                sample.token_times.append(now)
                sample.output_tokens += len(output.new_token_ids)
                sample.end = now
        total = time.perf_counter() - start
        tokens = sum(sample.output_tokens for sample in samples)
        if tokens != len(prompts) * output_len:
            raise HeadwayError(f"got {tokens} tokens; want {len(prompts)} times {output_len}")
        firsts = sorted(sample.ttft for sample in samples)
        return Run(tuple(firsts), total, tuple(samples))


@dataclass(frozen=True)
class Shape:
    """What is generated: ``batch_size`` sequences of ``input_len`` tokens, ``output_len`` more each."""

    batch_size: int
    input_len: int
    output_len: int


def measure(
    engines: Sequence[Peer], shape: Shape, repeats: int, vocab_size: int, seed: int
) -> list[dict[str, Any]]:
    """One row per engine: ``repeats`` runs on fresh random prompts, after one that warms up.

    Engines take turns, on the same prompts, each in another place of the order every time. The first
    round generates a few tokens: everything is compiled then.
    """
    draw = random.Random(seed)
    tokens = range(vocab_size // 10, vocab_size - vocab_size // 10)
    runs: dict[str, list[Run]] = {engine.name: [] for engine in engines}
    for round_number in range(repeats + 1):
        prompts = [draw.choices(tokens, k=shape.input_len) for _ in range(shape.batch_size)]
        turn = round_number % len(engines)
        for engine in (*engines[turn:], *engines[:turn]):
            if round_number == 0:
                few = max(1, WARM_UP_PROMPT_TOKENS // shape.input_len)
                count = few if shape.output_len == 1 else shape.batch_size
                engine.generate(prompts[:count], min(shape.output_len, WARM_UP_TOKENS))
            else:
                runs[engine.name].append(engine.generate(prompts, shape.output_len))
    return [as_row(engine, shape, runs[engine.name]) for engine in engines]


def as_row(engine: Peer, shape: Shape, runs: Sequence[Run]) -> dict[str, Any]:
    """A reading's row, of the medians of the runs.

    ``output_throughput`` counts everything, prefill included, as a caller of generate sees it;
    ``decode_throughput`` is that of the time after every sequence has its first token. Latencies are those
    of the median run, as ``headway bench serve`` defines them.
    """
    totals = [run.total_s for run in runs]
    output = shape.batch_size * shape.output_len
    firsts = [first for run in runs for first in run.first_token_s]
    decode = [run.total_s - max(run.first_token_s) for run in runs if run.first_token_s]
    later = shape.batch_size * (shape.output_len - 1)
    middle = sorted(runs, key=lambda run: run.total_s)[(len(runs) - 1) // 2]
    block = asdict(summarise(middle.samples)) if middle.samples else {}
    return block | {
        "engine": engine.name,
        "version": engine.version,
        **asdict(shape),
        "total_s": statistics.median(totals),
        "output_throughput": output / statistics.median(totals),
        "total_throughput": (output + shape.batch_size * shape.input_len)
        / statistics.median(totals),
        "best_output_throughput": output / min(totals),
        "decode_throughput": later / statistics.median(decode) if decode and later else None,
        "ttft_ms": 1e3 * statistics.median(firsts) if firsts else None,
        "runs_s": totals,
    }


COLUMNS = (
    report.Column("engine", "engine"),
    report.Column("batch_size", "sequences", "d"),
    report.Column("input_len", "in", "d"),
    report.Column("output_len", "out", "d"),
    report.Column("output_throughput", "tok/s", ".1f"),
    report.Column("best_output_throughput", "best tok/s", ".1f"),
    report.Column("total_throughput", "in + out tok/s", ".1f"),
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
        int | None, typer.Option(min=1, help="CPU threads of torch; default: its own choice.")
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(help="Instead: a list of SEQUENCESxINxOUT, like 256x1000x1000,256x8000x1."),
    ] = "",
    backends: Annotated[
        str, typer.Option(help="Attention backends to run one after the other, like auto,portable.")
    ] = "",
    peers: Annotated[
        str, typer.Option(help="Engines to run beside: transformers, vllm, or both with a comma.")
    ] = "",
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python of the environment that vLLM is installed in.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this JSON file.")
    ] = None,
) -> None:
    """Measure a model in this process: greedy generation for batches of random prompts."""
    from headway.engine import early

    early.launch(config)
    wanted_shapes = [Shape(size, input_len, output_len) for size in _sizes(batch_sizes)]
    if shapes:
        wanted_shapes = [_shape(text) for text in shapes.split(",")]
    names = [name for name in backends.split(",") if name]
    if names and peers:
        raise InvalidInputError("backends", repr(backends), "none with --peers, which take turns")
    wanted = _peer_names(peers, vllm_python)

    console = report.console()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}  # of the last one that ran
    for backend in names or [config.attention_backend]:
        one = replace(config, attention_backend=backend)
        label = f"headway {backend}" if names else "headway"
        try:
            found, facts = _run(one, label, wanted_shapes, repeats, wanted, vllm_python)
        except Exception as error:  # the other backends are still worth a row
            if not names:
                raise
            said = str(error) if isinstance(error, HeadwayError) else repr(error)
            console.print(f"{label}: {said}", markup=False)
            found = [{"engine": label, "error": said}]
        rows += found
        if facts and output is not None and parallel.rank() == 0:  # a run that is stopped has these
            _save(output, config, rows, facts | {"repeats": repeats, "backends": names})
        gc.collect()  # captured graphs and their engine refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not facts:
        raise HeadwayError("no backend could run the model")
    if parallel.rank() > 0:
        return
    title = f"{Path(config.model).name}, {facts['dtype']}, {facts['device']}"
    measured = [row for row in rows if "error" not in row]
    console.print(report.table(measured, COLUMNS, title))
    if output is not None:
        console.print(f"wrote {output}", markup=False)


def _save(
    output: Path, config: EngineConfig, rows: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    import torch

    settings = asdict(config) | facts | {"model": Path(config.model).name}
    settings["threads"] = torch.get_num_threads()
    report.Reading("generate", settings, rows).save(output)


def _run(
    config: EngineConfig,
    label: str,
    shapes: Sequence[Shape],
    repeats: int,
    peers: Sequence[str],
    vllm_python: Path | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one engine and its peers, and the engine's dtype and device."""
    from headway.engine.llm import LLM
    from headway.engine.warm_up import warm_up

    llm = LLM(config, progress=True)
    warm_up(llm)
    dtype = str(llm.dtype).removeprefix("torch.")
    with ExitStack() as stack:
        engines: list[Peer] = [Headway(llm, label)]
        if peers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = export(config.model, dtype, folder)
            for name in peers:
                peer = _start(name, model, dtype, str(llm.device), vllm_python, llm.max_model_len)
                stack.callback(peer.close)
                engines.append(peer)
        stack.enter_context(settled())
        vocab_size = llm.model_config.vocab_size
        rows = [
            row
            for shape in shapes
            for row in measure(engines, shape, repeats, vocab_size, config.seed)
        ]
    return rows, {"dtype": dtype, "device": str(llm.device)}


def _start(
    name: str,
    model: Path,
    dtype: str,
    device: str,
    vllm_python: Path | None,
    max_model_len: int,
) -> Peer:
    if name == "transformers":
        return TransformersPeer(model, dtype, device)
    assert vllm_python is not None
    return VllmPeer(model, dtype, python=vllm_python, max_model_len=max_model_len)


def _peer_names(text: str, vllm_python: Path | None) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not set(names) <= {"transformers", "vllm"}:
        raise InvalidInputError("peers", repr(text), "transformers, vllm, or transformers,vllm")
    if "vllm" in names and vllm_python is None:
        raise InvalidInputError(
            "vllm_python", None, "the python of an environment with vLLM, for --peers vllm"
        )
    return names


def _shape(text: str) -> Shape:
    words = text.split("x")
    if len(words) == 3 and all(word.isdigit() and int(word) > 0 for word in words):
        return Shape(*map(int, words))
    raise InvalidInputError("shapes", repr(text), "SEQUENCESxINxOUT, like 256x1000x1000")


def _sizes(text: str) -> Iterable[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InvalidInputError("batch_sizes", repr(text), "numbers of at least 1, like 1,16")
    return sizes
