"""Text leaves whole: no split characters, no half of a stop string, nothing lost or said twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.engine.detokenizer import Detokenizer

TEXTS = (
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "mixed 漢字 and 🌊!",
)


def decode_bytes(ids: object) -> str:
    """Each token is a byte, as in the byte-level vocabularies at their worst."""
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


def pieces(detokenizer: Detokenizer, ids: bytes) -> list[str]:
    """What each token made ready, and what the end set free."""
    return [*(detokenizer.add(i).text for i in ids), detokenizer.finish().text]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_leave_whole(text: str) -> None:
    parts = pieces(Detokenizer(decode_bytes), text.encode())
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_leaves_with_its_last_byte(text: str) -> None:
    detokenizer = Detokenizer(decode_bytes)
    for character in text:
        *first, last = character.encode()
        assert [detokenizer.add(byte).text for byte in first] == [""] * len(first)
        assert detokenizer.add(last).text == character


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    *first, last = "🌊".encode()
    detokenizer = Detokenizer(decode_bytes, context=[*b"sea ", *first])
    assert detokenizer.add(last).text == "🌊"
    assert detokenizer.add(ord("!")).text == "!"


def decode_falling_back(ids: object) -> str:
    """As SentencePiece's decoders with bytes: a run of them is characters as a whole, or none is."""
    try:
        return bytes(ids).decode()  # type: ignore[call-overload]
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "a", "🌊🌊", "語の語"])
def test_runs_of_bytes_are_looked_at_from_a_character_on(text: str, prompt: str) -> None:
    detokenizer = Detokenizer(decode_falling_back, context=prompt.encode())
    assert "".join(pieces(detokenizer, text.encode())) == text


def test_bytes_that_are_no_characters_do_not_hold_up_the_text() -> None:
    detokenizer = Detokenizer(decode_bytes)
    ready = "".join(detokenizer.add(0xFF).text for _ in range(20))
    assert len(ready) >= 16
    assert ready + detokenizer.finish().text == "\ufffd" * 20


def test_an_unfinished_character_at_the_end_is_not_hidden() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert pieces(detokenizer, "a€".encode()[:-1]) == ["a", "", "", "\ufffd"]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(Detokenizer(decode_bytes, context=b"prompt"), text.encode())) == text


@settings(deadline=None)
@given(st.binary(max_size=24))
def test_any_bytes_leave_as_the_decoder_reads_them(ids: bytes) -> None:
    """Characters come out right whatever surrounds them; how often bad bytes are marked may differ."""
    text = "".join(pieces(Detokenizer(decode_bytes), ids))
    assert text.replace("\ufffd", "") == decode_bytes(ids).replace("\ufffd", "")


def decode_words(ids: object) -> str:
    """SentencePiece's habit: the space before a word belongs to it, and is dropped in front."""
    words = {1: "▁Hello", 2: "▁big", 3: "▁world", 4: "s"}
    return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # type: ignore[attr-defined]


def test_leading_spaces_survive() -> None:
    detokenizer = Detokenizer(decode_words, context=[1])
    assert [detokenizer.add(i).text for i in (2, 3, 4)] == [" big", " world", "s"]


@pytest.mark.parametrize(
    ("text", "stop", "include", "ready"),
    [
        ("one. two", [". "], False, "one"),
        ("one. two", [". "], True, "one. "),
        ("aab", ["ab"], False, "a"),
        ("aaab", ["aab"], False, "a"),
        ("no stop here", ["#"], False, "no stop here"),
        ("almost STO", ["STOP"], False, "almost STO"),
        ("first b then a", ["a", "b"], False, "first "),
        ("日本語。終", ["。"], False, "日本語"),
        ("x", ["x"], False, ""),
    ],
)
def test_stop_strings(text: str, stop: list[str], include: bool, ready: str) -> None:
    detokenizer = Detokenizer(decode_bytes, stop=stop, include_stop=include)
    got, stopped = "", None
    for byte in text.encode():
        piece = detokenizer.add(byte)
        got += piece.text
        if piece.stop is not None:
            stopped = piece.stop
            break
    else:
        got += detokenizer.finish().text
    assert got == ready
    assert (stopped is not None) == any(one in text for one in stop)


def test_the_beginning_of_a_stop_string_is_withheld_until_decided() -> None:
    detokenizer = Detokenizer(decode_bytes, stop=["</end>"])
    assert [detokenizer.add(byte).text for byte in b"a</en."] == ["a", "", "", "", "", "</en."]


@settings(deadline=None)
@given(
    text=st.text("ab漢", max_size=20),
    stop=st.lists(st.text("ab漢", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_where_a_stop_string_first_begins_or_was_first_complete(
    text: str, stop: list[str]
) -> None:
    """Tokens are single bytes here, so the stop string completed first decides."""
    detokenizer = Detokenizer(decode_bytes, stop=stop)
    got = ""
    for byte in text.encode():
        piece = detokenizer.add(byte)
        got += piece.text
        if piece.stop is not None:
            break
    else:
        got += detokenizer.finish().text
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert got == text
    else:
        seen = text[: min(ends)]
        assert got == seen[: min(seen.find(s) for s in stop if s in seen)]
