"""While an engine runs, Python's collector leaves what was there before alone."""

from __future__ import annotations

import gc

from headway.engine.collector import settled


def test_what_exists_is_left_alone_for_as_long_as_it_lasts() -> None:
    before = gc.get_freeze_count()
    with settled():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0
