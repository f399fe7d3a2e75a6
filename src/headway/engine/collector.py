"""Python's collector, which stops an engine for as long as it looks at every object there is."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What exists now is not looked at while this lasts: a loaded model and its modules stay anyway.

    A full collection over them takes 140 ms, in the middle of a step. For whole programs: what becomes
    garbage meanwhile of the objects that exist now is collected afterwards.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
