"""Documents that equal or nearly equal an earlier one.

The similarity of two texts is the Jaccard index of their sets of shingles: all runs of 9 characters, in lower case and
with each run of white space as one space. MinHash and locality-sensitive hashing [Broder 1997; Leskovec et al., Mining
of Massive Datasets, chapter 3] propose candidates, whose similarity is then computed exactly.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from utils.corpora.filters import text_of
from utils.errors import UserError

THRESHOLD = 0.8
SHINGLE = 9  # characters: enough that unrelated long texts share few shingles
BANDS, ROWS = 25, 5  # a pair of similarity 0.8 is found with probability 0.9999, of 0.7 with 0.990, of 0.5 with 0.55
SEED = 1
HASH_BYTES = 16
HASHED_CHARACTERS = 1 << 18  # characters that are hashed at a time
BUCKET_DOCUMENTS = 100  # documents with the same hash of a band that later ones are compared with
MOST_CANDIDATES = 50  # candidates whose similarity to a document is computed
KEPT_BYTES = 1 << 26  # bytes of shingles that are cached for further comparisons
Document = TypeVar("Document", str, Mapping[str, Any])


def fingerprint(text: str) -> bytes:
    """The fingerprint by which duplicates are found: a hash of the whole text, and one for each band of its MinHash.

    All fingerprints are 116 bytes long.

    Raises:
        UserError: the package rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("near duplicates are found with the package rensa: pip install rensa") from None
    least = np.full(BANDS * ROWS, 0xFFFFFFFF, dtype=np.uint32)
    for hashes in _shingle_hashes(text):
        digest = RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], len(least), SEED)
        least = np.minimum(least, np.array(digest.to_rows()[0], dtype=np.uint32))
    bands = _mixed(_joined(least.reshape(BANDS, ROWS).astype(np.uint64), ROWS)[:, 0]).astype("<u4")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest() + bands.tobytes()


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The similarity, from 0 to 1, of two texts with these shingles."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _shingles(text: str) -> np.ndarray:
    """The distinct hashes of a text's shingles; with 64 bits each, a collision within a corpus is unlikely."""
    hashes = np.sort(np.concatenate(list(_shingle_hashes(text))))  # np.unique takes longer
    return hashes[np.append(True, hashes[1:] != hashes[:-1])]


def _shingle_hashes(text: str) -> Iterator[np.ndarray]:
    """The hashes of all shingles of a text, part by part; a text shorter than a shingle is padded to one."""
    text = " ".join(text.lower().split()).ljust(SHINGLE, "\0")
    for start in range(0, len(text) - SHINGLE + 1, HASHED_CHARACTERS):
        part = text[start : start + HASHED_CHARACTERS + SHINGLE - 1].encode("utf-32-le", "surrogatepass")
        yield _mixed(_joined(np.frombuffer(part, dtype="<u4").astype(np.uint64), SHINGLE))


