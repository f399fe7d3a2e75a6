"""The Python examples in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in [DOCS / "README.md", DOCS / "docs" / "functions.md"]
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block: str) -> None:
    exec(compile(block, "<documentation>", "exec"), {})


def test_every_environment_variable_is_in_one_place() -> None:
    source = "".join(path.read_text() for path in (DOCS / "src").rglob("*.py"))
    page = (DOCS / "docs" / "troubleshooting.md").read_text()
    internal = {"HEADWAY_TARGET", "HEADWAY_MLA"}  # the compiler's own, and a backend's name in vLLM
    assert set(re.findall(r"HEADWAY_[A-Z0-9_]+", page)) == (
        set(re.findall(r"HEADWAY_[A-Z0-9_]+", source)) - internal
    )


def test_links_between_pages_lead_somewhere() -> None:
    for page in (DOCS / "README.md", *(DOCS / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
