"""A prepared dataset as training reads it: memory-mapped, verified, and cut into rows by the setting `packing`."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokenizer import Tokenizer, TokenizerError, build_tokenizer, load_tokenizer
from utils.config.settings import DataConfig
from utils.corpora.datasets import DATASET_JSON, TYPES, Dataset, DatasetError, read_dataset
from utils.nn.targets import IGNORED
from utils.packing.documents import Documents, DocumentSubset
from utils.packing.joined import Joined
from utils.packing.plan import VERSION, Plan, best_fit, load_plan
from utils.packing.rows import Layout, Packed, Rows, Single
from utils.terminal.words import counted

IDS_AT_ONCE = 1 << 22  # tokens of a shard that are read at a time
LOOKED_AT = 256  # the first rows, which are searched for loss_after
MANY_LEAKS = 0.01  # fraction of the validation documents above which a warning is printed


@dataclass(frozen=True)
class Prepared:
    """A dataset whose shards were verified.

    packing: the value of the setting.
    plans: folder of the packing plans.
    loss_after: tokens of the text after which the targets of a document count; empty if all targets count.
    """

    dataset: Dataset
    tokenizer: Tokenizer
    packing: str
    plans: Path
    loss_after: tuple[int, ...] = ()
    _rows: dict[tuple[str, int], Rows] = field(default_factory=dict)
    _made: dict[Path, Plan] = field(default_factory=dict)  # plans that are not written yet

    @functools.cached_property
    def documents(self) -> Mapping[str, Documents]:
        """The documents of `train` and of `val`."""
        return {name: Documents(self.dataset, self.dataset.splits[name]) for name in ("train", "val")}

    @functools.cached_property
    def tokens(self) -> Joined:
        """The training tokens, followed by the validation tokens."""
        return Joined([*self.documents["train"].tokens.parts, *self.documents["val"].tokens.parts])

    @functools.cached_property
    def leaks(self) -> DocumentSubset:
        """The validation documents that nearly equal a training document."""
        return DocumentSubset(self.documents["val"], self.dataset.leaks)

    def rows(self, split: str, block_size: int) -> Rows | None:
        """The rows of `train` or `val`; None if packing is random."""
        if self.packing == "random":
            return None
        if (split, block_size) not in self._rows:
            documents, layout = self.documents[split], self._layout(split, block_size)
            rows = Rows(documents, layout, block_size, self.dataset.end_of_text, self.loss_after)
            self._rows[split, block_size] = rows
        return self._rows[split, block_size]

    def _layout(self, split: str, block_size: int) -> Layout:
        documents = self.documents[split]
        if self.packing == "none":
            return Single(documents, block_size)
        path = self.plans / f"{self.dataset.hash[:16]}-{split}-{block_size}-v{VERSION}.plan"
        plan = load_plan(path)
        if plan is None:
            plan = self._made[path] = best_fit(documents.lengths(), block_size)
        return Packed(plan, block_size)

    def check_end_of_text(self, split: str) -> None:
        """Raises DatasetError unless the first document begins with the end_of_text of dataset.json."""
        tokens = self.documents[split].tokens
        first = int(tokens.take(np.zeros(1, dtype=np.int64))[0]) if len(tokens) else self.dataset.end_of_text
        if first != self.dataset.end_of_text:
            raise DatasetError(
                f"{self.dataset.folder / DATASET_JSON}: its end_of_text is token {self.dataset.end_of_text:,}, but a "
                f"document in {split} begins with token {first:,}"
            )

    def save_plans(self) -> Joined:
        """Write new plans for later runs, if possible; returns the tokens."""
        with contextlib.suppress(OSError):
            for path, plan in self._made.items():
                plan.save(path)
        return self.tokens

    def note(self) -> str:
        """One line about the dataset for the start of training."""
        train, val = (self.dataset.splits[name].documents for name in ("train", "val"))
        return (
            f"{self.dataset.folder}: prepared with tokenizer {self.tokenizer.kind}, {self.tokenizer.vocab_size:,} "
            f"tokens; {counted(train, 'document')} for training and {val:,} for validation"
        )

    def leaks_note(self) -> str | None:
        """The warning that leaks distort the validation loss; None if there are only a few leaks."""
        leaks, documents = len(self.leaks), self.dataset.splits["val"].documents
        if leaks <= MANY_LEAKS * documents:
            return None
        return (
            f"{self.dataset.folder}: {leaks:,} of {documents:,} validation documents ({leaks / documents:.1%}) nearly "
            "equal a training document, which makes val/loss look better than it is; the last evaluation is also made "
            "without them"
        )

    def packing_facts(self, block_size: int) -> Mapping[str, float]:
        """The number of training rows, and the fractions of tokens that are cut or cropped, and of padding."""
        rows = self.rows("train", block_size)
        if rows is None:
            return {}
        return {"rows": len(rows), "cut_tokens": round(rows.layout.cut, 6), "padding": round(rows.padding, 6)}

    def bytes_per_token(self) -> float:
        """Mean bytes of text per training token."""
        split = self.dataset.splits["train"]
        return split.bytes / max(split.tokens, 1)

    def byte_scale(self) -> float:
        """Bytes of the validation text divided by the bytes that its tokens decode to."""
        if self.tokenizer.keeps_text:
            return 1.0
        n_bytes, tokens = self.dataset.splits["val"].bytes, self.documents["val"].tokens
        counts = self.tokenizer.byte_counts()
        parts = (np.asarray(tokens[start : start + IDS_AT_ONCE]) for start in range(0, len(tokens), IDS_AT_ONCE))
        return n_bytes / (sum(int(counts[part].sum()) for part in parts) or n_bytes or 1)


def open_prepared(
    folder: Path,
    config: DataConfig,
    block_size: int,
    plans: Path,
    tokenizer: Tokenizer | None,
    warn: Callable[[str], None],
    report: Callable[[str], None],
) -> Prepared:
    """Open the dataset in `folder`, and verify the shards that were modified since they were last verified.

    Args:
        plans: folder of the packing plans.
        tokenizer: that of the model that is trained further; None for a new model.
        warn, report: print one line to the user.

    Raises:
        UserError: the folder is not a dataset, a shard was edited, the dataset was made with a different tokenizer than
            the requested one, or a split is shorter than a sample.
    """
    dataset = read_dataset(folder)
    own = load_tokenizer(dataset.tokenizer_path)
    if own.hash() != dataset.tokenizer_hash:
        raise DatasetError(f"{dataset.tokenizer_path}: not the tokenizer that the dataset was prepared with")
    if tokenizer is not None and tokenizer.hash() != dataset.tokenizer_hash:
        has_file = config.tokenizer.startswith("hf:")
        raise DatasetError(
            f"{folder}: it was prepared with tokenizer {own.kind}, {own.vocab_size:,} tokens; the model has another "
            f"one: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
            + (f"; prepare.py ... --tokenizer {config.tokenizer} prepares the text with it" if has_file else "")
        )
    if config.tokenizer != DataConfig().tokenizer:  # the default cannot be told from a request for it
        check_made_with(dataset, own, config)
    own = tokenizer or own  # same hash, but its vocabulary may be padded to the embedding rows of the model
    verify_shards(dataset, own.vocab_size)
    try:
        loss_after = () if config.loss_after is None else tuple(own.encode(config.loss_after))
    except TokenizerError:
        raise DatasetError(
            f"{folder}: loss_after {config.loss_after!r} has characters that no document contains"
        ) from None
    prepared = Prepared(dataset, own, config.packing, plans, loss_after)
    for split, name in (("train", "training"), ("val", "validation")):
        prepared.check_end_of_text(split)
        length, needed = len(prepared.documents[split].tokens), block_size + 1
        if config.packing == "random" and length < needed:
            raise DatasetError(
                f"{folder}: too short: its {name} split has {length:,} of {len(prepared.tokens):,} tokens, block_size "
                f"{block_size} needs at least {needed:,}"
            )
        if (rows := prepared.rows(split, block_size)) is not None and not len(rows):
            raise DatasetError(f"{folder}: its {name} split has no documents")
        if rows is not None and loss_after and not _has_targets(rows):
            raise DatasetError(
                f"{folder}: loss_after {config.loss_after!r} is in none of the first rows of its {name} split, so that "
                f"nothing would be learned: expected a text that its documents have within block_size {block_size}"
            )
    report(prepared.note())
    if (note := prepared.leaks_note()) is not None:
        warn(note)
    return prepared


def verify_shards(dataset: Dataset, vocab_size: int, thorough: bool = False) -> None:
    """Compare shards with their checksums, and their token ids with the vocabulary size.

    Args:
        thorough: compare all shards, not only those that `Dataset.verify` finds modified.

    Raises:
        DatasetError: a shard is missing, was edited, or has ids outside the vocabulary; the message names it.
    """

    def look(path: Path) -> None:
        if path.suffix == ".bin" and path.stat().st_size:
            ids = np.memmap(path, dtype=f"<u{TYPES[dataset.dtype]}", mode="r")
            largest = max(int(ids[first : first + IDS_AT_ONCE].max()) for first in range(0, len(ids), IDS_AT_ONCE))
            if largest >= vocab_size:
                raise DatasetError(f"{path}: token id {largest:,} is beyond the vocabulary of {vocab_size:,} tokens")

    dataset.verify(thorough, look)


def check_made_with(dataset: Dataset, own: Tokenizer, config: DataConfig) -> None:
    """Raises DatasetError unless the dataset was prepared with the tokenizer of `config`.

    Args:
        own: the tokenizer of the dataset.
    """
    kind, _, path = config.tokenizer.partition(":")
    fits = kind == own.kind
    if fits and path and os.path.exists(os.path.expanduser(path)):  # otherwise only the dataset's copy is left
        fits = build_tokenizer(config, ()).hash() == dataset.tokenizer_hash
    if not fits:
        raise DatasetError(
            f"{dataset.folder}: it was prepared with tokenizer {own.kind}, {own.vocab_size:,} tokens, not "
            f"{config.tokenizer}: leave --tokenizer out, or prepare the text again with it"
        )


def _has_targets(rows: Rows) -> bool:
    """Whether any target in the first rows counts."""
    _, targets = rows.batch(rows.places(np.arange(min(len(rows), LOOKED_AT))))
    return bool((targets != IGNORED).any())
