"""Text <-> token ids: the kinds of tokenizers that there are (`Tokenizer` says what every one can do).

A kind is one class here, one entry in `KINDS` and one word in the setting `tokenizer`; no other module names it.
Tokens are not characters: only a tokenizer knows how many tokens a text has.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.config.settings import DataConfig
from utils.files import read_json
from utils.tokenization.chunks import GPT2_BOUNDARY, boundary_of, chunks
from utils.tokenization.protocol import VERSION, Tokenizer, TokenizerError
from utils.tokenization.specifications import byte_specification, character_specification, gpt2_specification
from utils.tokenization.vocabularies import (
    END_OF_TEXT,
    checked_merges,
    checked_specification,
    gpt2_merges,
    gpt2_ranks,
    optional_package,
    read_specification,
    sample,
    special_tokens,
    surrogate_error,
    token_pieces,
)

NUL = "\0"  # no text has it
LARGEST_VOCABULARY = 1 << 22
PART = 1 << 17  # characters of a text that are encoded at a time: their code points and ids fit in a processor's cache
WORDS_PART = 1 << 14  # of these, characters that one thread encodes into subwords
WORDS_PARTS = 64  # and how many such parts at a time
TRAINING_CHARACTERS = 1 << 25  # of a corpus from which subwords are learned
# GPT-2's pattern of words. Its repetitions are possessive, which changes no match: they need no stack to go back.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class CharTokenizer(Tokenizer):
    """One token for each character (Unicode code point).

    Args:
        vocabulary: the characters, each once; a token's id is its index.
        unknown_token: the character that stands for all others; appended unless it is among them.

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
        # (largest code point + 2,): code point -> id; the last place is for everything beyond
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
        """`unknown` and `end_of_text` (NUL, which no text has), if there are such characters."""
        roles = {"unknown": self.unknown_token, "end_of_text": NUL}
        return {role: self.vocabulary.index(c) for role, c in roles.items() if c is not None and c in self.vocabulary}

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (len(text),), int64.

        Raises:
            TokenizerError: a character without a token, with its position, if there is no unknown token.
        """
        return _joined(self.encode_parts(text))

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        for start in range(0, len(text), PART):
            points = _code_points(text[start : start + PART])
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
    """The characters of `texts`, in the order of their code points."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        for start in range(0, len(text), PART):
            seen[_code_points(text[start : start + PART])] = True
    return [chr(point) for point in np.flatnonzero(seen)]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


