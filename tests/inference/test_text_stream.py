"""Streamed text has whole characters only, and no part of a stop string."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.inference.test_token_text import Pieces
from tests.tiny_export import char_tokenizer
from utils.inference.text_stream import MOST_PENDING, TextStream

CHARACTERS = char_tokenizer("abcdefgh\n\ufffd")


def stream_of(tokenizer: Any, stops: Sequence[str] = ()) -> TextStream:
    return TextStream(tokenizer, stops)


def texts(pieces: Sequence[bytes], stops: Sequence[str] = ()) -> list[str]:
    """The text that each token adds, and the rest at the end."""
    stream = stream_of(Pieces(pieces), stops)
    return [*(stream.add(i) for i in range(len(pieces))), stream.rest()]


# ------------------------------------------------------------------------------ characters


def test_a_character_is_returned_with_its_last_byte() -> None:
    assert texts([bytes([byte]) for byte in "aü😀b".encode()]) == ["a", "", "ü", "", "", "", "😀", "b", ""]


def test_text_before_half_a_character_is_returned_at_once() -> None:
    assert texts([b"ab\xc3", b"\xbcc\xf0\x9f", b"\x98\x80"]) == ["ab", "üc", "😀", ""]


def test_characters_that_span_tokens_are_whole() -> None:
    data = "äöüß€😀".encode() * 3
    pieces = [data[:1], *(data[i : i + 2] for i in range(1, len(data), 2))]
    for piece in texts(pieces):
        assert "\ufffd" not in piece
    assert "".join(texts(pieces)) == data.decode()


def test_an_invalid_byte_does_not_hide_the_next_character() -> None:
    assert texts([b"\xff", b"\xf0", b"\x9f", b"\x98", b"\x80", b"!"]) == ["", "\ufffd", "", "", "😀", "!", ""]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    assert texts([b"a", b"\xc3"]) == ["a", "", "\ufffd"]


def test_a_stream_without_a_whole_character_is_not_held_back_forever() -> None:
    parts = texts([b"\xff"] * 10 * MOST_PENDING)
    assert "".join(parts) == "\ufffd" * 10 * MOST_PENDING
    assert max(map(len, parts)) < MOST_PENDING


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_make_up_the_text_for_any_tokens(seed: int) -> None:
    generator = random.Random(seed)
    data = "".join(generator.choices("aé€😀", k=50)).encode()
    if seed % 2:  # with some bytes that are not text
        data = bytes(byte if generator.random() > 0.1 else generator.randrange(256) for byte in data)
    pieces = []
    while sum(map(len, pieces)) < len(data):
        start = sum(map(len, pieces))
        pieces.append(data[start : start + generator.randint(1, 5)])
    assert "".join(texts(pieces)) == data.decode("utf-8", errors="replace")


def test_a_vocabulary_may_contain_the_replacement_character() -> None:
    stream = stream_of(CHARACTERS)
    parts = [stream.add(token) for token in CHARACTERS.encode("a\ufffd\ufffdb")]
    assert "".join([*parts, stream.rest()]) == "a\ufffd\ufffdb"


# ------------------------------------------------------------------------------ stop strings


def run(text: str, stops: Sequence[str]) -> tuple[list[str], bool]:
    stream = stream_of(CHARACTERS, stops)
    parts = [stream.add(token) for token in CHARACTERS.encode(text)]
    return [*parts, stream.rest()], stream.stopped


def test_a_stop_string_ends_the_text_and_is_not_part_of_it() -> None:
    assert run("abcde", ["cd"]) == (["a", "b", "", "", "", ""], True)


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    assert run("abcace", ["bcd"]) == (["a", "", "", "bca", "c", "e", ""], False)


def test_text_held_back_at_the_end_is_returned() -> None:
    assert run("abc", ["cd"]) == (["a", "b", "", "c"], False)


def test_a_stop_string_may_begin_inside_an_unfinished_one() -> None:
    assert run("ababac", ["abac"]) == (["", "", "", "ab", "", "", ""], True)


def test_the_first_of_several_stop_strings_counts() -> None:
    parts, stopped = run("abcdefg", ["fg", "cde"])
    assert ("".join(parts), stopped) == ("ab", True)


def test_a_stop_string_inside_a_token_ends_the_text() -> None:
    assert texts([b"one\ntwo", b"three"], ["\n"]) == ["one", "", ""]


def test_a_stop_string_that_begins_inside_a_token_ends_the_text() -> None:
    assert texts([b"a\xc3", b"\xbcb", b"c"], ["üb"]) == ["a", "", "", ""]


def test_without_stop_strings_no_text_is_held_back() -> None:
    assert run("abc", []) == (["a", "b", "c", ""], False)
    assert run("abc", [""]) == (["a", "b", "c", ""], False)


@pytest.mark.parametrize("seed", range(30))
def test_the_text_is_cut_where_a_search_in_the_whole_text_would_cut(seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choices("ab", k=60))
    stops = ["".join(generator.choices("ab", k=generator.randint(1, 7))) for _ in range(3)]
    parts, stopped = run(text, stops)
    ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert ("".join(parts), stopped) == (text, False)
        return
    seen = text[: min(ends)]  # no token is requested after the first stop string
    assert ("".join(parts), stopped) == (seen[: min(seen.find(stop) for stop in stops if stop in seen)], True)


# ------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("stops", [(), ("b",), ("ab", "cdc"), ("\ufffd",), ("hhh\n",)], ids=str)
def test_a_block_gives_the_text_of_its_tokens_one_by_one(stops: Sequence[str]) -> None:
    generator = random.Random(1)
    pieces = [*b"abcdefgh\n", *"üß€😀".encode(), 0xFF]
    tokenizer = Pieces([bytes([piece]) for piece in pieces])
    for _ in range(200):
        tokens = [generator.randrange(len(pieces)) for _ in range(40)]
        one, blocks = stream_of(tokenizer, stops), stream_of(tokenizer, stops)
        texts, used = "", 0
        for token in tokens:
            if not one.stopped:
                texts += one.add(token)
                used += 1
        found, count = "", 0
        while count < len(tokens) and not blocks.stopped:
            new, taken = blocks.extend(tokens[count : count + generator.randrange(1, 9)])
            found, count = found + new, count + taken
        assert (found + blocks.rest(), count, blocks.stopped) == (texts + one.rest(), used, one.stopped)
        if blocks.stopped:
            assert blocks.extend([0]) == ("", 0)


def test_a_block_without_half_a_character_is_decoded_at_once() -> None:
    calls: list[int] = []

    class Counted(Pieces):
        def decode(self, ids: Iterable[int]) -> str:
            calls.append(len(list(ids)))
            return super().decode(ids)

    assert stream_of(Counted([b"a", b"b"]), ["ba"]).extend([0] + [1] * 7) == ("abbbbbb", 8)
    assert calls == [8]
