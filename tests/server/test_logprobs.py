"""Offsets of tokens in the text of a completion."""

from __future__ import annotations

from collections.abc import Sequence

from headway.engine.request import TokenLogprob
from headway.server.logprobs import CompletionLogprobs, TokenTexts


class PieceTokenizer:
    """Pieces as SentencePiece has them; the first two are special."""

    pieces = ("<s>", "</s>", "\u2581Hello", "\u2581you", "!", "\u2581")
    all_special_ids = (0, 1)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]


def offsets(echo: str, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    entries = [TokenLogprob(token, -0.5, ()) for token in (*prompt[1:], *output)]
    told = CompletionLogprobs(TokenTexts(PieceTokenizer()), echo).add(entries, prompt)
    found: list[int] = told["text_offset"]
    return found


def test_tokens_that_the_tokenizer_adds_take_no_room() -> None:
    text = "Hello you!"
    assert offsets(text, [0, 2, 3, 4], []) == [0, 0, text.index(" you"), text.index("!")]


def test_special_tokens_that_the_prompt_spells_out_take_theirs() -> None:
    text = "<s>Hello</s> you"
    assert offsets(text, [0, 0, 2, 1, 3], []) == [0, 3, 3, 8, 12]
    assert offsets(text, [0, 2, 1, 3], []) == [0, 3, 8, 12]


def test_spaces_of_the_prompt_are_counted() -> None:
    assert offsets(" Hello you", [2, 3], []) == [0, 6]


def test_special_tokens_of_the_answer_are_not_in_its_text() -> None:
    text = "Hello" + " you!"
    assert offsets("Hello", [0, 2], [3, 1, 4, 1]) == [0, 0, 5, 9, text.index("!"), len(text)]
