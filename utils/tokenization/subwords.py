"""Subword tokenizers: any tokenizer.json, byte-pair encoding learned from the corpus, and the encoding of GPT-2."""

from __future__ import annotations

import contextlib
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
from utils.errors import first_line
from utils.tokenization.byte_tokens import Utf8Tokenizer
from utils.tokenization.chunks import GPT2_BOUNDARY, boundary_of, chunks, decoder_of
from utils.tokenization.protocol import VERSION, TokenizerError, joined
from utils.tokenization.specifications import gpt2_specification
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

LARGEST_VOCABULARY = 1 << 22
WORDS_PART = 1 << 14  # characters that one thread encodes at a time
WORDS_PARTS = 64  # parts of that size that are encoded at a time, on all cores
TRAINING_CHARACTERS = 1 << 25  # characters of the corpus from which subwords are learned
# GPT-2's word pattern, with possessive quantifiers: the matches are the same, but no backtracking stack is needed.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class _SubwordTokenizer(Utf8Tokenizer):
    """A subword tokenizer. The names of special tokens within a text are encoded as ordinary text."""

    _boundary: re.Pattern[str] | None = GPT2_BOUNDARY  # where a text can be cut (chunks.py)

    def _encode_all(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        """Encode each text, using all cores."""
        raise NotImplementedError

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        parts = chunks(text, self._boundary, WORDS_PART)
        while batch := list(itertools.islice(parts, WORDS_PARTS)):
            try:
                ids = joined(self._encode_all(batch))
            except (TypeError, UnicodeEncodeError):
                raise surrogate_error(text) or AssertionError from None
            yield ids

    def encode_many(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        counts: list[int] = []  # the number of parts of each text

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
            first = next(ids)  # runs `batches`, which appends the count of this text
            yield first if counts[number] == 1 else joined([first, *itertools.islice(ids, counts[number] - 1)])

    def first_cut(self, text: str) -> int | None:
        found = self._boundary.search(text) if self._boundary else None
        return found.start() + 1 if found else None

    def hash(self) -> str:
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        return super().hash()


class HuggingFaceTokenizer(_SubwordTokenizer):
    """Any tokenizer.json of the package tokenizers.

    Decoding gives each token the bytes that it adds in the middle of a text, so a space that the tokenizer puts before
    the first word stays. If the file has no decoder, decoding inverts its word splitting (`decoder_of`).

    Args:
        specification: the content of the tokenizer.json.
        vocab_size: the smallest vocabulary size; ids without a token stand for no text. Many published models have more
            embedding rows than their tokenizer has tokens.

    Raises:
        TokenizerError: the package is not installed.
        ValueError: the content is damaged.
    """

    kind = "hf"
    learns = False
    keeps_text = False
    vocab_size = 0
    special_tokens: Mapping[str, int] = {}

    def __init__(self, specification: str, vocab_size: int = 0) -> None:
        package = optional_package("tokenizers", self.kind)
        self.specification = specification
        self._facts = json.loads(specification)
        try:
            self._facts["decoder"] = decoder_of(self._facts)
            with _panics_as_errors():
                self._tokenizer = package.Tokenizer.from_str(json.dumps(self._facts))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"the package tokenizers cannot use it: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise ValueError("it has no tokens")
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(
                f"it has the token id {self.vocab_size - 1:,}; expected at most {LARGEST_VOCABULARY:,} tokens"
            )
        self._padded = vocab_size > self.vocab_size
        self.vocab_size = max(self.vocab_size, vocab_size)
        added = self._facts.get("added_tokens") or []
        self.special_tokens = special_tokens({token["content"]: token["id"] for token in added if token["special"]})
        self._boundary = boundary_of(self._facts)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        try:
            with _panics_as_errors():
                return token_pieces(self._tokenizer, self._facts, self.vocab_size)
        except RuntimeError as error:
            raise TokenizerError(f"the tokenizer.json cannot decode its tokens: {error}") from None

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        path = Path(config.tokenizer.partition(":")[2])
        specification = read_specification(path)
        try:
            return cls(specification)
        except (LookupError, TypeError, ValueError) as error:
            raise TokenizerError(f"{path}: not a tokenizer.json that can be used: {error}") from None

    def _encode_all(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns whenever the process forks
        try:
            with _panics_as_errors():
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # half a surrogate pair
            raise
        except Exception as error:  # the package raises plain Exception
            raise TokenizerError(f"the tokenizer.json cannot encode a part of the text: {error}") from None
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
        """The hash without the padding of the vocabulary, which does not change the ids."""
        form = {key: value for key, value in self.to_json().items() if key != "vocab_size"}
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    def huggingface(self) -> str:
        return self.specification


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turn a panic of the package tokenizers, whose type is not an Exception, into a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(first_line(error)) from None


class BpeTokenizer(HuggingFaceTokenizer):
    """Byte-pair encoding [Sennrich et al. 2016] of bytes, as in GPT-2, learned from the corpus."""

    kind = "bpe"
    learns = True
    keeps_text = True

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> Self:
        """Learn `bpe_vocab_size` tokens from the texts, or, if they are longer, from TRAINING_CHARACTERS of them."""
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
    """The encoding of GPT-2, computed by the package tiktoken from local files.

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
