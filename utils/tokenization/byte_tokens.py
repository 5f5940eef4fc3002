"""Tokenizers whose tokens stand for bytes of UTF-8: their base class, and the one with a token for each byte."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from utils.config.settings import DataConfig
from utils.tokenization.protocol import PART_CHARACTERS, VERSION, Tokenizer, TokenizerError, joined
from utils.tokenization.specifications import byte_specification
from utils.tokenization.vocabularies import surrogate_error


class Utf8Tokenizer(Tokenizer):
    """A tokenizer whose tokens stand for bytes of UTF-8, so that it can encode every text."""

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token, by id."""
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        return joined(self.encode_parts(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces, size = self._pieces, self.vocab_size
        tokens = [int(token) for token in ids]
        if beyond := [token for token in tokens if not 0 <= token < size]:
            raise TokenizerError(f"token id {beyond[0]} is not below the vocabulary size {size}")
        return b"".join([pieces[token] for token in tokens])

    def byte_counts(self) -> np.ndarray:
        counts = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        counts[list(self.special_tokens.values())] = 0
        return counts

    def check(self, text: str) -> None:
        for _ in _utf8(text):
            pass


def _utf8(text: str) -> Iterator[bytes]:
    """The UTF-8 of a text, part by part.

    Raises:
        TokenizerError: the text has half a surrogate pair, which UTF-8 cannot encode.
    """
    for start in range(0, len(text), PART_CHARACTERS):
        try:
            yield text[start : start + PART_CHARACTERS].encode()
        except UnicodeEncodeError:
            raise surrogate_error(text) or AssertionError from None


class ByteTokenizer(Utf8Tokenizer):
    """One token for each byte of UTF-8: 256 ids, for any language. Byte 0, which no text has, is end-of-text."""

    kind = "byte"
    learns = False
    vocab_size = 256
    special_tokens: Mapping[str, int] = {"end_of_text": 0}

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)]

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        return cls()

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        for part in _utf8(text):
            yield np.frombuffer(part, dtype=np.uint8)

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        return (np.frombuffer(text.encode(), dtype=np.uint8) for text in texts)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "version": VERSION}

    def huggingface(self) -> str:
        return byte_specification()

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return cls()
