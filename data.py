"""Corpora as token files, the train/val split, and batches.

There is no data state to save. Sample n of a split is a window of the text or a row of documents (utils/packing); which
one is a pure function of (seed, split, n), and each step, micro-step and rank takes its own range of n. A resume
therefore needs only the step, and the global batch does not depend on how it is divided.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer import Tokenizer, TokenizerError, build_tokenizer, tokenizer_class, tokenizer_from_json
from utils.config.settings import DataConfig
from utils.corpora.datasets import dataset_names, find_dataset
from utils.corpora.records import TokenRecord, file_state, read_record, record_path, write_record
from utils.corpora.sources import CORPORA, CorpusError, find_source
from utils.crc32 import crc32, file_crc32
from utils.files import write_atomic
from utils.nn.targets import IGNORED
from utils.packing.joined import Joined
from utils.packing.prepared import Prepared, open_prepared
from utils.packing.rows import Rows
from utils.packing.shuffle import in_random_order
from utils.packing.windows import STREAMS, sample_offsets, sample_windows, windows_of_pass
from utils.tokenization.protocol import id_dtype

SAMPLED_TOKENS = 1 << 20
INEXACT = 0.01  # relative difference between the bytes of a text and of its tokens above which a warning is printed
EVALUATION_SEED = 0  # the same evaluation batches for every seed, so that losses are comparable


@dataclass(frozen=True)
class Corpus:
    """Encoded text: memory-mapped tokens, split into train and val.

    tokens: shape (n,), uint16 or uint32, on disk once the corpus is stored.
    hash: sha256 of the text, or `Dataset.hash` of a prepared dataset.
    prepared: the dataset that the tokens belong to; None if they are those of a single text.
    byte_scale: bytes of the text divided by the bytes that its tokens decode to; 1 if the tokenizer is lossless.
    """

    name: str
    hash: str
    tokenizer: Tokenizer
    tokens: np.ndarray | Joined
    n_train: int
    store: Callable[[], np.ndarray | Joined] | None = None  # writes the tokens and returns them memory-mapped
    prepared: Prepared | None = None
    byte_scale: float = 1.0

    def stored(self) -> Corpus:
        """This corpus with its tokens on disk, where they take no memory and later runs find them.

        Raises:
            CorpusError: the tokens cannot be written.
        """
        return self if self.store is None else dataclasses.replace(self, tokens=self.store(), store=None)

    def split(self, name: str) -> np.ndarray | Joined:
        """Tokens of `train` (the first part, also for `train_eval`) or `val` (the rest)."""
        if self.prepared is not None:
            return self.prepared.documents["val" if name == "val" else "train"].tokens
        return self.tokens[self.n_train :] if name == "val" else self.tokens[: self.n_train]

    @functools.cached_property
    def byte_counts(self) -> np.ndarray:
        """Bytes of text that each token stands for, by id, scaled so that they add up to the size of the text."""
        counts = self.tokenizer.byte_counts()
        return counts if self.byte_scale == 1 else counts * self.byte_scale

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """Mean bytes per training token, estimated from SAMPLED_TOKENS evenly spaced ones if there are more."""
        if self.prepared is not None:
            return self.prepared.bytes_per_token()
        tokens = self.split("train")
        return float(self.byte_counts[tokens[:: -(-len(tokens) // SAMPLED_TOKENS)]].mean())

    @property
    def n_val(self) -> int:
        return len(self.tokens) - self.n_train

    def rows(self, stream: str, block_size: int) -> Rows | None:
        """The rows of documents that a stream samples; None if its samples are windows of the text."""
        split = "val" if stream == "val" else "train"
        return None if self.prepared is None else self.prepared.rows(split, block_size)

    def tokens_of_pass(self, block_size: int) -> int:
        """Tokens in one pass over the training split, padding included."""
        rows = self.rows("train", block_size)
        return self.n_train if rows is None else len(rows) * block_size

    def facts(self, block_size: int) -> dict[str, float]:
        """The numbers of documents and rows, which a run records."""
        if self.prepared is None:
            return {}
        splits = self.prepared.dataset.splits
        documents = {f"{name}_documents": splits[name].documents for name in ("train", "val")}
        return {**documents, **self.prepared.packing_facts(block_size)}

    @property
    def document_token(self) -> int | None:
        """The token that begins each document of a row; None if samples are not rows of documents."""
        if self.prepared is None or self.prepared.packing == "random":
            return None
        return self.prepared.dataset.end_of_text


@dataclass(frozen=True)
class TokenFile:
    """The file of an encoded text in the folder of token files; it may not be written yet.

    corpus_hash: sha256 of the text.
    byte_scale: see `Corpus`.
    """

    folder: Path
    corpus_hash: str
    tokenizer: Tokenizer
    n_tokens: int
    byte_scale: float = 1.0

    @property
    def dtype(self) -> np.dtype[Any]:
        return id_dtype(self.tokenizer.vocab_size)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.corpus_hash[:16]}-{self.tokenizer.hash()[:16]}.{self.dtype.name}"

    def is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.n_tokens * self.dtype.itemsize

    def crc32(self) -> int:
        """Checksum of the file; runs at several gigabytes a second."""
        with self.path.open("rb") as file:
            return file_crc32(file)

    def write(self, ids: np.ndarray) -> int:
        """Write `ids`, which have the file's dtype, unless the file holds them already; returns its checksum."""
        content = ids.data
        checksum = crc32(content)
        if not self.is_whole() or self.crc32() != checksum:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, content)
        return checksum

    def tokens(self) -> np.ndarray:
        """(n_tokens,), memory-mapped, but as a plain ndarray, which is faster to slice than np.memmap."""
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r"))