def _joined(values: np.ndarray, size: int) -> np.ndarray:
    """A polynomial hash, modulo 2**64, of each run of `size` values along the last dimension."""
    total = np.zeros((*values.shape[:-1], values.shape[-1] - size + 1), dtype=np.uint64)
    for offset in range(size):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += values[..., offset : offset + total.shape[-1]]
    return total


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Mix the bits, so that each depends on all others (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def find_duplicates(
    fingerprints: Iterable[bytes], text_of: Callable[[int], str], threshold: float | None = THRESHOLD
) -> dict[int, int]:
    """Find documents that repeat an earlier one.

    A document is compared only with earlier documents that are not duplicates themselves. The original of each
    duplicate is therefore kept when the keys of the result are removed.

    Args:
        fingerprints: the fingerprints of all documents, in order.
        text_of: returns the text of a document, given its number from 0; called only for candidates.
        threshold: the similarity from which a text repeats another, at least 0.7; None if only equal texts do.

    Returns:
        number of a document -> number of the earlier document that it repeats.
    """
    hashes, bands = _parts(fingerprints)
    first: dict[bytes, int] = {}
    equal = {number: first.setdefault(text, number) for number, text in enumerate(hashes)}
    similar: dict[int, int] = {}
    if threshold is not None:
        unique = np.array(list(first.values()), dtype=np.int64)
        bands = bands[unique]
        shared = np.stack([_occurs_twice(band) for band in bands.T], axis=1)
        earlier = _Candidates(text_of, threshold)
        for row in np.flatnonzero(shared.any(axis=1)):
            number, keys = int(unique[row]), _keys(bands[row], shared[row])
            found = earlier.find(text_of(number), keys)
            if found is None:
                earlier.add(number, keys)
            else:
                similar[number] = found
    kept = {number: similar.get(same, same) for number, same in equal.items()}
    return {number: other for number, other in kept.items() if number != other}


def find_leaks(
    train: Iterable[bytes],
    val: Iterable[bytes],
    train_text: Callable[[int], str],
    val_text: Callable[[int], str],
    threshold: float = THRESHOLD,
) -> dict[int, int]:
    """Find documents of the validation split that equal or nearly equal one of the training split.

    Args:
        train, val: fingerprints of the documents, in order.
        train_text, val_text: return the text of a document, given its number; called only for candidates.
        threshold: the similarity from which a text nearly equals another, at least 0.7.

    Returns:
        number of a validation document -> number of a training document.
    """
    train_hashes, train_bands = _parts(train)
    val_hashes, val_bands = _parts(val)
    shared = np.stack([np.isin(*bands) for bands in zip(train_bands.T, val_bands.T, strict=True)], axis=1)
    trained = _Candidates(train_text, threshold)
    for row in np.flatnonzero(shared.any(axis=1)):
        trained.add(int(row), _keys(train_bands[row], shared[row]))
    wanted = set(val_hashes)
    equal = {text: number for number, text in reversed(list(enumerate(train_hashes))) if text in wanted}
    leaks = {}
    for number, text in enumerate(val_hashes):
        found = equal.get(text)
        if found is None and (keys := [key for key in _keys(val_bands[number]) if key in trained]):
            found = trained.find(val_text(number), keys)
        if found is not None:
            leaks[number] = found
    return leaks


def _parts(fingerprints: Iterable[bytes]) -> tuple[list[bytes], np.ndarray]:
    """The hash of each text, and the hashes of its bands, (documents, BANDS)."""
    table = np.frombuffer(b"".join(fingerprints), dtype=np.uint8).reshape(-1, HASH_BYTES + 4 * BANDS)
    hashes = table[:, :HASH_BYTES].tobytes()
    bands = np.ascontiguousarray(table[:, HASH_BYTES:]).view("<u4")
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)], bands


def _occurs_twice(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _keys(bands: np.ndarray, chosen: np.ndarray | None = None) -> list[tuple[int, int]]:
    """(band, hash) of the chosen bands."""
    numbers = range(BANDS) if chosen is None else np.flatnonzero(chosen).tolist()
    return [(band, int(bands[band])) for band in numbers]


class _Candidates:
    """An index of documents by the hashes of their bands, to find documents that are similar to a text."""

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        self._text_of, self._threshold = text_of, threshold
        self._buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._buckets

    def add(self, number: int, keys: Iterable[tuple[int, int]]) -> None:
        for key in keys:
            if len(self._buckets[key]) < BUCKET_DOCUMENTS:
                self._buckets[key].append(number)

    def find(self, text: str, keys: Iterable[tuple[int, int]]) -> int | None:
        """A document that is similar to a text. Documents that share the most bands with it are compared first."""
        shared = Counter(number for key in keys for number in self._buckets.get(key, ()))
        if not shared:
            return None
        shingles = _shingles(text)
        candidates = sorted(shared, key=lambda number: (-shared[number], number))[:MOST_CANDIDATES]
        return next((n for n in candidates if _jaccard(shingles, self._shingles(n)) >= self._threshold), None)

    def _shingles(self, number: int) -> np.ndarray:
        if number not in self._kept:
            shingles = _shingles(self._text_of(number))
            if self._kept_bytes + shingles.nbytes > KEPT_BYTES:
                self._kept, self._kept_bytes = {}, 0
            self._kept[number] = shingles
            self._kept_bytes += shingles.nbytes
        return self._kept[number]


def deduplication(documents: Iterable[Document], threshold: float | None = THRESHOLD) -> list[Document]:
    """Remove the documents that repeat an earlier one.

    Args:
        documents: texts, or mappings with a `text`.
        threshold: the similarity from which a document repeats another, at least 0.7; None if only equal texts do.

    >>> deduplication(["The cat sat on the mat.", "A dog.", "the cat sat  on the mat!", "A dog."])
    ['The cat sat on the mat.', 'A dog.']

    Raises:
        UserError: the threshold is below 0.7 or above 1, or the package rensa is not installed.
    """
    if threshold is not None and not 0.7 <= threshold <= 1:
        raise UserError(f"threshold must be from 0.7 to 1, not {threshold}")
    documents = list(documents)
    texts = [text_of(document) for document in documents]
    if threshold is None:
        first: dict[str, int] = {}
        return [documents[number] for number, text in enumerate(texts) if first.setdefault(text, number) == number]
    repeated = find_duplicates(map(fingerprint, texts), texts.__getitem__, threshold)
    return [document for number, document in enumerate(documents) if number not in repeated]