class _BytesTokenizer(Tokenizer):
    """A tokenizer whose tokens stand for bytes of UTF-8, so that every text has tokens."""

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token, by id."""
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        return _joined(self.encode_parts(text))

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
    """A text in UTF-8, in parts.

    Raises:
        TokenizerError: it has half a surrogate pair, which has no UTF-8.
    """
    for start in range(0, len(text), PART):
        try:
            yield text[start : start + PART].encode()
        except UnicodeEncodeError:
            raise surrogate_error(text) or AssertionError from None


class ByteTokenizer(_BytesTokenizer):
    """One token for each byte of UTF-8: 256 ids, for any language. No text has the byte 0."""

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


class _SubwordTokenizer(_BytesTokenizer):
    """A tokenizer of words and parts of words. Special tokens in a text are text."""

    _boundary: re.Pattern[str] | None = GPT2_BOUNDARY  # where a text may be cut

    def _encode_all(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        """The ids of each text, on all cores."""
        raise NotImplementedError

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        parts = chunks(text, self._boundary, WORDS_PART)
        while batch := list(itertools.islice(parts, WORDS_PARTS)):
            try:
                ids = _joined(self._encode_all(batch))
            except (TypeError, UnicodeEncodeError):
                raise surrogate_error(text) or AssertionError from None
            yield ids

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        counts: list[int] = []  # of the parts of each text

        def batches() -> Iterator[list[str]]:
            batch: list[str] = []
            length = 0
            for text in texts:
                parts = list(chunks(text, self._boundary, WORDS_PART)) or [""]
                counts.append(len(parts))
                for part in parts:
                    batch.append(part)
                    length += len(part)
                    if length >= WORDS_PART * WORDS_PARTS:
                        yield batch
                        batch, length = [], 0
            yield batch

        ids = itertools.chain.from_iterable(map(self._encode_all, batches()))
        for number in range(len(texts)):
            first = next(ids)  # then the count is known
            yield first if counts[number] == 1 else _joined([first, *itertools.islice(ids, counts[number] - 1)])

    def first_cut(self, text: str) -> int | None:
        found = self._boundary.search(text) if self._boundary else None
        return found.start() + 1 if found else None

    def hash(self) -> str:
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        return super().hash()


class HuggingFaceTokenizer(_SubwordTokenizer):
    """Any tokenizer.json, of the package tokenizers.

    Decoding gives what each token adds in the middle of a text: where the first word of a text has a token with a space
    before it, the space stays.

    Args:
        specification: the content of the tokenizer.json.
        vocab_size: at least so many ids, those beyond the tokens without text: many a published model has more rows
            than its tokenizer has tokens.

    Raises:
        TokenizerError: the package is missing.
        ValueError: the content is damaged.
    """

    kind = "hf"
    learns = False
    vocab_size = 0
    special_tokens: Mapping[str, int] = {}

    def __init__(self, specification: str, vocab_size: int = 0) -> None:
        package = optional_package("tokenizers", self.kind)
        self.specification = specification
        self._facts = json.loads(specification)
        try:
            self._tokenizer = package.Tokenizer.from_str(specification)
        except Exception as error:  # the package has no type for it
            raise ValueError(f"the package tokenizers cannot use it: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise ValueError("it has no tokens")
        self._padded = vocab_size > self.vocab_size
        self.vocab_size = max(self.vocab_size, vocab_size)
        added = self._facts.get("added_tokens") or []
        self.special_tokens = special_tokens({token["content"]: token["id"] for token in added if token["special"]})
        self._boundary = boundary_of(self._facts)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return token_pieces(self._tokenizer, self._facts, self.vocab_size)

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        path = Path(config.tokenizer.partition(":")[2]).expanduser()
        specification = read_specification(path)
        try:
            return cls(specification)
        except (LookupError, TypeError, ValueError) as error:
            raise TokenizerError(f"{path}: not a tokenizer.json that can be used: {error}") from None

    def _encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns whenever the process forks
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # half a surrogate pair
            raise
        except Exception as error:  # the package has no type for it
            raise TokenizerError(f"the tokenizer.json has no token for a part of the text: {error}") from None
        for encoding in encodings:
            yield np.array(encoding.ids, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        form = {"type": self.kind, "version": VERSION, "tokenizer": self.specification}
        return {**form, "vocab_size": self.vocab_size} if self._padded else form

    @classmethod
    def from_json(cls, data: Any) -> Self:
        vocab_size = data.get("vocab_size", 0)
        if not isinstance(vocab_size, int) or vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"vocab_size: expected at most {LARGEST_VOCABULARY:,}")
        return cls(checked_specification(json.loads(data["tokenizer"])), vocab_size)

    @functools.cached_property
    def _hash(self) -> str:
        """That of the same tokenizer without padding: it gives the same ids."""
        form = {key: value for key, value in self.to_json().items() if key != "vocab_size"}
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    def huggingface(self) -> str:
        return self.specification


class BpeTokenizer(HuggingFaceTokenizer):
    """Byte-pair encoding [Sennrich et al. 2016] of bytes, as in GPT-2, learned from the corpus."""

    kind = "bpe"
    learns = True

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """Learn `bpe_vocab_size` tokens from the first TRAINING_CHARACTERS, or as many spread over longer texts."""
        package = optional_package("tokenizers", cls.kind)
        byte_level = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=config.bpe_vocab_size,
            special_tokens=[END_OF_TEXT, *config.special_tokens],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        parts = (chunks(text, GPT2_BOUNDARY, WORDS_PART) for text in sample(texts, TRAINING_CHARACTERS))
        tokenizer.train_from_iterator(itertools.chain.from_iterable(parts), trainer)
        return cls(checked_specification(json.loads(tokenizer.to_str())))


class Gpt2Tokenizer(_SubwordTokenizer):
    """The encoding of GPT-2, by the package tiktoken, from local files.

    Args:
        merges: the content of vocab.bpe.
    """

    kind = "gpt2"
    learns = False
    vocab_size = 50257
    special_tokens: Mapping[str, int] = {"end_of_text": 50256}

    def __init__(self, merges: str) -> None:
        package = optional_package("tiktoken", self.kind)
        self.merges = merges
        self._encoding = package.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2_ranks(merges), special_tokens={END_OF_TEXT: 50256}
        )

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return [self._encoding.decode_single_token_bytes(token) for token in range(self.vocab_size)]

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        bases = [Path(folder) for folder in (os.environ.get("WORKBENCH_DATA"), config.corpora_dir) if folder]
        return cls(gpt2_merges([folder for base in bases for folder in (base, base / "gpt2")]))

    def _encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        def encode(text: str) -> np.ndarray:
            ids: np.ndarray = self._encoding.encode_to_numpy(text, disallowed_special=())
            return ids

        if len(texts) == 1:
            return map(encode, texts)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return iter(list(pool.map(encode, texts)))

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "version": VERSION, "merges": self.merges}

    def huggingface(self) -> str:
        return gpt2_specification(self.merges)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return cls(checked_merges(data["merges"]))


KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (CharTokenizer, ByteTokenizer, BpeTokenizer, Gpt2Tokenizer, HuggingFaceTokenizer)
}


def tokenizer_class(config: DataConfig) -> type[Tokenizer]:
    """The kind in the setting `tokenizer`, which may have a path after a colon."""
    return KINDS[config.tokenizer.partition(":")[0]]


def check_tokenizer(config: DataConfig, tokenizer: Tokenizer, run: str, path: Path) -> None:
    """Raises TokenizerError unless `config` asks for the tokenizer of a model that is trained further.

    Args:
        run: the name of the model.
        path: the file of its tokenizer.
    """
    kind, _, file = config.tokenizer.partition(":")
    fits = kind == tokenizer.kind
    if fits and file and os.path.exists(os.path.expanduser(file)):  # else the run's own copy is the only one
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


def pretrained_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer.json of a published model.

    Args:
        vocab_size: the number of rows of the model, for ids.

    Raises:
        TokenizerError: damaged, or with more tokens than the model has rows.
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
