"""Compiles kernel entry points with numba and keeps the result on disk."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc


@cache
def source_fingerprint() -> int:
    """A positive number that changes with any source file of the compiled kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little") | 1


def compile_entry(function: Any, signature: Any) -> Any:
    """Compile a function of one pointer for use from C, or take it from numba's cache.

    The cache lies beside the sources, or in the user's cache directory where those cannot be
    written, or at ``NUMBA_CACHE_DIR``. Where none of them can be written, the function is compiled
    anew in every process.
    """
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return cfunc(signature, error_model="numpy")(function)
