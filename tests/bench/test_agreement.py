"""Greedy answers beside transformers': what is a near-tie, and what is another answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.bench.agreement import SETTINGS, Judge, Verdict, run
from tests.engine.conftest import TinyModel, llama, tiny  # noqa: F401 - fixtures


@pytest.mark.parametrize(
    ("same", "gap", "rounding", "verdict"),
    [
        (4, 0.0, 0.0, "equal"),
        (3, 0.1, 0.06, "near-tie"),
        (3, 0.13, 0.06, "different"),
        (0, 0.0, 0.0, "near-tie"),  # as likely to the last bit
    ],
)
def test_verdicts(same: int, gap: float, rounding: float, verdict: str) -> None:
    assert Verdict(4, same, gap, rounding, 0.0).verdict == verdict


@pytest.mark.timeout(120)
def test_float32_answers_are_the_same_under_every_setting(llama: TinyModel) -> None:  # noqa: F811
    rows = run(
        ["llama"],
        [name for name in SETTINGS if name != "portable"],  # runs on GPUs
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_tokens=6,
        model_path=llama.path,
    )
    for row in rows:
        assert (row["equal"], row["prompts"], row["pages_held"]) == (12, 12, 0), row
    assert rows[0]["cached_tokens"] > 0


def test_another_answer_is_found(llama: TinyModel) -> None:  # noqa: F811
    judge = Judge(llama.model, llama.model)
    prompt = [1, 2, 3]
    wanted = judge.greedy(prompt, 6)
    logits: Any = llama.model(torch.tensor([[*prompt, *wanted[:2]]])).logits[0, -1].detach()
    wrong = [*wanted[:2], int(logits.argmin()), *wanted[3:]]
    found = judge.judge(prompt, wanted, wrong)
    assert (found.same, found.verdict) == (2, "different")
    assert found.gap == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert judge.judge(prompt, wanted, wanted).verdict == "equal"
