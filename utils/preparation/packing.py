"""Documents into rows of a fixed length: whole documents where they fit, longer ones in pieces.

Best-fit decreasing: the longest piece first, each into the row that it fills best. Pieces of one length are placed
together, so the time is that of sorting them (docs/LOG.md has figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError


@dataclass(frozen=True)
class Packing:
    """Which pieces of documents each row has, in the order of the documents.

    document: (P,) the document of each piece. start, length: (P,) which of its tokens the piece is.
    rows: (R + 1,) row r has the pieces from rows[r] up to, not including, rows[r + 1].
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    rows: np.ndarray


def pack_documents(lengths: np.ndarray, capacity: int) -> Packing:
    """Documents of `lengths` tokens in rows of at most `capacity` tokens; the same lengths give the same rows."""
    document, start, length = cut_documents(lengths, capacity)
    row = _best_fit(length, capacity)
    order = np.argsort(row, kind="stable")
    row = row[order]
    return Packing(document[order], start[order], length[order], np.searchsorted(row, np.arange(_count(row) + 1)))


def cut_documents(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as pieces of at most `capacity` tokens: document, start and length of each piece; empty ones have none.

    >>> cut_documents(np.array([3, 10]), 4)
    (array([0, 1, 1, 1]), array([0, 0, 4, 8]), array([3, 4, 4, 2]))
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - first[document]) * capacity
    return document, start, np.minimum(lengths[document] - start, capacity)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, (P,)."""
    row = np.empty(len(lengths), dtype=np.int64)
    dtype = np.uint16 if capacity < 1 << 16 else np.int64  # NumPy sorts 16 bits in linear time
    order = np.argsort((capacity - lengths).astype(dtype), kind="stable")
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    room: dict[int, np.ndarray] = {}  # free tokens -> the rows that have as many
    sizes = 0  # as bits: for which numbers of free tokens there are rows
    count = 0
    for pieces in np.split(order, starts[1:]) if len(order) else ():
        length = int(lengths[pieces[0]])
        while len(pieces):
            fitting = sizes >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = free // length  # a row that has taken a piece of this length still fits the next of them best
            needed = -(-len(pieces) // each)
            if fitting:
                rows, rest = np.split(room.pop(free), [needed])
            else:
                rows, rest = np.arange(count, count + needed), row[:0]
                count += needed
            taken = np.full(len(rows), each)
            taken[needed - 1 :] = len(pieces) - each * (needed - 1)
            chosen, pieces = np.split(pieces, [int(taken.sum())])
            row[chosen] = np.repeat(rows, taken)
            sizes &= ~(1 << free)
            left = free - taken * length
            most = left == left[0]  # all but perhaps the last, which may have taken fewer
            for size, group in ((free, rest), (int(left[0]), rows[most]), (int(left[-1]), rows[~most])):
                if size and len(group):
                    room[size] = np.concatenate((room[size], group)) if size in room else group
                    sizes |= 1 << size
    return row


def _count(row: np.ndarray) -> int:
    return int(row.max()) + 1 if len(row) else 0


def pack_sequences(sequences: Sequence[Sequence[int]], block_size: int) -> list[list[int]]:
    """Token ids of documents as rows of at most `block_size` ids: whole documents where they fit, with least waste.

    >>> pack_sequences([[0, 1, 2], [0, 3], [0, 4, 5, 6, 7, 8], [0]], block_size=4)
    [[0, 4, 5, 6], [0, 1, 2, 0], [0, 3, 7, 8]]

    Raises:
        UserError: block_size is below 1.
    """
    if block_size < 1:
        raise UserError(f"block_size must be at least 1, not {block_size}")
    packing = pack_documents(np.array([len(ids) for ids in sequences], dtype=np.int64), block_size)
    rows: list[list[int]] = [[] for _ in packing.rows[1:]]
    row_of = np.repeat(np.arange(len(rows)), np.diff(packing.rows))
    for row, document, start, length in zip(row_of, packing.document, packing.start, packing.length, strict=True):
        rows[row] += sequences[document][start : start + length]
    return rows


def add_special_tokens(sequences: Sequence[Sequence[int]], end_of_text: int) -> list[list[int]]:
    """Each sequence of token ids with the end-of-text token in front, as every document of a prepared dataset has it.

    >>> add_special_tokens([[5, 6], []], end_of_text=0)
    [[0, 5, 6], [0]]
    """
    return [[end_of_text, *ids] for ids in sequences]
