"""`Tokenizer`: the interface that every tokenizer implements."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from utils.config.settings import DataConfig
from utils.errors import UserError
from utils.files import write_json

VERSION = 1  # version of the JSON form
PART_CHARACTERS = 1 << 17  # characters encoded at a time: their code points and ids fit in a processor's cache


class TokenizerError(UserError):
    """A text that cannot be encoded, or a tokenizer file that cannot be used.

    position: index in the text of the first character that has no token, if known.
    """

    position: int | None = None


class Tokenizer(Protocol):
    """Converts text to token ids from 0 to vocab_size - 1, and back.

    kind: its name in the setting `tokenizer` and in the JSON form.
    learns: whether `build` derives the vocabulary from the texts; if not, the vocabulary is fixed.
    learns_characters: whether `build` needs only the distinct characters of the texts.
    keeps_text: whether the tokenizer is lossless: decoding returns the bytes of any text that was encoded.
    """

    kind: ClassVar[str]
    learns: ClassVar[bool] = True
    learns_characters: ClassVar[bool] = False
    keeps_text: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.vocab_size:,} tokens>"

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of tokens that have a special role, by the name of the role."""

    @property
    def end_of_text(self) -> int | None:
        """The token that each document of a prepared dataset begins with; None if the vocabulary has no such token."""
        return self.special_tokens.get("end_of_text")

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (tokens,), int64.

        Raises:
            TokenizerError: part of the text has no token.
        """

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        """The ids of `encode_array` part by part, of any integer dtype, so that a long text takes little memory."""
        yield self.encode_array(text)

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The ids of each text, of any integer dtype."""
        return map(self.encode_array, texts)

    def first_cut(self, text: str) -> int | None:
        """The first index at which `text` may be cut without changing its tokens.

        None if there is none, or if it is not known.
        """
        return 0

    def encode(self, text: str) -> list[int]:
        """Like `encode_array`, as a list."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; U+FFFD replaces bytes that are not part of a complete character.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of token ids as UTF-8, which may begin or end within a character.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """

    def byte_counts(self) -> np.ndarray:
        """Bytes of text that each token stands for, by id, shape (vocab_size,), int64; 0 if it is a mere marker."""
        return np.array([len(self.decode_bytes([token])) for token in range(self.vocab_size)], dtype=np.int64)

    @classmethod
    @abstractmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """Build a tokenizer for `texts` with the settings of `config`."""

    def adjusted(self, config: DataConfig) -> Tokenizer:
        """This tokenizer with the settings of `config`, to train a model further: every token keeps its id.

        Raises:
            TokenizerError: `config` asks for a token that the vocabulary lacks.
        """
        return self

    def check(self, text: str) -> None:
        """Raises TokenizerError unless all of `text` can be encoded; the message names what has no token."""
        self.encode_array(text)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything that `from_json` needs, including `type` (the kind) and `version`."""

    def huggingface(self) -> str:
        """The content of a tokenizer.json (package tokenizers) that gives the same ids and texts.

        That package recognises special tokens within a text, unless split_special_tokens is set.

        Raises:
            TokenizerError: this tokenizer cannot be written as a tokenizer.json.
        """
        raise TokenizerError(f"tokenizer {self.kind} has no form as a tokenizer.json")

    @classmethod
    @abstractmethod
    def from_json(cls, data: Any) -> Self:
        """The tokenizer that `to_json` described.

        Raises:
            LookupError, TypeError, ValueError: `data` is damaged; `tokenizer_from_json` turns these into a
                TokenizerError.
        """

    def hash(self) -> str:
        """sha256 of the JSON form: tokenizers with the same hash give the same ids."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, self.to_json())


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype in which the ids of a vocabulary are stored: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate the parts of `encode_parts` into the result of `encode_array`, shape (tokens,), int64."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
