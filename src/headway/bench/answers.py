"""What a setting of the engine changes in a model's answers, and in how likely it finds a text.

``python -m headway.bench.answers MODEL --settings kv_cache_dtype=auto,fp8_e4m3`` runs the same prompts with
each value. For greedy answers it tells where they part, and how far ahead the first setting's own choice
was there; for texts, the difference of each token's log-probability. Both are paired by token, so the
standard error is that of the change, not of the text. A model without a tokenizer is given random tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway import flags
from headway.bench import report
from headway.bench.evaluate import standard_error
from headway.engine.config import EngineConfig
from headway.engine.request import Completion, SamplingParams
from headway.errors import InvalidInputError

if TYPE_CHECKING:
    from headway.engine.llm import LLM

#: Likeliest tokens that an answer tells beside its own.
TOP = 20


@dataclass(frozen=True)
class Asked:
    """What is run: ``texts`` to score, ``prompts`` to continue by ``output_len`` tokens."""

    texts: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    output_len: int


@dataclass(frozen=True)
class Told:
    """What one setting says."""

    label: str
    scores: tuple[tuple[float, ...], ...]  # of each text, its tokens' log-probabilities
    answers: tuple[Completion, ...]


def ask(llm: LLM, label: str, asked: Asked) -> Told:
    """Score the texts and continue the prompts."""
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    greedy = SamplingParams(
        max_tokens=asked.output_len, temperature=0, logprobs=TOP, ignore_eos=True
    )
    texts = llm.generate(asked.texts, scored)
    answers = llm.generate(asked.prompts, greedy)
    scores = tuple(tuple(entry.logprob for entry in one.prompt_logprobs) for one in texts)
    return Told(label, scores, tuple(answers))


def text_row(first: Told, other: Told) -> dict[str, Any]:
    """Mean log-probability per token, and what ``other`` adds to it, with its standard error.

    The error is that of the mean over texts, whose tokens depend on each other.
    """
    changes = [
        statistics.fmean(b - a for a, b in zip(x, y, strict=True))
        for x, y in zip(first.scores, other.scores, strict=True)
    ]
    pairs = [
        (a, b)
        for x, y in zip(first.scores, other.scores, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return {
        "setting": other.label,
        "beside": first.label,
        "texts": len(changes),
        "tokens": len(pairs),
        "logprob": statistics.fmean(b for _, b in pairs),
        "logprob_beside": statistics.fmean(a for a, _ in pairs),
        "change": statistics.fmean(changes),
        "stderr": standard_error(changes),
        "mean_absolute_change": statistics.fmean(abs(b - a) for a, b in pairs),
    }


def answer_row(first: Told, other: Told) -> dict[str, Any]:
    """How many greedy answers are the same, and where and how closely the others part."""
    places, gaps, unknown = [], [], 0
    for a, b in zip(first.answers, other.answers, strict=True):
        at = _first_difference(a.token_ids, b.token_ids)
        places.append(len(a.token_ids) if at is None else at)
        if at is None:
            continue
        entry = a.logprobs[at]
        likely = dict(entry.top)
        if b.token_ids[at] in likely:
            gaps.append(entry.logprob - likely[b.token_ids[at]])
        else:
            unknown += 1
    length = len(first.answers[0].token_ids)
    return {
        "setting": other.label,
        "beside": first.label,
        "answers": len(places),
        "answer_len": length,
        "equal_answers": sum(place == length for place in places),
        "tokens_before_first_difference": statistics.fmean(places),
        "median_gap": statistics.median(gaps) if gaps else None,
        "largest_gap": max(gaps) if gaps else None,
        "beyond_top": unknown,
    }


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def random_tokens(
    vocab_size: int, count: int, length: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    draw = random.Random(seed)
    low, high = vocab_size // 10, vocab_size - vocab_size // 10
    return tuple(tuple(draw.randrange(low, high) for _ in range(length)) for _ in range(count))


def pieces(llm: LLM, files: Sequence[Path], count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Stretches of the files' text, ``length`` tokens each, from all over them."""
    tokens = [token for file in files for token in llm.encode(file.read_text(encoding="utf-8"))]
    if len(tokens) < length:
        given = f"{len(tokens)} tokens of text"
        raise InvalidInputError("text", given, f"at least {length}")
    step = max(1, (len(tokens) - length) // max(1, count - 1))
    starts = range(0, len(tokens) - length + 1, step)
    return tuple(tuple(tokens[start : start + length]) for start in starts[:count])


COLUMNS = (
    report.Column("setting", "setting"),
    report.Column("tokens", "tokens", "d"),
    report.Column("logprob", "log-prob", ".4f"),
    report.Column("change", "change", "+.5f"),
    report.Column("stderr", "± standard error", ".5f"),
    report.Column("answers", "answers", "d"),
    report.Column("equal_answers", "equal", "d"),
    report.Column("tokens_before_first_difference", "first difference", ".1f"),
    report.Column("median_gap", "gap there", ".4f"),
)


@flags.takes(EngineConfig, "config")
def command(
    config: EngineConfig,
    settings: Annotated[str, typer.Option(help="A field of the engine and its values.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Files to take texts from."),
    ] = None,
    texts: Annotated[int, typer.Option(min=2, help="How many texts are scored.")] = 32,
    text_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts are continued.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Write the reading here.")] = None,
) -> None:
    """Compare answers and scores under the values of a setting."""
    from headway.engine.llm import LLM

    name, _, values = settings.partition("=")
    if name not in {field.name for field in dataclasses.fields(EngineConfig)} or not values:
        raise InvalidInputError("settings", settings, "FIELD=VALUE,VALUE of the engine's settings")
    told: list[Told] = []
    asked: Asked | None = None
    for value in values.split(","):
        changed: dict[str, Any] = {name: value}
        llm = LLM(dataclasses.replace(config, **changed), progress=True)
        if asked is None:
            size = llm.model_config.vocab_size
            asked = Asked(
                pieces(llm, text, texts, text_len)
                if text
                else random_tokens(size, texts, text_len, 1),
                pieces(llm, text, prompts, prompt_len)
                if text
                else random_tokens(size, prompts, prompt_len, 2),
                output_len,
            )
        told.append(ask(llm, f"{name}={value}", asked))
        del llm
        gc.collect()  # captured graphs and their engine refer to each other
    rows = [text_row(told[0], one) | answer_row(told[0], one) for one in told[1:]]
    report.console().print(report.table(rows, COLUMNS, Path(config.model).name))
    if output is not None:
        held = dataclasses.asdict(config) | {"model": Path(config.model).name, "compared": settings}
        held |= {"texts_from": [file.name for file in text or ()]}
        report.Reading("answers", held, rows).save(output)


if __name__ == "__main__":
    typer.run(command)
