"""What is scored: a text of --data, or the validation split of the corpus that a run was trained on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Corpus, load_corpus
from tokenizer import Tokenizer, TokenizerError
from utils.config.settings import DataConfig
from utils.corpora.sources import NAMES, find_source
from utils.errors import UserError
from utils.evaluation.weights import Trained
from utils.inference.scoring import Score, bytes_after_first, score_tokens
from utils.runs.find import moved_path

AT_ONCE = 1 << 22  # tokens whose bytes are counted together

Watch = Callable[[int], None]


@dataclass(frozen=True)
class Tokens:
    """Token ids (n,), which may be memory-mapped, and the bytes of the text that all but the first stand for."""

    ids: np.ndarray
    bytes: int


@dataclass(frozen=True)
class Text:
    """A whole text, which any tokenizer can read. hash: its sha256."""

    name: str
    text: str

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tokens(self, tokenizer: Tokenizer) -> Tokens:
        """Raises UserError if part of the text has no token; the message names the line."""
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        try:
            ids = np.concatenate([np.zeros(0, dtype), *(p.astype(dtype) for p in tokenizer.encode_parts(self.text))])
        except TokenizerError as error:
            line = "" if error.position is None else f":{self.text.count(chr(10), 0, error.position) + 1}"
            raise UserError(f"{self.name}{line}: {error}") from None
        return Tokens(ids, bytes_after_first(tokenizer, ids, self.text))


@dataclass(frozen=True)
class Split:
    """A split of a corpus, in the tokens of one tokenizer. hash: of the corpus."""

    name: str
    corpus: Corpus
    split: str

    @property
    def hash(self) -> str:
        return self.corpus.hash

    def tokens(self, tokenizer: Tokenizer) -> Tokens:
        ids = self.corpus.split(self.split)
        counts = self.corpus.byte_counts
        parts = range(1, len(ids), AT_ONCE)
        return Tokens(ids, sum(int(counts[ids[start : start + AT_ONCE]].sum()) for start in parts))


def named_text(data: str, corpora_dir: Path) -> Text:
    """The text of a registered corpus, a file or a folder.

    Raises:
        UserError: there is no such text, or it cannot be read.
    """
    name = data if data in NAMES else Path(data).name or data
    return Text(name, find_source(data, corpora_dir).read())


def own_split(trained: Trained, corpora_dir: Path, root: Path, report: Callable[[str], None]) -> Split:
    """The validation split of the corpus that a run was trained on.

    Args:
        root: the folder of the project.
        report: prints one line to the user.

    Raises:
        UserError: it is not known, cannot be read, or is no longer the text that the run was trained on.
    """
    settings = trained.settings()
    known = {key: settings[key] for key in DataConfig.model_fields if key in settings}
    config = DataConfig.model_validate({**known, "dataset": moved_path(str(settings.get("dataset")), root)})
    corpus = load_corpus(config, trained.model.config.block_size, corpora_dir, trained.tokenizer, report, keep=False)
    trained.check_corpus(corpus.hash, f"--data {config.dataset} evaluates all of it")
    name = config.dataset if config.dataset in NAMES else Path(config.dataset).name
    return Split(f"{name} (validation)", corpus, "val")


def score_of(trained: Trained, tokens: Tokens, stride: int | None, watch: Watch) -> Score:
    """How well a model predicts tokens, each once.

    Raises:
        UserError: fewer than two tokens.
    """
    return score_tokens(trained.model, tokens.ids, tokens.bytes, stride, watch)
