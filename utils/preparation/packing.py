"""Documents into rows of a fixed length: whole if they fit, best-fit decreasing, longer ones in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Which pieces of documents each row has, in order.

    document: (pieces,) the document of each piece. start, length: (pieces,) which of its tokens.
    rows: (R + 1,) row r has the pieces from rows[r] up to rows[r + 1].
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    rows: np.ndarray


def pack_documents(lengths: np.ndarray, capacity: int) -> Packing:
    """Pack documents into as few rows of `capacity` tokens as best-fit decreasing finds; deterministic."""
    raise NotImplementedError


def pack_sequences(sequences: Sequence[Sequence[int]], capacity: int) -> list[list[int]]:
    """Token ids of documents as rows of at most `capacity` ids, whole documents where they fit."""
    raise NotImplementedError


def add_special_tokens(sequences: Sequence[Sequence[int]], end_of_text: int) -> list[list[int]]:
    """Each sequence with the end-of-text token in front of it, as prepared datasets have it."""
    raise NotImplementedError
