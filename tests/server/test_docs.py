"""docs/serving.md names what there is: every metric, every field, every error code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headway.server.protocol import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    LABELS,
    ChatCompletionRequest,
    CompletionRequest,
)
from tests.server.live import Live

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
CODE = "".join(path.read_text() for path in (ROOT / "src/headway/server").glob("*.py"))


def test_every_metric_is_described_and_no_other(live: Live) -> None:
    suffixes = r"_(bucket|count|sum|created)$"
    there = {re.sub(suffixes, "", line.split("{")[0].split()[0])
             for line in live.get("/metrics").text.splitlines() if line.startswith("headway_")}  # fmt: skip
    # Counters with labels have no sample before the first request.
    there |= {"headway_requests_total", "headway_choices_finished_total"}
    described = set(re.findall(r"`(headway_\w+?)(?:`|\{)", PAGE))
    assert described == {name for name in there if not name.endswith("_created")} - {
        "headway_requests",
        "headway_choices_finished",
    }


@pytest.mark.parametrize(
    "name",
    sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields,
            *CHAT_NEUTRAL, *COMPLETION_NEUTRAL, *LABELS}),
)  # fmt: skip
def test_every_field_is_described(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_every_error_code_is_described() -> None:
    codes = set(re.findall(r'code(?:: str \| None)? ?= ?"(\w+)"', CODE))
    assert "context_length_exceeded" in PAGE
    assert codes - {"method_not_allowed"}
    for code in codes - {"method_not_allowed"}:
        assert f"`{code}`" in PAGE, code
