"""The texts of a request in the formats of the API."""

from __future__ import annotations

from utils.serving.answers import Answer
from utils.serving.sequence import Piece, Token
from utils.tokenization.byte_tokens import ByteTokenizer

TOKENIZER = ByteTokenizer()


def tokens(data: bytes) -> tuple[Token, ...]:
    return tuple(Token(byte, -1.0) for byte in data)


def test_offsets_are_positions_in_the_text_whole_or_streamed() -> None:
    texts = ["Straße".encode(), b"a\xc3b\xff\xe6\x97"]
    offsets = [[0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4, 4]]
    whole = Answer("run", TOKENIZER, 0)
    pieces = {index: Piece(prompt=tokens(data[:2]), tokens=tokens(data[2:])) for index, data in enumerate(texts)}
    choices = whole.whole(pieces, {})["choices"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == offsets
    assert choices[0]["logprobs"]["tokens"] == ["S", "t", "r", "a", r"bytes:\xc3", r"bytes:\x9f", "e"]
    stream, found = Answer("run", TOKENIZER, 0), [list[int](), list[int]()]
    for place in range(max(map(len, texts))):
        for index, data in enumerate(texts):
            chunk = stream.chunk(index, Piece(tokens=tokens(data[place : place + 1])), is_first=not place)
            found[index] += chunk["choices"][0]["logprobs"]["text_offset"]
    assert found == offsets
