"""Text <-> token ids: the character tokenizer, the registry of all kinds, and functions that build, load and check one.

`Tokenizer` is the interface of every kind. A kind is one class, here or in utils/tokenization/, one entry in `KINDS`
and one value of the setting `tokenizer`; no other module names it. Tokens are not characters: only a tokenizer knows
how many tokens a text has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.config.settings import DataConfig
from utils.files import read_json
from utils.tokenization.byte_tokens import ByteTokenizer
from utils.tokenization.protocol import PART_CHARACTERS, VERSION, Tokenizer, TokenizerError, joined
from utils.tokenization.specifications import character_specification
from utils.tokenization.subwords import BpeTokenizer, Gpt2Tokenizer, HuggingFaceTokenizer
from utils.tokenization.vocabularies import read_specification

NUL = "\0"  # the end-of-text token of CharTokenizer: no text contains it


class CharTokenizer(Tokenizer):
    """One token for each character (Unicode code point).

    Args:
        vocabulary: the characters, each once; a token's id is its index.
        unknown_token: the character that replaces those outside the vocabulary; appended to it if it is not in it.

    Raises:
        TokenizerError: a token is not one character, or a character appears twice.
    """

    kind = "char"
    learns_characters = True

    def __init__(self, vocabulary: Iterable[str], unknown_token: str | None = None) -> None:
        self.vocabulary = list(vocabulary)
        if unknown_token is not None and unknown_token not in self.vocabulary:
            self.vocabulary.append(unknown_token)
        if set(map(len, self.vocabulary)) - {1}:
            raise TokenizerError("a token of a character tokenizer is one character")
        self.unknown_token = unknown_token
        code_points = _code_points("".join(self.vocabulary))
        unknown_id = -1 if unknown_token is None else self.vocabulary.index(unknown_token)
        # (largest code point + 2,): code point -> id; the last element is for all larger code points
        self._ids = np.full(int(code_points.max(initial=0)) + 2, unknown_id, dtype=np.int32)
        self._ids[code_points] = ids = np.arange(len(self.vocabulary))
        if (self._ids[code_points] != ids).any():
            raise TokenizerError("a character appears twice in the vocabulary")

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """The characters of `texts` in code-point order, and the configured unknown token."""
        return cls(_characters(texts), config.unknown_token)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """`unknown` and `end_of_text` (NUL, which no text contains), if the vocabulary has these characters."""
        roles = {"unknown": self.unknown_token, "end_of_text": NUL}
        return {role: self.vocabulary.index(c) for role, c in roles.items() if c is not None and c in self.vocabulary}

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (len(text),), int64.

        Raises:
            TokenizerError: a character has no token and there is no unknown token; the error gives its position.
        """
        return joined(self.encode_parts(text))

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        for start in range(0, len(text), PART_CHARACTERS):
            points = _code_points(text[start : start + PART_CHARACTERS])
            ids = self._ids[np.minimum(points, len(self._ids) - 1)]
            if (ids < 0).any():
                raise self._missing(text, start + int(np.argmax(ids < 0)))
            yield ids

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        ids = np.concatenate([np.zeros(0, dtype=np.int32), *self.encode_parts("".join(texts))])
        return iter(np.split(ids, np.cumsum([len(text) for text in texts])[:-1]))

    def _missing(self, text: str, position: int) -> TokenizerError:
        error = TokenizerError(
            f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} "
            f"is not among the {self.vocab_size} characters of the vocabulary; {self._remedy('it')}"
        )
        error.position = position
        return error

    def decode(self, ids: Iterable[int]) -> str:
        characters = []
        for token in ids:
            if not 0 <= int(token) < self.vocab_size:
                raise TokenizerError(f"token id {int(token)} is not below the vocabulary size {self.vocab_size}")
            characters.append(self.vocabulary[int(token)])
        return "".join(characters)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8", errors="surrogatepass")

    def byte_counts(self) -> np.ndarray:
        counts = super().byte_counts()
        if self.end_of_text is not None:
            counts[self.end_of_text] = 0
        return counts

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
        strangers = sorted(set(_characters([text])) - set(self.vocabulary))
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

    def huggingface(self) -> str:
        return character_specification(self.vocabulary, self.unknown_token)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return cls(data["vocabulary"], data["unknown_token"])


def _code_points(text: str) -> np.ndarray:
    """Code points of `text`, shape (len(text),), uint32."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _characters(texts: Iterable[str]) -> list[str]:
    """The distinct characters of `texts`, in code-point order."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        for start in range(0, len(text), PART_CHARACTERS):
            seen[_code_points(text[start : start + PART_CHARACTERS])] = True
    return [chr(point) for point in np.flatnonzero(seen)]


KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (CharTokenizer, ByteTokenizer, BpeTokenizer, Gpt2Tokenizer, HuggingFaceTokenizer)
}


def tokenizer_class(config: DataConfig) -> type[Tokenizer]:
    """The class that the setting `tokenizer` names; the setting may have a path after a colon."""
    return KINDS[config.tokenizer.partition(":")[0]]


def check_tokenizer(config: DataConfig, tokenizer: Tokenizer, run: str, path: Path) -> None:
    """Raises TokenizerError unless `config` fits the tokenizer of the model that is trained further.

    Args:
        run: the name of the model.
        path: the file of its tokenizer.
    """
    kind, _, file = config.tokenizer.partition(":")
    fits = kind == tokenizer.kind
    if fits and file and os.path.exists(os.path.expanduser(file)):  # otherwise the run's own copy is the only one left
        fits = build_tokenizer(config, ()).hash() == tokenizer.hash()
    theirs = f"the weights of {run} are of a model with tokenizer {tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
    if not fits:
        named = f"hf:{path}" if tokenizer.kind == HuggingFaceTokenizer.kind else tokenizer.kind
        raise TokenizerError(f"{theirs}, not {config.tokenizer}; fitting: --tokenizer {named}")
    if kind == BpeTokenizer.kind and tokenizer.vocab_size > config.bpe_vocab_size:
        raise TokenizerError(
            f"{theirs}, not {config.bpe_vocab_size:,}; fitting: --bpe-vocab-size {tokenizer.vocab_size}"
        )


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """A new tokenizer of the configured kind for `texts`."""
    return tokenizer_class(config).build(config, texts)


def tokenizer_from_json(data: Any, name: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` described.

    Args:
        data: parsed JSON.
        name: where it comes from, for the error message.

    Raises:
        TokenizerError: `data` is damaged, or its kind or version is unknown to this workbench.
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
        TokenizerError: the file is missing or damaged, or its kind or version is unknown to this workbench.
    """
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no tokenizer file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: damaged tokenizer file ({type(error).__name__}: {error})") from None
    return tokenizer_from_json(data, str(path))


def pretrained_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer.json of a published model.

    Args:
        vocab_size: the number of embedding rows of the model, which becomes the vocabulary size.

    Raises:
        TokenizerError: the file is damaged, or has more tokens than the model has embedding rows.
    """
    specification = read_specification(path)
    try:
        tokenizer = HuggingFaceTokenizer(specification, vocab_size)
    except (LookupError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json that can be used: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{path}: has {tokenizer.vocab_size:,} tokens, more than the {vocab_size:,} rows of the model"
        )
    return tokenizer
