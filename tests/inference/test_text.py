"""Text comes in whole characters and without any part of a stop string; joined, it is all of it."""

from __future__ import annotations

import random

import pytest

from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, train
from torchtitan_style.inference.text import TextStream, overlap

TEXT = "naïve 学习 is 🙂👩‍👩‍👧 and Ελληνικά, ‘quotes’ … end"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes alone: every character beyond ASCII is split over tokens."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train(["abc"], folder, vocab_size=257)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each byte of the characters below."""
    return {byte: i for c in "é学🙂a" for byte, i in zip(c.encode(), tokenizer.encode(c), strict=True)}


def stream(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    text = TextStream(tokenizer.decode, **options)  # type: ignore[arg-type]
    return [*(text.push(token) for token in ids), text.finish()]


def test_characters_are_whole_and_come_as_soon_as_they_are(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_text_that_ends_within_a_character_says_so_at_the_end(tokenizer: Tokenizer) -> None:
    *pieces, last = stream(tokenizer, tokenizer.encode("a🙂")[:-1])
    assert pieces == ["a", "", "", ""]
    assert last == "\ufffd"


def test_bytes_that_are_no_character_hold_nothing_up(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂")[:2]  # the first half, again and again
    pieces = stream(tokenizer, broken * 20 + tokenizer.encode("done 学"))
    assert "".join(pieces).endswith("done 学")
    longest, waiting = 0, 0
    for piece in pieces:
        waiting = 0 if piece else waiting + 1
        longest = max(longest, waiting)
    assert longest <= 3


def test_random_bytes_are_the_text_that_they_are_at_once(tokenizer: Tokenizer, byte_ids: dict[int, int]) -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = b"".join(draw.choice(["é", "学", "🙂", "a"]).encode()[: draw.randint(1, 4)] for _ in range(12))
        ids = [byte_ids[byte] for byte in text]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == text.decode(errors="replace")


@pytest.mark.parametrize("stop", ["STOP", "🙂", "\n\n", "OP"])
def test_text_ends_before_a_stop_string_and_shows_no_part_of_it(tokenizer: Tokenizer, stop: str) -> None:
    before, after = "an S and STO… and \n then ", " never"
    pieces = stream(tokenizer, tokenizer.encode(before + stop + after), stop=["never seen", stop])
    assert "".join(pieces) == before


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode("one two three"), stop=["three", "two"])) == "one "


def test_what_could_have_become_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, tokenizer.encode("a ST"), stop=["STOP"]) == ["a", " ", "", "", "ST"]


def test_after_a_stop_string_nothing_comes(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer.decode, stop=["b"])
    assert [text.push(token) for token in tokenizer.encode("abc")] == ["a", "", ""]
    assert text.stopped
    assert text.finish() == ""


def test_overlap_is_the_longest_beginning_at_the_end() -> None:
    assert overlap("xabab", ["ababc"]) == 4
    assert overlap("xababc", ["ababc"]) == 0  # all of it is no beginning
    assert overlap("", ["a"]) == overlap("abc", []) == 0
