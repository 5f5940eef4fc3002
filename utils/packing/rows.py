"""Rows of whole documents for training: one document in each row, or several, packed best-fit; the rest is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from utils.nn.targets import IGNORED
from utils.packing.documents import Documents
from utils.packing.plan import Plan

PADDING = -1  # the place of a position that has no token


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive tokens that the rows of a batch consist of; each array is (segments,) int64.

    rows: the row of the batch that each segment is in; columns: the column at which it begins.
    starts: the token of the split at which it begins; lengths: its number of tokens.
    """

    rows: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Layout(Protocol):
    """The segments of each row."""

    def __len__(self) -> int: ...

    def segments(self, numbers: np.ndarray) -> Segments: ...

    @property
    def cut(self) -> float:
        """The fraction of the split's tokens that cutting or cropping affects."""
        ...

    @property
    def used(self) -> int:
        """The number of tokens in all rows, padding excluded."""
        ...


class Single:
    """One row for each document, cropped to `block_size` tokens."""

    def __init__(self, documents: Documents, block_size: int) -> None:
        self._documents, self._block_size = documents, block_size

    def __len__(self) -> int:
        return len(self._documents)

    def segments(self, numbers: np.ndarray) -> Segments:
        starts, lengths = self._documents.bounds(numbers)
        none = np.zeros(len(numbers), dtype=np.int64)
        return Segments(np.arange(len(numbers)), none, starts, np.minimum(lengths, self._block_size))

    @property
    def cut(self) -> float:
        """The fraction of tokens that are cropped."""
        return 1 - self.used / max(len(self._documents.tokens), 1)

    @property
    def used(self) -> int:
        return int(np.minimum(self._documents.lengths(), self._block_size).sum())


class Packed:
    """The rows of a plan."""

    def __init__(self, plan: Plan, block_size: int) -> None:
        self._plan, self._block_size = plan, block_size
        self._n_cut = int(plan.cut_rows[-1])

    def __len__(self) -> int:
        return self._n_cut + len(self._plan.rows) - 1

    def segments(self, numbers: np.ndarray) -> Segments:
        plan, is_cut = self._plan, numbers < self._n_cut
        cut = numbers[is_cut]
        document = np.searchsorted(plan.cut_rows, cut, side="right") - 1
        of_cut = plan.cut_starts[document] + (cut - plan.cut_rows[document]) * self._block_size

        packed = numbers[~is_cut] - self._n_cut
        firsts = plan.rows[packed]
        counts = plan.rows[packed + 1] - firsts
        chosen = np.repeat(firsts, counts) + ramps(counts)
        lengths = plan.lengths[chosen]
        before = np.cumsum(lengths) - lengths
        columns = before - np.repeat(before[np.cumsum(counts) - counts], counts)
        return Segments(
            np.concatenate([np.flatnonzero(is_cut), np.repeat(np.flatnonzero(~is_cut), counts)]),
            np.concatenate([np.zeros(len(cut), dtype=np.int64), columns]),
            np.concatenate([of_cut, plan.starts[chosen]]),
            np.concatenate([np.full(len(cut), self._block_size), lengths]),
        )

    @property
    def cut(self) -> float:
        return self._plan.cut

    @property
    def used(self) -> int:
        return self._plan.used


@dataclass(frozen=True)
class Rows:
    """The rows of a split, from which batches are made.

    end_of_text: the token that each document begins with; also fills the padding.
    loss_after: tokens of the text after which the targets of a document count; empty if all targets count.
    """

    documents: Documents
    layout: Layout
    block_size: int
    end_of_text: int
    loss_after: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def padding(self) -> float:
        """The fraction of all positions that is padding."""
        return 1 - self.layout.used / max(len(self) * self.block_size, 1)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """The position in the split of each token of these rows, (B, T) int64; PADDING where a row has no token."""
        found = np.full(len(numbers) * self.block_size, PADDING)
        segments = self.layout.segments(numbers)
        within = ramps(segments.lengths)
        in_batch = np.repeat(segments.rows * self.block_size + segments.columns, segments.lengths) + within
        found[in_batch] = np.repeat(segments.starts, segments.lengths) + within
        return found.reshape(len(numbers), self.block_size)

    def batch(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the rows with these `places`, (B, T) int64 each; the target of padding is IGNORED.

        The target of a document's last token is the end-of-text token. With `loss_after`, the targets before the end of
        that text, in each document of a row, are IGNORED as well.
        """
        tokens = self.documents.tokens
        is_padding = places == PADDING
        inputs = tokens.take(np.maximum(places, 0)).astype(np.int64)
        inputs[is_padding] = self.end_of_text
        following = places + 1  # the next document begins with the end-of-text token
        is_last = following == len(tokens)
        targets = tokens.take(np.where(is_last, 0, following)).astype(np.int64)
        targets[is_last] = self.end_of_text
        targets[is_padding] = IGNORED
        if self.loss_after:
            targets[~follows(inputs, self.loss_after, self.end_of_text)] = IGNORED
        return inputs, targets


def follows(rows: np.ndarray, text: Sequence[int], start: int) -> np.ndarray:
    """Whether `text` occurs in the same document and row, ending at or before each token; bool, (B, T) like `rows`.

    Args:
        start: the token that each document begins with; not part of `text`.
    """
    columns = np.arange(rows.shape[1])
    ends = np.ones(rows.shape, dtype=bool)
    for back, token in enumerate(reversed(text)):
        ends[:, back:] &= rows[:, : len(columns) - back] == token
        ends[:, :back] = False
    starts = np.maximum.accumulate(np.where(rows == start, columns, 0), axis=1)
    last_ends = np.maximum.accumulate(np.where(ends, columns, -1), axis=1)
    return last_ends >= starts


def ramps(lengths: np.ndarray) -> np.ndarray:
    """The concatenation of np.arange(length) for each of `lengths`.

    >>> ramps(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
