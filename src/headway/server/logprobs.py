"""Log-probabilities in OpenAI's two shapes, and the text of single tokens.

A token may be a piece of a character: its bytes are exact, its text is ``bytes:\\xf0\\x9f`` then, as OpenAI
writes it. Offsets count characters of the text, a split character belonging to the token that ends it; what
is not in the text, as special tokens usually are not, takes no room in it.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import Any

from headway.engine.request import TokenLogprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of each token of a tokenizer, remembered once asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._byte_level = _is_byte_level(tokenizer)
        self._known: dict[int, tuple[bytes, str]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        return self._of(token_id)[0]

    def text_of(self, token_id: int) -> str:
        return self._of(token_id)[1]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _of(self, token_id: int) -> tuple[bytes, str]:
        if token_id not in self._known:
            raw = self._bytes(token_id)
            self._known[token_id] = raw, _text(raw) or f"token_id:{token_id}"
        return self._known[token_id]

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer and self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # no tokenizer, or an id that the model has and the tokenizer has not
            return b""
        if token_id in self._special:
            return piece.encode()
        if self._byte_level and all(char in _byte_of_char() for char in piece):
            return bytes(_byte_of_char()[char] for char in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes a byte as one printable character: itself if it is one, else from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + i): byte for i, byte in enumerate(others)}


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion, or of one chunk of it."""

    def item(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(texts.bytes_of(token_id)),
        }

    content = [
        item(e.token_id, e.logprob) | {"top_logprobs": [item(t, lp) for t, lp in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """``choices[].logprobs`` of a text completion; ``add`` gives one chunk's, offsets running on.

    ``echo`` is what of the text is the prompt's.
    """

    def __init__(self, texts: TokenTexts, echo: str = "") -> None:
        self._texts = texts
        self._echo = echo
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(
        self, entries: Sequence[TokenLogprob], prompt: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """With ``prompt``, whose tokens the first of the entries are about, but for its first one: that
        has no probability, nothing being before it."""
        tokens = [*(prompt[:1] if prompt else ()), *(e.token_id for e in entries)]
        unknown: list[None] = [None] * (len(tokens) - len(entries))
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += self._room_of(token)
        text_of = self._texts.text_of
        tops = [
            {text_of(t): _finite(lp) for t, lp in (*e.top, (e.token_id, e.logprob))}
            for e in entries
        ]
        return {
            "tokens": [text_of(token) for token in tokens],
            "token_logprobs": [*unknown, *(_finite(e.logprob) for e in entries)],
            "top_logprobs": [*unknown, *tops],
            "text_offset": offsets,
        }

    def _room_of(self, token: int) -> int:
        """Characters of the text that a token stands for."""
        if self._texts.is_special(token):  # in the text where the prompt spells it out
            piece = self._texts.text_of(token)
            return len(piece) if self._echo.startswith(piece, self._offset) else 0
        text = self._decoder.decode(self._texts.bytes_of(token))
        # SentencePiece puts a space before the first word, which the prompt need not have.
        added = text.startswith(" ") and self._echo[self._offset : self._offset + 1] not in (
            "",
            " ",
        )
        return len(text) - added


def _finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes -9999 for a token of probability 0."""
    return max(logprob, -9999.0)