def load_corpus(
    config: DataConfig,
    block_size: int,
    corpora_dir: Path,
    tokenizer: Tokenizer | None = None,
    warn: Callable[[str], None] = lambda message: None,
    report: Callable[[str], None] = lambda message: None,
    keep: bool = True,
    datasets_dir: Path | None = None,
) -> Corpus:
    """Load a corpus, encoded and split. Its text is read and encoded only once, as long as its files do not change.

    Args:
        tokenizer: that of the model that is trained further; None to make one from the corpus.
        warn, report: print one line to the user.
        keep: whether to write the tokens now; if not, `Corpus.stored` does, and an error found until then leaves no
            file behind.
        datasets_dir: folder of prepared datasets; by default that of `config`.

    Raises:
        CorpusError: the corpus cannot be read, `tokenizer` cannot encode it, or a split is shorter than block_size + 1
            tokens.
    """
    datasets_dir = Path(config.datasets_dir) if datasets_dir is None else datasets_dir
    if config.dataset not in CORPORA and (found := find_dataset(config.dataset, datasets_dir)) is not None:
        prepared = open_prepared(found, config, block_size, corpora_dir / "plans", tokenizer, warn, report)
        corpus = Corpus(
            name=config.dataset,
            hash=prepared.dataset.hash,
            tokenizer=prepared.tokenizer,
            tokens=prepared.tokens,
            n_train=len(prepared.documents["train"].tokens),
            store=prepared.save_plans,
            prepared=prepared,
            byte_scale=prepared.byte_scale(),
        )
        _report_byte_scale(corpus, warn)
        return corpus.stored() if keep else corpus
    source = find_source(config.dataset, corpora_dir, dataset_names(datasets_dir))
    if config.packing != "random":
        raise CorpusError(
            f"{config.dataset}: packing {config.packing} needs documents, and this is one text: python prepare.py "
            f"{config.dataset} --out NAME makes a dataset of it, --dataset NAME trains on that"
        )
    folder = corpora_dir / "encoded"
    try:
        if tokenizer is not None:
            tokenizer = tokenizer.adjusted(config)
        elif not tokenizer_class(config).learns:
            tokenizer = build_tokenizer(config.model_copy(update={"corpora_dir": str(corpora_dir)}), ())
    except TokenizerError as error:
        raise CorpusError(str(error)) from None
    not_of_tokenizer = {"dataset", "val_fraction", "corpora_dir", "datasets_dir", "packing", "loss_after"}
    key = config.model_dump_json(exclude=not_of_tokenizer) if tokenizer is None else tokenizer.hash()
    stamp = source.stamp()  # taken before the text is read, because the text may change meanwhile
    file = _recorded_file(folder, record_path(folder, source.name, key), stamp, warn)
    if file is not None:
        n_train = _split(config, file.n_tokens, block_size)
        # The record's tokenizer gives the same ids, but another model may have more or fewer rows.
        tokenizer = tokenizer or file.tokenizer
        corpus = Corpus(config.dataset, file.corpus_hash, tokenizer, _mapped(file), n_train, byte_scale=file.byte_scale)
    else:
        file, ids = _encode(source.read(), config, block_size, folder, tokenizer)
        records = [record_path(folder, source.name, name) for name in {key, file.tokenizer.hash()}]
        store, n_train = functools.partial(_store, file, ids, stamp, records), _split(config, len(ids), block_size)
        corpus = Corpus(
            config.dataset, file.corpus_hash, file.tokenizer, ids, n_train, store, byte_scale=file.byte_scale
        )
        corpus = corpus.stored() if keep else corpus
    _report_byte_scale(corpus, warn)
    for note in source.notes(config.val_fraction):
        report(note)
    return corpus


