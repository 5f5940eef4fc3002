"""The data that is scored: a text, or the validation split of a prepared dataset or of the corpus of a run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data import Corpus, load_corpus
from tokenizer import TokenizerError, load_tokenizer
from utils.config.settings import ArithmeticConfig, Config, DataConfig
from utils.corpora.datasets import dataset_names, find_dataset, read_dataset
from utils.corpora.sources import NAMES, find_source
from utils.errors import UserError
from utils.evaluation.weights import Trained
from utils.inference.scoring import Score, score_tokens, text_tokens
from utils.packing.joined import Joined
from utils.packing.prepared import Prepared, verify_shards
from utils.preparation.arithmetic import with_problems
from utils.runs.find import moved_path

TOKENS_AT_ONCE = 1 << 22  # tokens whose bytes are counted at a time


@dataclass(frozen=True)
class Tokens:
    """The data, in the tokens of one model.

    ids: (n,), may be memory-mapped.
    bytes: bytes of text that all tokens but the first stand for.
    has_documents: whether each document begins with the end-of-text token.
    leaked: tells whether the token at each place is in a document that nearly equals a training document; None if there
        is no such document.
    """

    ids: np.ndarray | Joined
    bytes: int
    has_documents: bool = False
    leaked: Callable[[np.ndarray], np.ndarray] | None = None


class Data(Protocol):
    """The data of an evaluation. hash: hash of its content."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str: ...

    def tokens(self, trained: Trained) -> Tokens:
        """The data in the tokens of a model.

        Raises:
            UserError: part of the text has no token; the message names the place.
        """
        ...


@dataclass(frozen=True)
class Text:
    """A whole text, for a model with any tokenizer. hash: its sha256."""

    name: str
    text: str

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tokens(self, trained: Trained) -> Tokens:
        try:
            return Tokens(*text_tokens(trained.tokenizer, self.text, trained.document_token))
        except TokenizerError as error:
            line = "" if error.position is None else f":{self.text.count(chr(10), 0, error.position) + 1}"
            raise UserError(f"{self.name}{line}: {error}") from None


@dataclass(frozen=True)
class ValidationText:
    """The validation split of a text, in the tokens of the corpus."""

    name: str
    corpus: Corpus

    @property
    def hash(self) -> str:
        return self.corpus.hash

    def tokens(self, trained: Trained) -> Tokens:
        ids = self.corpus.split("val")
        return Tokens(ids, _bytes_of(ids, self.corpus.byte_counts))


@dataclass(frozen=True)
class ValidationDocuments:
    """The validation split of a prepared dataset: its tokens, or, for a model with another tokenizer, its text."""

    name: str
    prepared: Prepared

    @property
    def hash(self) -> str:
        return self.prepared.dataset.hash

    def tokens(self, trained: Trained) -> Tokens:
        documents, leaks, tokenizer = self.prepared.documents["val"], self.prepared.leaks, trained.tokenizer
        if tokenizer.hash() == self.prepared.dataset.tokenizer_hash:
            n_bytes = self.prepared.dataset.splits["val"].bytes  # the first token, end-of-text, has none of them
            return Tokens(documents.tokens, n_bytes, True, leaks.contain if len(leaks) else None)
        parts, n_bytes = [], 0
        for number, (start, length) in enumerate(zip(*documents.bounds(np.arange(len(documents))), strict=True)):
            text = self.prepared.tokenizer.decode(np.asarray(documents.tokens[start + 1 : start + length]))
            try:
                ids, size = text_tokens(tokenizer, text, tokenizer.end_of_text)
            except TokenizerError as error:
                raise UserError(f"{self.name}: document {number + 1:,}: {error}") from None
            parts.append(ids)
            n_bytes += size if number == 0 else len(text.encode())
        is_leak = np.zeros(len(parts), dtype=bool)
        is_leak[list(self.prepared.dataset.leaks)] = True
        leaked = np.repeat(is_leak, [len(part) for part in parts])
        has_documents = tokenizer.end_of_text is not None
        return Tokens(np.concatenate(parts), n_bytes, has_documents, leaked.take if is_leak.any() else None)


def _bytes_of(ids: np.ndarray | Joined, byte_counts: np.ndarray) -> int:
    """Bytes of text that all tokens but the first stand for."""
    parts = (np.asarray(ids[start : start + TOKENS_AT_ONCE]) for start in range(1, len(ids), TOKENS_AT_ONCE))
    return round(sum(float(byte_counts[part].sum()) for part in parts))


