"""Documents that repeat an earlier one: equal texts, and texts that are nearly equal.

Similarity is the Jaccard index of two texts' shingles: of the sets of all their runs of 9 characters, in lower case,
with any white space as one space. MinHash and locality-sensitive hashing [Broder 1997; Leskovec et al., Mining of Massive
Datasets, chapter 3] propose candidates, whose similarity is then computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

THRESHOLD = 0.8


def fingerprint(text: str) -> bytes:
    """What is kept of a text to find its duplicates: a hash of the whole text, and hashes of the bands of its MinHash.

    All fingerprints have the same length, about 100 bytes.

    Raises:
        UserError: the package rensa is not installed.
    """
    raise NotImplementedError


def find_duplicates(
    fingerprints: Iterable[bytes], text_of: Callable[[int], str], threshold: float | None = THRESHOLD
) -> dict[int, int]:
    """Documents that repeat an earlier one, by their numbers in order.

    A document is compared with those earlier ones that repeat none themselves, so what a document repeats is kept when
    the keys of the result are removed.

    Args:
        fingerprints: of all documents, in order, from 0.
        text_of: the text of a document; it is asked for candidates only.
        threshold: the similarity from which a text repeats another; None: only equal texts do.

    Returns:
        document -> the earlier document that it repeats.
    """
    raise NotImplementedError


def find_leaks(
    train: Iterable[bytes],
    val: Iterable[bytes],
    train_text: Callable[[int], str],
    val_text: Callable[[int], str],
    threshold: float = THRESHOLD,
) -> dict[int, int]:
    """Documents of the validation split that nearly equal one of the training split.

    Args:
        train, val: fingerprints of the documents, in order.
        train_text, val_text: the text of a document, asked for candidates only.

    Returns:
        document of the validation split -> a document of the training split that is similar, equal ones first.
    """
    raise NotImplementedError


def jaccard(a: str, b: str) -> float:
    """The similarity of two texts, from 0 to 1."""
    raise NotImplementedError
