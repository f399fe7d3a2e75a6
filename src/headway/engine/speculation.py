"""Speculation by prompt lookup: what followed the sequence's last tokens before is likely to follow now.

Guesses are checked by the model itself in one step: the tokens it would have said are kept, from the first
guess that differs on nothing. So greedy output stays what it is, only sooner where a text repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Lengths of the endings that are looked up, the longest first.
LENGTHS = (4, 3, 2)


class NgramIndex:
    """Where each run of a few tokens was last followed by something, in one growing sequence."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # run of tokens -> position behind it
        self._indexed = 0

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that followed the longest known ending of ``tokens``.

        ``tokens`` are those of the call before, and more.
        """
        # A run counts once something follows it; the ending itself has no continuation yet.
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._next[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in LENGTHS:
            at = self._next.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if at is not None:
                return tuple(tokens[at : at + most])
        return ()


def accepted(drafts: Sequence[int], said: Sequence[int]) -> int:
    """How many drafts the model confirms: ``said[i]`` is its token at the place of ``drafts[i]``."""
    for count, (draft, token) in enumerate(zip(drafts, said, strict=False)):
        if draft != token:
            return count
    return len(drafts)
