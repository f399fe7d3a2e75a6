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
        self.key: Any = name if _TABLE is os.environ else os.environ.encodekey(name)

    def raw(self) -> Any:
        """None where it is not set; otherwise a hashable value."""
        return _TABLE.get(self.key)

    def get(self) -> str | None:
        """Its text, None where it is not set."""
        return None if _TABLE.get(self.key) is None else os.environ.get(self.name)


BACKEND = Variable("HEADWAY_BACKEND")
VERSION = Variable("HEADWAY_FLASH_ATTN_VERSION")
DEBUG_CHECKS = Variable("HEADWAY_DEBUG_CHECKS")

_KEYS = tuple(variable.key for variable in (BACKEND, VERSION, DEBUG_CHECKS))


def raw() -> tuple[Any, ...]:
    """The raw values of all of them."""
    backend, version, debug_checks = _KEYS
    return _TABLE.get(backend), _TABLE.get(version), _TABLE.get(debug_checks)