def named_data(data: str, config: DataConfig, root: Path) -> Data:
    """The data that --data names: a registered corpus, a prepared dataset, a file or a folder.

    Args:
        config: gives the folders of corpora and datasets.
        root: the folder of the project.

    Raises:
        UserError: there is no such text, or it cannot be read.
    """
    corpora_dir, datasets_dir = root / config.corpora_dir, root / config.datasets_dir
    name = data if data in NAMES else Path(data).name or data
    if data not in NAMES and (folder := find_dataset(data, datasets_dir)) is not None:
        dataset = read_dataset(folder)
        prepared = Prepared(dataset, load_tokenizer(dataset.tokenizer_path), "random", corpora_dir)
        verify_shards(dataset, prepared.tokenizer.vocab_size)
        prepared.check_end_of_text("val")
        return ValidationDocuments(f"val of {dataset.name}", prepared)
    return Text(name, find_source(data, corpora_dir, dataset_names(datasets_dir)).read())


def own_data(trained: Trained, config: DataConfig, root: Path, report: Callable[[str], None]) -> Data:
    """The validation split of the corpus that a run was trained on.

    Args:
        config: gives the folders of corpora and datasets; a dataset that is not there may be in the folder of the run.
        root: the folder of the project.
        report: prints one line to the user.

    Raises:
        UserError: the corpus is not known, cannot be read, or has changed since the run was trained.
    """
    settings = trained.settings()
    known = {
        section: {key: settings[key] for key in model.model_fields if key in settings}
        for section, model in (("data", DataConfig), ("arithmetic", ArithmeticConfig))
    }
    known["data"]["dataset"] = dataset = moved_path(str(settings.get("dataset")), root)
    corpora_dir, datasets_dir = root / config.corpora_dir, root / config.datasets_dir
    if dataset not in NAMES and find_dataset(dataset, datasets_dir) is None and "datasets_dir" in settings:
        datasets_dir = root / moved_path(str(settings["datasets_dir"]), root)
    data = with_problems(Config.model_validate(known), corpora_dir)
    block_size = trained.model.config.block_size
    corpus = load_corpus(
        data, block_size, corpora_dir, trained.tokenizer, report, keep=False, datasets_dir=datasets_dir
    )
    trained.check_corpus(corpus.hash, f"--data {dataset} evaluates all of it")
    name = f"val of {dataset if dataset in NAMES else Path(dataset).name}"
    if data.loss_after is not None:
        report(f"{trained.name}: here every token counts, not only what follows {data.loss_after!r} in a document")
    return ValidationText(name, corpus) if corpus.prepared is None else ValidationDocuments(name, corpus.prepared)


class WithoutLeaks:
    """The score over the tokens that are not in leaked documents."""

    def __init__(self, tokens: Tokens, byte_counts: np.ndarray) -> None:
        self._tokens, self._byte_counts = tokens, byte_counts
        self.total, self.count, self.bytes, self.all_bytes = 0.0, 0, 0, 0  # all_bytes: of all tokens

    def add(self, first: int, losses: np.ndarray) -> None:
        """Add the losses of the tokens from place `first` on."""
        assert self._tokens.leaked is not None
        kept = ~self._tokens.leaked(np.arange(first, first + len(losses)))
        counts = self._byte_counts[np.asarray(self._tokens.ids[first : first + len(losses)])]
        self.total += float(losses[kept].sum())
        self.count += int(kept.sum())
        self.bytes += int(counts[kept].sum())
        self.all_bytes += int(counts.sum())

    def score(self) -> Score:
        """The score. If the tokenizer is not lossless, its bytes are scaled like those of all tokens."""
        n_bytes = round(self.bytes * (self._tokens.bytes / max(self.all_bytes, 1)))
        return Score(self.total / max(self.count, 1), self.count, max(n_bytes, 1), 0.0)


def score_data(
    trained: Trained, tokens: Tokens, stride: int | None, watch: Callable[[int], None]
) -> tuple[Score, Score | None]:
    """Score tokens, predicting each once. The second score leaves out leaked documents; None if there are none.

    Args:
        watch: called with the number of tokens that were just scored.

    Raises:
        UserError: there are fewer than two tokens.
    """
    without = None if tokens.leaked is None else WithoutLeaks(tokens, trained.tokenizer.byte_counts())

    def look(first: int, losses: np.ndarray) -> None:
        if without is not None:
            without.add(first, losses)
        watch(len(losses))

    trained.model.document_token = trained.document_token if tokens.has_documents else None
    score = score_tokens(trained.model, tokens.ids, tokens.bytes, stride, look)
    return score, None if without is None else without.score()
