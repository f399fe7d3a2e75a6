"""What documents quote is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.bench.quoted import RESULTS, TABLES, filled
from headway.bench.report import Reading
from headway.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "<!-- reading:" in path.read_text()
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_quote_their_readings(path: Path) -> None:
    text = path.read_text()
    assert filled(text, ROOT / RESULTS, path.parent.relative_to(ROOT)) == text, (
        f"python -m headway.bench.quoted {path.relative_to(ROOT)}"
    )


def test_readme_quotes_readings() -> None:
    assert ROOT / "README.md" in DOCUMENTS


def test_a_table_is_made_from_its_reading(tmp_path: Path) -> None:
    rows = [
        {"engine": "headway", "batch_size": 1, "output_throughput": 10.04},
        {"engine": "headway", "batch_size": 16, "output_throughput": 100.0},
        {"engine": "other", "batch_size": 1, "output_throughput": 5.0},
    ]
    machine = {"cpu": "a CPU", "cores": 2, "gpu": []}
    Reading("generate", {}, rows, device=machine, command="headway bench generate").save(
        tmp_path / TABLES["generate"][0]
    )
    text = filled("before\n<!-- reading: generate -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "old" not in text
    assert "| headway | 10.0 | 100.0 |" in text
    assert "| other | 5.0 | - |" in text
    assert "2 cores of a CPU: `headway bench generate`" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert filled(text, tmp_path) == text


def test_a_place_without_a_reading_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nothing"):
        filled("<!-- reading: nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(InvalidInputError, match=r"generate\.json"):
        filled("<!-- reading: generate -->\n<!-- end -->", tmp_path)
