"""Corpora, encoded token files, the train/val split, and batches.

There is no data state to save: sample n of a split starts at an offset that is a pure function of
(seed, split, n), and a step, micro-step and rank each take their slice of n. So a resume needs only
the step, and the global batch does not depend on how it is divided.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tokenizer import Tokenizer, TokenizerError, build_tokenizer
from utils.config.settings import DataConfig
from utils.errors import UserError, nearest
from utils.files import write_atomic

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SUFFIXES = frozenset(
    (".txt", ".md", ".rst", ".py", ".csv", ".html", ".json", ".jsonl", ".tex", ".xml", ".log", "")
)

# Streams of random numbers: one for each use, so that none disturbs another.
STREAMS = {"train": 0, "train_eval": 1, "val": 2}
EVALUATION_SEED = 0  # evaluation batches are the same whatever the seed, so that losses compare


class CorpusError(UserError):
    """A corpus that cannot be read or is too short."""


def _pydocs(corpora_dir: Path) -> str:
    """The Python language reference inside CPython: no download; differs between Python releases."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _shakespeare(corpora_dir: Path) -> str:
    """Tiny Shakespeare: $WORKBENCH_DATA, corpora/, or downloaded once; its sha256 is checked."""
    folders = [Path(folder) for folder in (os.environ.get("WORKBENCH_DATA"),) if folder] + [corpora_dir]
    for folder in folders:
        path = folder / "tinyshakespeare.txt"
        if path.is_file():
            return _checked_shakespeare(_read_bytes(path), str(path)).decode()
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            data = _checked_shakespeare(response.read(), SHAKESPEARE_URL)
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(
            f"shakespeare: cannot be downloaded ({getattr(error, 'reason', error)}); put tinyshakespeare.txt "
            f"into {corpora_dir} or name its folder in WORKBENCH_DATA"
        ) from None
    try:
        corpora_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(corpora_dir / "tinyshakespeare.txt", data)
    except OSError as error:
        raise CorpusError(f"{corpora_dir}: the download cannot be kept: {error.strerror}") from None
    return data.decode()


def _checked_shakespeare(data: bytes, place: str) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise CorpusError(f"{place}: not Tiny Shakespeare: sha256 {digest[:12]}..., not {SHAKESPEARE_SHA256[:12]}...")
    return data


CORPORA: dict[str, Callable[[Path], str]] = {"pydocs": _pydocs, "shakespeare": _shakespeare}


def read_corpus(dataset: str, corpora_dir: Path) -> str:
    """The whole text of a registered corpus, a UTF-8 file, or a folder of them (by path order).

    Raises:
        CorpusError: unknown, unreadable, binary, not UTF-8, or empty.
    """
    if dataset in CORPORA:
        return CORPORA[dataset](corpora_dir)
    path = Path(os.path.expanduser(dataset))
    try:
        path.stat()
    except PermissionError as error:
        raise CorpusError(f"{dataset}: cannot be read: {error.strerror}") from None
    except OSError:
        raise CorpusError(
            f"unknown dataset {dataset}: expected {', '.join(CORPORA)} or the path of a text file or folder"
            f"{nearest(dataset, CORPORA)}"
        ) from None
    if os.path.isdir(path):
        files = _text_files(path)
        if not files:
            raise CorpusError(f"{dataset}: no text files in this folder")
        text = "\n".join(_read_text(file) for file in files)
    else:
        text = _read_text(path)
    if not text.strip():
        raise CorpusError(f"{dataset}: the corpus is empty")
    return text


def _text_files(folder: Path) -> list[Path]:
    """Files with a suffix of text, by path; hidden files and folders are left out."""

    def fail(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}")

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in TEXT_SUFFIXES)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    if (position := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path}: a binary file (NUL at byte {position}), expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorpusError(f"{path}:{line}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})") from None


@dataclass(frozen=True)
class Corpus:
    """Encoded text: memory-mapped tokens, split into train and val.

    tokens: shape (n,), uint16 or uint32, on disk. hash: sha256 of the text.
    """

    name: str
    hash: str
    tokenizer: Tokenizer
    tokens: np.ndarray
    n_train: int

    def split(self, name: str) -> np.ndarray:
        """Tokens of `train` (the first part, also for `train_eval`) or `val` (the rest)."""
        return self.tokens[self.n_train :] if name == "val" else self.tokens[: self.n_train]

    @property
    def n_val(self) -> int:
        return len(self.tokens) - self.n_train