def _mapped(file: TokenFile) -> np.ndarray:
    try:
        return file.tokens()
    except OSError as error:
        raise CorpusError(f"{file.path}: the token file cannot be read: {error.strerror}") from None


def _store(file: TokenFile, ids: np.ndarray, stamp: str | None, records: Sequence[Path]) -> np.ndarray:
    """Write a token file, unless it exists already, and the records of its text; returns the tokens on disk."""
    try:
        crc32 = file.write(ids)
    except OSError as error:
        raise CorpusError(f"{file.path}: the token file cannot be written: {error.strerror}") from None
    if stamp is not None:
        with contextlib.suppress(OSError):  # without a record, the next run reads the text again
            state = file_state(file.path)
            form = file.tokenizer.to_json()
            record = TokenRecord(stamp, file.corpus_hash, form, file.n_tokens, crc32, state, file.byte_scale)
            for path in records:
                write_record(path, record)
    return _mapped(file)


def _encode(
    text: str, config: DataConfig, block_size: int, folder: Path, tokenizer: Tokenizer | None
) -> tuple[TokenFile, np.ndarray]:
    """Encode `text`: its token file, which is not written yet, and its tokens.

    Raises:
        CorpusError: `tokenizer` cannot encode the text, or a split is too short.
    """
    try:
        if tokenizer is None:
            tokenizer = build_tokenizer(config, [text])
        else:
            tokenizer.check(text)  # the vocabulary of a trained model cannot grow
    except TokenizerError as error:
        raise CorpusError(f"{config.dataset}: {error}") from None
    content = text.encode("utf-8")
    file = TokenFile(folder, hashlib.sha256(content).hexdigest(), tokenizer, n_tokens=0)
    parts, byte_counts, n_bytes = [], tokenizer.byte_counts(), 0
    for part in tokenizer.encode_parts(text):
        if part.size and (part.min() < 0 or part.max() >= tokenizer.vocab_size):
            raise CorpusError(
                f"{config.dataset}: its tokenizer gives ids outside its vocabulary of {tokenizer.vocab_size:,}"
            )
        n_bytes += int(byte_counts[part].sum())
        parts.append(part.astype(file.dtype))  # takes a quarter of the memory of int64
    ids = np.concatenate(parts)
    _split(config, len(ids), block_size)
    return dataclasses.replace(file, n_tokens=len(ids), byte_scale=len(content) / (n_bytes or len(content))), ids


