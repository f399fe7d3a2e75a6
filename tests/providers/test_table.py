"""The documented tables are the capabilities, and the capabilities are those of the packages."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headway import providers
from headway.providers import order, table
from headway.providers.base import Feature
from tests.stand_ins import installed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "providers.md"


def test_the_page_says_what_the_capabilities_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == table.written(text), "run python -m headway.providers.table docs/providers.md"


@pytest.mark.parametrize(
    ("name", "kind", "package", "title"),
    [
        ("fa2", "sm90", "fa2", "sm80 and newer"),
        ("fa3", "sm90", "sgl", "sm90"),
        ("fa3", "sm80", "sgl", "sm80"),
        ("fa4", "sm90", "fa4", "sm90"),
        ("fa4", "sm100", "fa4", "sm100"),
        ("fa4", "sm120", "fa4", "sm80, sm120"),
        ("flashinfer", "sm90", "flashinfer", "sm80 and newer"),
        ("aiter", "gfx950", "aiter", "gfx950"),
        ("aiter", "gfx942", "aiter", "gfx942"),
        ("mate", "mp31", "mate", "MUSA"),
    ],
)
def test_what_is_documented_holds_with_the_package_installed(
    name: str, kind: str, package: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headway.providers import _packages

    with installed(kind, package):
        monkeypatch.setattr(_packages, "_version", lambda distribution: "4.0.0b36")
        provider = providers.get(name)
        here = provider.capabilities(torch.device("cpu"))
        documented = provider.documented()[title]
    for part in ("dtypes", "features", "head_dims", "kv_layouts", "exclusions", "sink_dtypes"):
        assert getattr(here, part) == getattr(documented, part), part


def test_every_provider_but_the_reference_is_documented() -> None:
    for name in providers.NAMES:
        assert bool(providers.get(name).documented()) == (name not in providers.PINNED_ONLY)


def test_the_table_knows_what_each_cell_means() -> None:
    cells = dict(table.columns())
    assert Feature.APPEND not in cells["fa4 (sm90)"].features
    assert Feature.APPEND in cells["fa3 (sm90)"].features
    lines = table.tables().splitlines()
    head = next(line for line in lines if "fa4 (sm90)" in line)
    at = [cell.strip() for cell in head.split("|")].index("fa4 (sm90)")
    # What is part of a missing feature is missing too.
    for row in ("| k / v (append", "| cu_seqlens_k_new", "| rotary_seqlens"):
        line = next(line for line in lines if line.startswith(row))
        assert line.split("|")[at].strip() == "no"


def test_status_says_what_is_installed_and_what_it_can_do() -> None:
    with installed("sm90", "flashinfer", "fa3_fwd"):
        rows = {row.provider: row for row in table.status(torch.device("cpu"))}
    assert rows["fa3"].package.startswith("fa3-fwd")
    assert rows["fa3"].capabilities is not None
    assert rows["fa4"].reason == "package flash-attn-4 is not installed (pip install flash-attn-4)"
    assert rows["mate"].reason
    assert rows["cpu"].package == ""


@pytest.mark.parametrize("row", order.ORDERS, ids=lambda row: "-".join(row.kinds + row.work))
def test_an_order_has_a_reading_or_says_that_it_has_none(row: order.Order) -> None:
    words = ("not measured", "not a race", "the only", "nothing runs")
    files = [ROOT / file for file in row.reading.split(", ")]
    assert row.reading.startswith(words) or all(file.is_file() for file in files)
    assert set(row.providers) <= set(providers.NAMES)


def test_the_readings_behind_an_order_show_it() -> None:
    """More cases won than lost by each that a reading has, against the next of them in the order."""
    for row in order.ORDERS:
        for file in row.reading.split(", "):
            if not (ROOT / file).is_file():
                continue
            times: dict[str, dict[str, float]] = {}
            for result in json.loads((ROOT / file).read_text())["results"]:
                if _is_work(result, row.work) and result.get("ms"):
                    times.setdefault(result["case"], {})[result["runner"]] = result["ms"]
            raced = [n for n in row.providers if any(n in each for each in times.values())]
            assert len(raced) > 1
            for first, second in itertools.pairwise(raced):
                both = [each for each in times.values() if {first, second} <= each.keys()]
                won = sum(each[first] < each[second] for each in both)
                assert 2 * won > len(both), (file, first, second, won, len(both))


def _is_work(result: dict[str, Any], work: tuple[str, ...]) -> bool:
    words = result["case"].split()[0]
    return words not in ("prefill", "decode") or words in work