def load_corpus(config: DataConfig, block_size: int, corpora_dir: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, encode (once: the token file is kept) and split a corpus.

    Args:
        tokenizer: of the model that is trained further; None: one is made from the corpus.

    Raises:
        CorpusError: unreadable, `tokenizer` cannot encode it, or a split is shorter than block_size + 1 tokens.
    """
    text = read_corpus(config.dataset, corpora_dir)
    corpus_hash = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if tokenizer is None:
        tokenizer = build_tokenizer(config, [text])
    else:
        tokenizer = _adjusted(tokenizer, config)
        _check(tokenizer, text, config)
    ids = tokenizer.encode_array(text)
    n_train = _split(config, len(ids), block_size)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    path = corpora_dir / "encoded" / f"{corpus_hash[:16]}-{tokenizer.hash()[:16]}.{dtype.name}"
    try:
        if not path.is_file() or path.stat().st_size != len(ids) * dtype.itemsize:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, ids.astype(dtype).tobytes())
        tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain array is quicker to cut
    except OSError as error:
        raise CorpusError(f"{path}: the token file cannot be written or read: {error.strerror}") from None
    return Corpus(config.dataset, corpus_hash, tokenizer, tokens, n_train)


def _adjusted(tokenizer: Tokenizer, config: DataConfig) -> Tokenizer:
    try:
        return tokenizer.adjusted(config)
    except TokenizerError as error:
        raise CorpusError(str(error)) from None


def _check(tokenizer: Tokenizer, text: str, config: DataConfig) -> None:
    """Raises CorpusError unless the text can be encoded: the vocabulary of a trained model does not grow."""
    try:
        tokenizer.check(text)
    except TokenizerError as error:
        raise CorpusError(f"{config.dataset}: {error}") from None


def _split(config: DataConfig, n_tokens: int, block_size: int) -> int:
    """How many of the tokens are for training.

    Raises:
        CorpusError: a split is shorter than block_size + 1 tokens.
    """
    n_train = int(n_tokens * (1 - config.val_fraction))
    for split, length in (("training", n_train), ("validation", n_tokens - n_train)):
        if length < block_size + 1:
            raise CorpusError(
                f"{config.dataset}: too short: its {split} split has {length:,} of {n_tokens:,} tokens, "
                f"block_size {block_size} needs at least {block_size + 1:,}"
            )
    return n_train


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, stream: str, epoch: int, n_windows: int, n_phases: int) -> tuple[int, np.ndarray]:
    """Where the windows of one pass start (0 .. n_phases - 1), and their order, a permutation of n_windows.

    Philox4x64-10 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011] with key
    (seed, stream); the pass is the high word of its counter. Only raw words are used: numpy promises
    that they stay the same, unlike the output of its distributions.
    """
    words = np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, epoch]).random_raw(n_windows + 1)
    return int(words[0] % np.uint64(n_phases)), np.argsort(words[1:], kind="stable")


def sample_offsets(seed: int, stream: str, first: int, count: int, n_tokens: int, block_size: int) -> np.ndarray:
    """Start offsets of samples first .. first + count - 1 of a stream, shape (count,), int64.

    A pass cuts the tokens into windows of block_size side by side, from a random start, and visits each
    once, in random order: an epoch is an epoch. Offsets drawn independently would leave a third of the
    text unseen in the time of one pass; the effect on the loss is within the noise of seeds (docs/LOG.md).
    """
    n_windows = max(n_tokens // block_size - 1, 1)
    n_phases = n_tokens - n_windows * block_size
    parts = []
    for epoch in range(first // n_windows, (first + count - 1) // n_windows + 1):
        phase, order = _epoch_order(seed, stream, epoch, n_windows, n_phases)
        begin = epoch * n_windows  # the number of the epoch's first sample
        parts.append(phase + order[max(first - begin, 0) : first + count - begin] * block_size)
    return np.concatenate(parts)


def gather(tokens: np.ndarray, offsets: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (B, T) int64: `targets` is `inputs` shifted by one token."""
    windows = tokens.take(offsets[:, None] + np.arange(block_size + 1))  # (B, T + 1)
    return torch.from_numpy(windows[:, :-1].astype(np.int64)), torch.from_numpy(windows[:, 1:].astype(np.int64))


@dataclass(frozen=True)
class BatchSampler:
    """Batches of a corpus, as a pure function of the step.

    batch_size is the number of sequences of one optimizer update, over all micro-steps and ranks.
    """

    corpus: Corpus
    block_size: int
    batch_size: int
    seed: int
    device: torch.device
    _ahead: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def train_batch(
        self, step: int, micro_step: int = 0, micro_steps: int = 1, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one micro-step of one rank: (batch_size / micro_steps / world_size, T) each."""
        share = self.batch_size // (micro_steps * world_size)
        first = step * self.batch_size + (micro_step * world_size + rank) * share
        return self._ahead.pop((first, share), None) or self._batch("train", self.seed, first, share)

    def prefetch(self, step: int, micro_step: int = 0, micro_steps: int = 1) -> None:
        """Make the batch that `train_batch` is asked for next, while the device is busy with this one.

        On a GPU, where work is only queued; a CPU would do the one after the other.
        """
        if self.device.type == "cuda":
            self._ahead.clear()  # at most one, also where a step is repeated
            share = self.batch_size // micro_steps
            first = step * self.batch_size + micro_step * share
            self._ahead[first, share] = self._batch("train", self.seed, first, share)

    def train_offsets(self, step: int) -> list[int]:
        """Where in the training tokens the samples of update `step` start."""
        n_tokens = len(self.corpus.split("train"))
        first = step * self.batch_size
        return sample_offsets(self.seed, "train", first, self.batch_size, n_tokens, self.block_size).tolist()

    def evaluation_batches(
        self, stream: str, count: int, micro_steps: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`count` fixed batches of `train_eval` or `val`, each in `micro_steps` parts: the same at every evaluation.

        They do not depend on the seed, but on how many sequences of which length are asked for.
        """
        share = self.batch_size // micro_steps
        for index in range(count * micro_steps):
            yield self._batch(stream, EVALUATION_SEED, index * share, share)

    def _batch(self, stream: str, seed: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.corpus.split(stream)
        offsets = sample_offsets(seed, stream, first, count, len(tokens), self.block_size)
        inputs, targets = gather(tokens, offsets, self.block_size)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
