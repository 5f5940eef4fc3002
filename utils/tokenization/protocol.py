"""What every tokenizer can do."""

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

VERSION = 1  # of the JSON form
PART_CHARACTERS = 1 << 17  # of a text, that are encoded at a time: code points and ids fit in a processor's cache


class TokenizerError(UserError):
    """Text that has no token, or a tokenizer file that cannot be used.

    position: index in the text of the first character that has no token, where that is known.
    """

    position: int | None = None


class Tokenizer(Protocol):
    """Converts text to token ids from 0 to vocab_size - 1, and back.

    kind: its name in the setting `tokenizer` and in the JSON form.
    learns: whether `build` reads the texts; otherwise the vocabulary is known before them.
    learns_characters: whether it needs the characters of the texts only, each once.
    keeps_text: whether decoding gives back the bytes of every text; otherwise it may change some.
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
        """Ids of tokens with a role of their own, by the name of the role."""

    @property
    def end_of_text(self) -> int | None:
        """The token that each document of a prepared dataset begins with; None: the vocabulary has none."""
        return self.special_tokens.get("end_of_text")

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (tokens,), int64.

        Raises:
            TokenizerError: part of the text has no token.
        """

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        """The ids of `encode_array` in parts, of any integer type, so that a long text needs little memory."""
        yield self.encode_array(text)

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The ids of each text, of any integer type."""
        return map(self.encode_array, texts)

    def first_cut(self, text: str) -> int | None:
        """The first place at which `text` may be cut so that the tokens of its parts are those of the whole.

        None if there is none, or if it is not known.
        """
        return 0

    def encode(self, text: str) -> list[int]:
        """Like `encode_array`, as a list."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; U+FFFD stands for bytes that are not part of a whole character.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of token ids as UTF-8; a token may end within a character.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """

    def byte_counts(self) -> np.ndarray:
        """Bytes of text that each token stands for, by id, shape (vocab_size,), int64; 0 for one with a role only."""
        return np.array([len(self.decode_bytes([token])) for token in range(self.vocab_size)], dtype=np.int64)

    @classmethod
    @abstractmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """A tokenizer for `texts`, as `config` says."""

    def adjusted(self, config: DataConfig) -> Tokenizer:
        """This tokenizer, for training a model further with the settings of `config`: the same ids for the same tokens.

        Raises:
            TokenizerError: `config` asks for a token that the vocabulary lacks.
        """
        return self

    def check(self, text: str) -> None:
        """Raises TokenizerError unless all of `text` can be encoded; the message says what is missing."""
        self.encode_array(text)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs, with `type` (the kind) and `version`."""

    def huggingface(self) -> str:
        """The content of a tokenizer.json, of the package tokenizers, that gives the same ids and texts.

        That package recognises special tokens in a text, unless split_special_tokens is set.

        Raises:
            TokenizerError: there is none.
        """
        raise TokenizerError(f"tokenizer {self.kind} has no form as a tokenizer.json")

    @classmethod
    @abstractmethod
    def from_json(cls, data: Any) -> Self:
        """The tokenizer that `to_json` described.

        Raises:
            LookupError, TypeError, ValueError: damaged. `tokenizer_from_json` turns these into one TokenizerError.
        """

    def hash(self) -> str:
        """sha256 of the JSON form: equal for tokenizers that give equal ids."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads.

        Raises:
            OSError: it cannot be written.
        """
        write_json(path, self.to_json())


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The ids of `encode_array` from those of `encode_parts`, shape (tokens,), int64."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
