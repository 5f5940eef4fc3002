"""Text <-> token ids: what every tokenizer can do, and the kinds that there are.

A kind is one class here, one entry in `KINDS` and one word in the setting `tokenizer`; no other module names it.
Tokens are not characters: only a tokenizer knows how many tokens a text has.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from utils.config.settings import DataConfig
from utils.errors import UserError
from utils.files import read_json, write_json

VERSION = 1  # of the JSON form


class TokenizerError(UserError):
    """Text that has no token, or a tokenizer file that cannot be used.

    position: index in the text of the first character that has no token, where that is known.
    """

    position: int | None = None


class Tokenizer(Protocol):
    """Converts text to token ids from 0 to vocab_size - 1, and back.

    kind: its name in the setting `tokenizer` and in the JSON form.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of tokens with a role of their own, by the name of the role."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (tokens,), int64.

        Raises:
            TokenizerError: part of the text has no token.
        """

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


class CharTokenizer(Tokenizer):
    """One token for each character (Unicode code point).

    Args:
        vocabulary: the characters; a token's id is its index.
        unknown_token: the character that stands for all others; appended unless it is among them.
    """

    kind = "char"

    def __init__(self, vocabulary: Iterable[str], unknown_token: str | None = None) -> None:
        self.vocabulary = list(dict.fromkeys(vocabulary))
        if unknown_token is not None and unknown_token not in self.vocabulary:
            self.vocabulary.append(unknown_token)
        if not all(len(character) == 1 for character in self.vocabulary):
            raise TokenizerError("a token of a character tokenizer is one character")
        self.unknown_token = unknown_token
        code_points = np.array([ord(c) for c in self.vocabulary], dtype=np.int64)
        unknown_id = -1 if unknown_token is None else self.vocabulary.index(unknown_token)
        # (largest code point + 2,): code point -> id; the last place is for everything beyond
        self._ids = np.full(int(code_points.max(initial=0)) + 2, unknown_id, dtype=np.int64)
        self._ids[code_points] = np.arange(len(self.vocabulary))

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """The characters of `texts` in code-point order, and the configured unknown token."""
        points = [np.unique(_code_points(text)) for text in texts]
        return cls([chr(point) for point in np.unique(np.concatenate(points))], config.unknown_token)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """`unknown`, if there is one."""
        return {} if self.unknown_token is None else {"unknown": self.vocabulary.index(self.unknown_token)}

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (len(text),), int64.

        Raises:
            TokenizerError: a character without a token, with its position, if there is no unknown token.
        """
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if (missing := np.flatnonzero(ids < 0)).size:
            position = int(missing[0])
            error = TokenizerError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} "
                f"is not among the {self.vocab_size} characters of the vocabulary; {self._remedy('it')}"
            )
            error.position = position
            raise error
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        characters = []
        for token in ids:
            if not 0 <= int(token) < self.vocab_size:
                raise TokenizerError(f"token id {int(token)} is not below the vocabulary size {self.vocab_size}")
            characters.append(self.vocabulary[int(token)])
        return "".join(characters)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8", errors="surrogatepass")

    def adjusted(self, config: DataConfig) -> CharTokenizer:
        unknown = config.unknown_token
        if unknown is None:
            return self
        if unknown not in self.vocabulary:
            raise TokenizerError(
                f"--unknown-token {unknown!r} is not among the {self.vocab_size} characters of the model"
            )
        return CharTokenizer(self.vocabulary, unknown)

    def check(self, text: str) -> None:
        strangers = sorted(set(text) - set(self.vocabulary))
        if not strangers or self.unknown_token is not None:
            return
        shown = ", ".join(repr(c) for c in strangers[:8]) + (", ..." if len(strangers) > 8 else "")
        count = "1 character" if len(strangers) == 1 else f"{len(strangers)} characters"
        raise TokenizerError(
            f"has {count} that the vocabulary of the model ({self.vocab_size} characters) lacks: {shown}; "
            f"{self._remedy('each of them')}"
        )

    def _remedy(self, what: str) -> str:
        stand_in = " " if " " in self.vocabulary else self.vocabulary[0]
        return f"--unknown-token {stand_in!r} reads {what} as {stand_in!r}"

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.kind,
            "version": VERSION,
            "vocabulary": self.vocabulary,
            "unknown_token": self.unknown_token,
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        if len(set(data["vocabulary"])) != len(data["vocabulary"]):
            raise ValueError("a character appears twice in the vocabulary")
        return cls(data["vocabulary"], data["unknown_token"])


def _code_points(text: str) -> np.ndarray:
    """Code points of `text`, shape (len(text),), uint32."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


KINDS: dict[str, type[Tokenizer]] = {CharTokenizer.kind: CharTokenizer}


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """A new tokenizer of the configured kind for `texts`."""
    return KINDS[config.tokenizer].build(config, texts)


def tokenizer_from_json(data: Any, name: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` described.

    Args:
        data: parsed JSON.
        name: where it comes from, for the error.

    Raises:
        TokenizerError: damaged, or of a kind or version that this workbench does not have.
    """
    try:
        kind, version = data["type"], data["version"]
        if kind not in KINDS or version != VERSION:
            raise ValueError(f"type {kind!r}, version {version!r}, expected {' or '.join(KINDS)}, version {VERSION}")
        return KINDS[kind].from_json(data)
    except (LookupError, TypeError, ValueError) as error:
        raise TokenizerError(f"{name}: damaged tokenizer file ({type(error).__name__}: {error})") from None


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the file that `Tokenizer.save` wrote.

    Raises:
        TokenizerError: missing, damaged, or of a kind or version that this workbench does not have.
    """
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no tokenizer file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: damaged tokenizer file ({type(error).__name__}: {error})") from None
    return tokenizer_from_json(data, str(path))
