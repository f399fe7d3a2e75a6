from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from tests.server.live import Live, serving
from tests.server.stand_in import EchoEngine


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that answers with its prompt, shared by the tests of one file."""
    with serving(EchoEngine()) as server:
        yield server
