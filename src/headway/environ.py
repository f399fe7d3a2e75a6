"""Environment variables that take part in every call, read as fast as a dict.

``os.environ.get`` encodes the name, and raises and catches where a variable is absent: a microsecond each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

#: What ``os.environ`` itself reads and writes, so changes of a process to its environment are seen.
_TABLE: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


class Variable:
    """One environment variable; ``raw`` tells values apart, ``get`` gives them as text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key: Any = name if _TABLE is os.environ else os.environ.encodekey(name)

    def raw(self) -> Any:
        """None where it is not set; otherwise a hashable value."""
        return _TABLE.get(self._key)

    def get(self) -> str | None:
        """Its text, None where it is not set."""
        return None if _TABLE.get(self._key) is None else os.environ.get(self.name)


BACKEND = Variable("HEADWAY_BACKEND")
VERSION = Variable("HEADWAY_FLASH_ATTN_VERSION")
DEBUG_CHECKS = Variable("HEADWAY_DEBUG_CHECKS")
