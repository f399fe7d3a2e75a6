"""``headway eval``: a task of lm-eval against a running server, or against several with other settings.

For the question "did the new kernel change the answers": the same samples go through each server, and the
difference of two scores is given with the standard error of the paired differences, which is far below
that of either score where most answers are the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import statistics
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway import flags
from headway.bench import report
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Score:
    """One metric of a task on one server, with the value of every sample, in the task's order."""

    server: str
    task: str
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean; None for a single sample."""
        return standard_error(self.values)

    def row(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "task": self.task,
            "metric": self.metric,
            "samples": len(self.values),
            "value": self.mean,
            "stderr": self.stderr,
        }


def standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def difference(first: Score, second: Score) -> dict[str, Any]:
    """second - first over the same samples, with the standard error of the paired differences."""
    pairs = [b - a for a, b in zip(first.values, second.values, strict=True)]
    return {
        "server": f"{second.server} - {first.server}",
        "task": first.task,
        "metric": first.metric,
        "samples": len(pairs),
        "value": statistics.fmean(pairs),
        "stderr": standard_error(pairs),
        "changed": sum(pair != 0 for pair in pairs),
    }


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated.

    Args:
        task: name of a task of lm-eval, or of one in --tasks-folder.
        tasks_folder: folder with tasks of your own, as lm-eval's YAML files.
        tokenizer: folder or hub name of the model's tokenizer; default: the model.
        limit: evaluate so many samples of each task only.
        num_fewshot: examples before each question; default: the task's own.
        num_concurrent: requests under way together.
        seed: of the choice of few-shot examples.
    """

    task: str
    tasks_folder: Path | None = None
    tokenizer: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    num_concurrent: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "num_concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(name, value, "at least 1")
        if self.tasks_folder is not None and not self.tasks_folder.is_dir():
            raise InvalidInputError("tasks_folder", self.tasks_folder, "a folder")


def evaluate(settings: EvalSettings, url: str, server: str, api_key: str | None) -> list[Score]:
    """Run the task against one server.

    Raises:
        HeadwayError: lm-eval is not installed, or knows no such task; no server answers.
    """
    model = _first_model(url, api_key)
    with _quiet(api_key), _readable(settings.tokenizer or model) as tokenizer:
        lm_eval, task_manager = _lm_eval(settings)
        arguments = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface",
            "num_concurrent": settings.num_concurrent,
            "max_length": _context(url, api_key),
        }
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=[settings.task],
            task_manager=task_manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return list(scores(found["samples"], server))


@contextlib.contextmanager
def _readable(tokenizer: str) -> Iterator[str]:
    """lm-eval reads folders and hub names: the tokenizer of a GGUF file is written into a folder."""
    from transformers import AutoTokenizer

    from headway.engine.loader import hub_errors

    path = Path(tokenizer)
    packed = path.suffix == ".gguf"
    with hub_errors(tokenizer, "tokenizer"):
        place, file = (path.parent, path.name) if packed else (tokenizer, None)
        found = AutoTokenizer.from_pretrained(place, gguf_file=file)
    if not packed:
        yield tokenizer
        return
    with tempfile.TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        yield folder


def scores(samples: Mapping[str, Sequence[Mapping[str, Any]]], server: str) -> Iterator[Score]:
    """The metrics that lm-eval logged for every sample, as scores."""
    for task, logged in samples.items():
        ordered = sorted(logged, key=lambda sample: sample["doc_id"])
        for metric in ordered[0].get("metrics", ()) if ordered else ():
            values = [sample[metric] for sample in ordered]
            if all(isinstance(value, bool | int | float) for value in values):
                yield Score(server, task, metric, tuple(float(value) for value in values))


def _lm_eval(settings: EvalSettings) -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise HeadwayError(
            f"{error.name} is not installed; in Headway's clone, pip install '.[eval]'"
        ) from None
    folder = settings.tasks_folder
    manager = TaskManager(include_path=None if folder is None else str(folder.resolve()))
    if settings.task not in manager.all_tasks:
        raise InvalidInputError("task", settings.task, "a task of lm-eval, or of --tasks-folder")
    return lm_eval, manager


@contextlib.contextmanager
def _quiet(api_key: str | None) -> Iterator[None]:
    """lm-eval takes its key from the environment, and says much at each step."""
    before = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = api_key or "none"
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["OPENAI_API_KEY"]
        else:
            os.environ["OPENAI_API_KEY"] = before


def _card(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        asked = urllib.request.Request(f"{url}/v1/models", headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as response:
            card: dict[str, Any] = json.load(response)["data"][0]
    except urllib.error.HTTPError as error:
        raise HeadwayError(f"{url}/v1/models: {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:  # ValueError: no URL was given, or no JSON came
        raise HeadwayError(
            f"no server answers at {url} ({type(error).__name__}: {error}); name one with --url"
        ) from None
    return card


def _first_model(url: str, api_key: str | None) -> str:
    return str(_card(url, api_key)["id"])


def _context(url: str, api_key: str | None) -> int:
    return int(_card(url, api_key).get("max_model_len") or 2048) - 1


COLUMNS = (
    report.Column("server", "server"),
    report.Column("task", "task"),
    report.Column("metric", "metric"),
    report.Column("samples", "samples", "d"),
    report.Column("value", "value", ".4f"),
    report.Column("stderr", "± standard error", ".4f"),
    report.Column("changed", "answers that differ", "d"),
)


@flags.takes(EvalSettings, "settings")
def command(
    settings: EvalSettings,
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWAY_API_KEY", help="The server's API key.")
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --url: start a server for each value of a flag, like "
            "backend=auto,reference, and compare them. Needs --serve-model."
        ),
    ] = None,
    serve_model: Annotated[
        str | None, typer.Option(help="Model that the servers of --matrix serve.")
    ] = None,
    serve_flags: Annotated[
        str, typer.Option(help="Flags of headway serve that all of them get.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Write the reading to this JSON file.")
    ] = None,
) -> None:
    """Run a task of lm-eval against a server, and compare servers on it."""
    console = report.console()
    if matrix:
        if serve_model is None:
            raise InvalidInputError("serve_model", None, "the model that the servers serve")
        given = settings if settings.tokenizer else replace(settings, tokenizer=serve_model)
        found = _each(console, given, matrix, serve_model, serve_flags)
    else:
        found = [evaluate(settings, url, url, api_key)]
    rows = [score.row() for server in found for score in server]
    rows += [
        difference(a, b) for server in found[1:] for a, b in zip(found[0], server, strict=True)
    ]
    console.print(report.table(rows, COLUMNS, settings.task))
    if output is not None:
        asked = asdict(settings) | {"serve_flags": serve_flags, "matrix": list(matrix or ())}
        asked["tasks_folder"] = settings.tasks_folder and settings.tasks_folder.name
        asked["tokenizer"] = settings.tokenizer and Path(settings.tokenizer).name
        report.Reading("eval", asked, rows).save(output)
        console.print(f"wrote {output}", markup=False)


def _each(
    console: Console,
    settings: EvalSettings,
    dimensions: Sequence[str],
    model: str,
    serve_flags: str,
) -> list[list[Score]]:
    """The scores of each server of a matrix; all of them must answer."""
    from headway.bench import matrix

    found = []
    for variant in matrix.variants(dimensions):
        console.print(variant.label, markup=False)
        with matrix.serving(model, [*shlex.split(serve_flags), *variant.flags]) as url:
            found.append(evaluate(settings, url, variant.label, None))
    return found
