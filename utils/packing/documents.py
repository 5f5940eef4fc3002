"""The documents of a split of a prepared dataset: where each begins and ends, and its origin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from utils.corpora.datasets import Dataset, DatasetError, Shard, Split
from utils.packing.joined import Joined


class Documents:
    """The documents of a split, numbered through all its shards.

    tokens: the tokens of all documents, one document after the other.

    Raises:
        DatasetError: a file cannot be read.
    """

    def __init__(self, dataset: Dataset, split: Split) -> None:
        shards = split.shards or [Shard("none", 0, 0, 0, "", 0, 0)]
        firsts = itertools.accumulate((shard.tokens for shard in shards[:-1]), initial=0)
        self.tokens = Joined([mapped(dataset, shard, "bin", shard.tokens, dataset.dtype) for shard in shards])
        self._ends = Joined([mapped(dataset, shard, "ends", shard.documents, "uint64") for shard in shards], [*firsts])
        self._origins = Joined([mapped(dataset, shard, "origins", 2 * shard.documents, "uint32") for shard in shards])

    def __len__(self) -> int:
        return len(self._ends)

    def bounds(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The offsets in `tokens` at which documents start, and their lengths in tokens, int64 each."""
        ends = self._ends.take(numbers).astype(np.int64)
        starts = np.where(numbers > 0, self._ends.take(np.maximum(numbers - 1, 0)).astype(np.int64), 0)
        return starts, ends - starts

    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, int64."""
        return np.diff(np.asarray(self._ends, dtype=np.int64), prepend=0)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The number of the document that contains the token at each place."""
        return self._ends.searchsorted(places)

    def origin(self, number: int) -> tuple[int, int]:
        """The origin of a document: its index in `Dataset.sources`, and its line or row in that source."""
        source, record = self._origins.take(np.array([2 * number, 2 * number + 1])).tolist()
        return source, record


def mapped(dataset: Dataset, shard: Shard, suffix: str, count: int, dtype: str) -> np.ndarray:
    """(count,): a file of a shard, memory-mapped, but as a plain ndarray, which is faster to slice than np.memmap."""
    kind = np.dtype(dtype).newbyteorder("<")
    if not count:  # an empty file cannot be mapped
        return np.zeros(0, kind)
    path = dataset.path(shard, suffix)
    try:
        return np.asarray(np.memmap(path, dtype=kind, mode="r", shape=(count,)))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class DocumentSubset:
    """A subset of the documents, which can be asked whether it contains a token."""

    def __init__(self, documents: Documents, numbers: Sequence[int]) -> None:
        chosen = np.array(sorted(set(numbers)), dtype=np.int64)
        self.starts, lengths = documents.bounds(chosen)
        self.ends = self.starts + lengths

    def __len__(self) -> int:
        return len(self.starts)

    def contain(self, places: np.ndarray) -> np.ndarray:
        """Whether the token at each place is in one of these documents, bool."""
        if not len(self.starts):
            return np.zeros(places.shape, dtype=bool)
        before = np.searchsorted(self.starts, places, side="right") - 1
        return (before >= 0) & (places < self.ends[np.maximum(before, 0)])