def _report_byte_scale(corpus: Corpus, warn: Callable[[str], None]) -> None:
    """Warn if the tokens decode to clearly more or fewer bytes than the text has."""
    off = 1 / corpus.byte_scale - 1
    if abs(off) > INEXACT:
        warn(
            f"{corpus.name}: decoding its tokens gives {abs(off):.1%} {'more' if off > 0 else 'fewer'} bytes than its "
            "text has, because the tokenizer does not preserve the text: bits per byte are estimates"
        )


def _recorded_file(folder: Path, path: Path, stamp: str | None, warn: Callable[[str], None]) -> TokenFile | None:
    """The token file that the record at `path` describes, if both are intact and the text has not changed since.

    The checksum is compared only if the file was modified since it was last verified. That all ids are below vocab_size
    was checked before the record was written.
    """
    if stamp is None or (record := read_record(path, stamp)) is None:
        return None
    try:
        tokenizer = tokenizer_from_json(record.tokenizer, str(path))
        scale = 1.0 if record.byte_scale is None and tokenizer.keeps_text else record.byte_scale
        if record.crc32 is None or scale is None:
            return None
        file = TokenFile(folder, record.corpus_hash, tokenizer, record.n_tokens, scale)
        if not file.is_whole():
            return None
        state = file_state(file.path)
        if state != record.verified:
            if file.crc32() != record.crc32:
                warn(f"{file.path}: damaged: its CRC-32 is not the one in its record; the text is encoded again")
                return None
            with contextlib.suppress(OSError):
                write_record(path, dataclasses.replace(record, verified=state))
        return file
    except (TokenizerError, OSError):
        return None


