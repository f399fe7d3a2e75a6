"""Errors and warnings that Headway raises on purpose.

Every message names the argument, what was given, and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class HeadwayError(Exception):
    """Base of all errors raised by Headway."""


class InvalidInputError(HeadwayError, ValueError):
    """An argument is wrong for every provider: shape, dtype, device, stride, range or combination."""

    def __init__(self, argument: str, given: object, wanted: str) -> None:
        self.argument = argument
        self._parts = argument, str(given), wanted
        super().__init__(f"{argument}: got {given}; want {wanted}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Engines hand errors from one process to another."""
        return type(self), self._parts


class UnsupportedError(HeadwayError, NotImplementedError):
    """The call is valid, but no allowed provider can run it.

    ``reasons`` maps each provider that was asked to what it said.
    """

    def __init__(
        self,
        message: str,
        reasons: Mapping[str, Sequence[str]] | None = None,
        alternatives: Sequence[str] = (),
    ) -> None:
        self.reasons = {name: tuple(why) for name, why in (reasons or {}).items()}
        self.alternatives = tuple(alternatives)
        lines = [message]
        lines += [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        if self.alternatives:
            lines.append(f"  would run this call: {', '.join(self.alternatives)}")
        super().__init__("\n".join(lines))
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._message, self.reasons, self.alternatives)


class HeadwayWarning(UserWarning):
    """Something works, but not the way its user probably wants."""
