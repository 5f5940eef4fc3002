"""Text <-> token ids. Every tokenizer saves to and loads from JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import write_json


class TokenizerError(UserError):
    """Text that has no token, or a tokenizer file that cannot be used.

    position: in the text, of the character that has no token.
    """

    position: int | None = None


class CharTokenizer:
    """One token a character (Unicode code point).

    Args:
        vocabulary: the characters; the id of a token is its place.
        unknown_token: the character that stands for all others; appended if it is not among them.
    """

    type = "char"

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
    def from_text(cls, text: str, unknown_token: str | None = None) -> CharTokenizer:
        """The characters of `text`, in code-point order."""
        code_points = np.unique(_code_points(text))
        return cls([chr(point) for point in code_points], unknown_token)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

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
                f"is not among the {self.vocab_size} characters of the vocabulary"
            )
            error.position = position
            raise error
        return ids

    def encode(self, text: str) -> list[int]:
        """Like `encode_array`, as a list."""
        return [int(i) for i in self.encode_array(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        characters = []
        for token in ids:
            if not 0 <= int(token) < self.vocab_size:
                raise TokenizerError(f"token id {int(token)} is not below the vocabulary size {self.vocab_size}")
            characters.append(self.vocabulary[int(token)])
        return "".join(characters)

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "version": 1,
            "vocabulary": self.vocabulary,
            "unknown_token": self.unknown_token,
        }

    def hash(self) -> str:
        """sha256 of the JSON form: equal for tokenizers that give equal ids."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> CharTokenizer:
        """Read what `save` wrote.

        Raises:
            TokenizerError: missing, damaged, or of another type or version.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TokenizerError(f"{path}: no tokenizer file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: damaged tokenizer file ({type(error).__name__}: {error})") from None
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, name: str) -> CharTokenizer:
        """The tokenizer that `to_json` described.

        Args:
            name: of where it comes from, for the error.

        Raises:
            TokenizerError: damaged, or of another type or version.
        """
        try:
            if (data["type"], data["version"]) != (cls.type, 1):
                raise ValueError(f"type {data['type']!r}, version {data['version']}, expected {cls.type!r}, 1")
            if len(set(data["vocabulary"])) != len(data["vocabulary"]):
                raise ValueError("a character stands twice in the vocabulary")
            return cls(data["vocabulary"], data["unknown_token"])
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{name}: damaged tokenizer file ({type(error).__name__}: {error})") from None


def _code_points(text: str) -> np.ndarray:
    """Code points of `text`, shape (len(text),), uint32."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
