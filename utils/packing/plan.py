"""Which documents share a row: best-fit packing [Ding et al. 2024, Fewer truncations improve language modeling].

Documents, from the longest to the shortest, go into the row with the least room that still holds them. A document
longer than a row is cut into whole rows; its remainder opens a new row, since only the start of a row may lie within a
document. All documents of one length are placed at once, so a million take a second; the plan is kept in a file.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.crc32 import crc32
from utils.files import write_atomic

VERSION = 1  # to be raised when the same lengths give another plan
HEADER = 8  # numbers before the arrays: the CRC-32 of the rest, two totals, the lengths of five arrays


@dataclass(frozen=True)
class Plan:
    """Rows as segments of the tokens: first the rows cut out of long documents, then the packed rows.

    cut_rows: (long + 1,) int64: long document i fills the rows cut_rows[i] .. cut_rows[i + 1] - 1.
    cut_starts: (long,) int64: the token at which each long document begins.
    rows: (rows + 1,) int64: packed row r has the segments rows[r] .. rows[r + 1] - 1.
    starts, lengths: (segments,) int64, in tokens.
    used: number of tokens in all rows. cut_tokens: number of tokens in long documents.
    """

    cut_rows: np.ndarray
    cut_starts: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    used: int
    cut_tokens: int

    @property
    def cut(self) -> float:
        """The fraction of tokens in documents longer than a row."""
        return self.cut_tokens / max(self.used, 1)

    def save(self, path: Path) -> None:
        """Write the plan to a file. Raises OSError if it cannot be written."""
        arrays = [self.cut_rows, self.cut_starts, self.rows, self.starts, self.lengths]
        numbers = [self.used, self.cut_tokens, *map(len, arrays)]
        content = np.concatenate([np.array(numbers), *arrays]).astype("<i8").tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, np.array([crc32(content)], dtype="<i8").tobytes() + content)


def load_plan(path: Path) -> Plan | None:
    """The plan that `Plan.save` wrote; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        numbers = np.asarray(np.memmap(path, dtype="<i8", mode="r"))
        if len(numbers) >= HEADER and crc32(numbers[1:].data) == numbers[0]:
            used, cut_tokens, *sizes = numbers[1:HEADER].tolist()
            cut_rows, cut_starts, rows, starts, lengths = np.split(numbers[HEADER:], np.cumsum(sizes)[:-1])
            return Plan(cut_rows, cut_starts, rows, starts, lengths, used, cut_tokens)
    return None


def best_fit(lengths: np.ndarray, block_size: int) -> Plan:
    """Plan the rows for consecutive documents of these lengths, in tokens (at least 1)."""
    firsts = np.cumsum(lengths) - lengths
    is_long = lengths > block_size
    pieces = np.where(is_long, lengths // block_size, 0)  # whole rows of a long document
    rest = np.where(is_long, lengths % block_size, lengths)
    long, opening = np.flatnonzero(is_long), np.flatnonzero(is_long & (rest > 0))
    whole = np.flatnonzero(~is_long)
    whole = whole[np.argsort(-lengths[whole], kind="stable")]
    row_of_whole, n_rows = _place(lengths[whole], block_size - rest[opening], block_size)

    rows = np.concatenate([np.arange(len(opening)), row_of_whole])
    starts = np.concatenate([firsts[opening] + pieces[opening] * block_size, firsts[whole]])
    sizes = np.concatenate([rest[opening], lengths[whole]])
    order = np.argsort(rows, kind="stable")  # keeps the remainder of a long document first in its row
    return Plan(
        np.concatenate([[0], np.cumsum(pieces[long])]),
        firsts[long],
        np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))]),
        starts[order],
        sizes[order],
        used=int(lengths.sum()),
        cut_tokens=int(lengths[is_long].sum()),
    )


def _place(lengths: np.ndarray, room: np.ndarray, block_size: int) -> tuple[np.ndarray, int]:
    """The row of each document, and the number of rows.

    Args:
        lengths: lengths of the documents, descending, at most block_size.
        room: free tokens in each of the rows opened so far.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    count = len(room)
    by_room: dict[int, list[np.ndarray]] = {}  # free tokens -> the rows that have so many
    for size in np.unique(room).tolist():
        by_room.setdefault(size, []).append(np.flatnonzero(room == size))
    sizes, begins, numbers = np.unique(-lengths, return_index=True, return_counts=True)
    for size, begin, number in zip((-sizes).tolist(), begins.tolist(), numbers.tolist(), strict=True):
        end = begin + number
        for fitting in sorted(room for room in by_room if room >= size):
            if begin == end:
                break
            each, open_rows = fitting // size, np.concatenate(by_room.pop(fitting))
            used = min(len(open_rows), -(-(end - begin) // each))
            taken = min(end - begin, used * each)
            rows[begin : begin + taken] = np.repeat(open_rows[:used], each)[:taken]
            begin += taken
            last = taken - (used - 1) * each  # documents that went into the last of these rows
            for left, which in (
                (fitting - each * size, open_rows[: used - 1]),
                (fitting - last * size, open_rows[used - 1 : used]),
                (fitting, open_rows[used:]),
            ):
                if left and len(which):
                    by_room.setdefault(left, []).append(which)
        if begin < end:
            each = block_size // size
            used = -(-(end - begin) // each)
            new = np.arange(count, count + used)
            count += used
            rows[begin:end] = np.repeat(new, each)[: end - begin]
            last = end - begin - (used - 1) * each
            for left, which in ((block_size - each * size, new[:-1]), (block_size - last * size, new[-1:])):
                if left and len(which):
                    by_room.setdefault(left, []).append(which)
    return rows, count