def _split(config: DataConfig, n_tokens: int, block_size: int) -> int:
    """The number of tokens in the training split.

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


@dataclass(frozen=True)
class BatchSampler:
    """Batches of a corpus, as a pure function of the step.

    batch_size is the number of sequences in one optimizer update, over all micro-steps and ranks.
    """

    corpus: Corpus
    block_size: int
    batch_size: int
    seed: int
    device: torch.device
    _ahead: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _update: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # the latest update only, by step

    def train_batch(
        self, step: int, micro_step: int = 0, micro_steps: int = 1, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one micro-step of one rank: (batch_size / micro_steps / world_size, T) each."""
        share = self.batch_size // (micro_steps * world_size)
        first = step * self.batch_size + (micro_step * world_size + rank) * share
        return self._ahead.pop((first, share), None) or self._batch("train", self.seed, first, share)

    def target_share(self, step: int, micro_step: int, micro_steps: int) -> torch.Tensor | None:
        """The fraction of an update's targets in a micro-step, () on the device; None if all have the same fraction."""
        if (shares := self.target_shares(step, micro_steps)) is None:
            return None
        share = torch.tensor(shares[micro_step], dtype=torch.float32)
        return (share.pin_memory() if self.device.type == "cuda" else share).to(self.device, non_blocking=True)

    def target_shares(self, step: int, micro_steps: int) -> list[float] | None:
        """The fraction of an update's targets in each micro-step; None if all have the same fraction."""
        if self.corpus.rows("train", self.block_size) is None:
            return None
        _, targets = self.update(step)
        counts = (targets != IGNORED).reshape(micro_steps, -1).sum(axis=1)
        shares: list[float] = (counts / max(counts.sum(), 1)).tolist()
        return shares

    def update(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of an update, (batch_size, T) int64 each, on the host."""
        if (made := self._update.get(step)) is None:
            made = self._gather("train", self.seed, step * self.batch_size, self.batch_size)
            self._update.clear()
            self._update[step] = made
        return made

    def prefetch(self, step: int, micro_step: int = 0, micro_steps: int = 1) -> None:
        """Prepare the batch of the next `train_batch` call while the device is busy with the current one.

        Does nothing on a CPU, where the two would not overlap.
        """
        if self.device.type == "cuda":
            self._ahead.clear()  # keep at most one batch, even if a step is repeated
            share = self.batch_size // micro_steps
            first = step * self.batch_size + micro_step * share
            self._ahead[first, share] = self._batch("train", self.seed, first, share)

    def train_offsets(self, step: int) -> list[int]:
        """The offsets in the training tokens at which the samples of update `step` start."""
        offsets: list[int] = self.places("train", self.seed, step * self.batch_size, self.batch_size)[:, 0].tolist()
        return offsets

    def evaluation_batches(
        self,
        stream: str,
        count: int,
        micro_steps: int = 1,
        leaks: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `count` batches of `train_eval` or `val`, each in `micro_steps` parts; the same at every evaluation.

        They depend on the number and length of the sequences, not on the seed. If the split has too few sequences, each
        is used once, and the last part is smaller.

        Args:
            leaks: whether validation documents that nearly equal a training document have targets.
            rank, world_size: yield only every world_size-th part, starting with part `rank`.
        """
        share, end = self.batch_size // micro_steps, self.evaluation_windows(stream, count)
        for first in range(rank * share, end, world_size * share):
            yield self._batch(stream, EVALUATION_SEED, first, min(share, end - first), leaks)

    def evaluation_parts(self, stream: str, count: int, micro_steps: int = 1) -> int:
        """The number of parts that `evaluation_batches` yields to all ranks together."""
        return -(-self.evaluation_windows(stream, count) // (self.batch_size // micro_steps))

    def evaluation_windows(self, stream: str, count: int) -> int:
        """The number of sequences in `count` evaluation batches, at most those of the split."""
        rows = self.corpus.rows(stream, self.block_size)
        most = windows_of_pass(len(self.corpus.split(stream)), self.block_size) if rows is None else len(rows)
        return min(count * self.batch_size, most)

    def evaluation_bytes(self, stream: str, count: int) -> float:
        """Mean bytes of text per predicted token in `count` evaluation batches of `train_eval` or `val`."""
        end, n_bytes, n_targets = self.evaluation_windows(stream, count), 0.0, 0
        for first in range(0, end, self.batch_size):
            _, targets = self._gather(stream, EVALUATION_SEED, first, min(self.batch_size, end - first))
            counted = targets[targets != IGNORED]
            n_bytes += float(self.corpus.byte_counts[counted].sum())
            n_targets += len(counted)
        return n_bytes / max(n_targets, 1)

    def places(self, stream: str, seed: int, first: int, count: int) -> np.ndarray:
        """The position in the split of each token of samples first .. first + count - 1, (count, T); or PADDING."""
        rows, n_tokens = self.corpus.rows(stream, self.block_size), len(self.corpus.split(stream))
        if rows is not None:
            return rows.places(in_random_order(seed, STREAMS[stream], first, count, len(rows)))
        lazily = self.corpus.prepared is not None
        offsets = sample_offsets(seed, stream, first, count, n_tokens, self.block_size, lazily)
        return offsets[:, None] + np.arange(self.block_size)

    def _gather(
        self, stream: str, seed: int, first: int, count: int, leaks: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (count, T) int64 each; the target of a token is the next token."""
        places, rows = self.places(stream, seed, first, count), self.corpus.rows(stream, self.block_size)
        if rows is not None:
            inputs, targets = rows.batch(places)
        else:
            windows = sample_windows(self.corpus.split(stream), places[:, 0], self.block_size)  # (count, T + 1)
            inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        if not leaks and self.corpus.prepared is not None:
            targets[self.corpus.prepared.leaks.contain(places)] = IGNORED
        return inputs, targets

    def _batch(
        self, stream: str, seed: int, first: int, count: int, leaks: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if stream == "train" and self.corpus.document_token is not None:
            begin = first % self.batch_size
            pair = [part[begin : begin + count] for part in self.update(first // self.batch_size)]
        else:
            pair = [*self._gather(stream, seed, first, count, leaks)]
        inputs, targets = map(torch.from_numpy, pair)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
