"""Incremental detokenisation: each token adds the text it completes, and stop strings end it.

Text leaves in pieces that never split a character and never contain the beginning of a stop string that
may yet be completed; such text is withheld until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: What decoders put in place of bytes that are no (complete) character.
REPLACEMENT = "\ufffd"

#: Tokens an unfinished character can be spread over: it lacks at least one of at most four bytes.
MAX_PENDING = 3

#: Tokens before the pending ones that are decoded with them, at least. The first of them begins a
#: character: decoders that fall back to bytes read a run of bytes that does not as no text at all.
CONTEXT_TOKENS = 6

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """Text that is ready to leave, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """The text of one request's output, as it grows.

    Args:
        decode: text of any run of token ids.
        context: tokens before the first one to come. Decoders that strip a leading space or join bytes
            across tokens need something to look back at; only the last few matter.
        stop: strings that end the text.
        include_stop: whether a stop string is part of the text it ends.
    """

    def __init__(
        self,
        decode: Decode,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._context = self._end_of(context)
        self._starts: list[int] = []  # places in the context where a character begins
        self._before = self._decode(self._context) if self._context else ""  # text of the context
        self._pending: list[int] = []  # tokens whose text has not been settled
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._withheld = ""

    def add(self, token_id: int) -> Piece:
        """Take one token and return what it made ready."""
        self._pending.append(token_id)
        text = self._text_of(self._pending)
        if not text.endswith(REPLACEMENT):
            settled, self._pending = self._pending, []
        elif len(self._pending) > MAX_PENDING:
            # More tokens than an unfinished character can have: the first of them belong to none.
            settled, self._pending = self._pending[:-MAX_PENDING], self._pending[-MAX_PENDING:]
            text = self._text_of(settled)
        else:
            return Piece("")
        self._look_back_at(settled)
        return self._scan(text)

    def finish(self) -> Piece:
        """All text withheld so far; no token follows."""
        piece = self._scan(self._text_of(self._pending) if self._pending else "")
        rest, self._withheld, self._pending = self._withheld, "", []
        return Piece(piece.text + rest, piece.stop)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt: as many as it takes to begin with a character."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_PENDING + 1):
            tokens = list(prompt[-count:])
            if count >= len(prompt) or REPLACEMENT not in self._decode(tokens):
                return tokens
        return list(prompt[-CONTEXT_TOKENS:])

    def _look_back_at(self, settled: list[int]) -> None:
        """Add what is settled to the context, and leave out what it has too much."""
        self._starts.append(len(self._context))
        self._context += settled
        early_enough = (at for at in self._starts if len(self._context) - at >= CONTEXT_TOKENS)
        first = max(early_enough, default=0)
        self._starts = [at - first for at in self._starts if at >= first]
        self._context = self._context[first:]
        self._before = self._decode(self._context)

    def _text_of(self, tokens: list[int]) -> str:
        """What tokens add to the text of their context, whose last character they may complete."""
        text = self._decode(self._context + tokens)
        if text.startswith(self._before):
            return text[len(self._before) :]
        pairs = enumerate(zip(text, self._before, strict=False))
        return text[next((i for i, (a, b) in pairs if a != b), len(text)) :]

    def _scan(self, text: str) -> Piece:
        """Look for stop strings in the withheld text and the new one together."""
        text = self._withheld + text
        found = [(text.find(stop), len(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, length, stop = min(found)
            self._withheld, self._pending = "", []
            return Piece(text[: start + length] if self._include_stop else text[:start], stop)
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return Piece(text[: len(text) - keep])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, all of it excepted."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
