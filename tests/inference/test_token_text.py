"""The text of single tokens if a character may consist of several."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from utils.inference.token_text import TokenCharacters, token_text


class Pieces:
    """A tokenizer whose tokens are any bytes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


def characters(*pieces: bytes) -> list[str]:
    """For each token, `invalid bytes before it|characters it completes`, and the rest at the end."""
    tokenizer: Any = Pieces(pieces)
    completed = TokenCharacters(tokenizer)
    return [*("|".join(completed.add(token)) for token in range(len(pieces))), completed.rest()]


@pytest.mark.parametrize(
    ("piece", "text"),
    [(b"ab", "ab"), ("ß".encode(), "ß"), (b"\xe2\x82", r"bytes:\xe2\x82"), (b"a\xc3", r"bytes:\x61\xc3")],
)
def test_a_token_that_is_part_of_a_character_is_written_as_bytes(piece: bytes, text: str) -> None:
    tokenizer: Any = Pieces([piece])
    assert token_text(tokenizer, 0) == text


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert characters(b"Stra\xc3", b"\x9fe", b"!") == ["|Stra", "|ße", "|!", ""]
    assert characters(b"\xf0", b"\x9f\x98", b"\x80\xc3", b"\xa9") == ["|", "|", "|😀", "|é", ""]


def test_unfinished_bytes_are_reported_by_the_next_token() -> None:
    assert characters(b"a", b"\xc3", b"b", b"\xff", b"\xe6\x97") == ["|a", "|", "\ufffd|b", "|\ufffd", "|", "\ufffd"]


def test_all_parts_together_are_the_text() -> None:
    draw = random.Random(1)
    for _ in range(300):
        data = draw.choice(["aü€😀b", "日本語 Straße"]).encode() + draw.randbytes(8)
        tokens = [data[i : i + 3] for i in range(0, len(data), 3)]
        assert "".join(characters(*tokens)).replace("|", "") == data.decode(errors="replace").replace("|", "")
