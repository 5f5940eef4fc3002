"""Packing of token ids in memory, as training packs the documents of a prepared dataset; for notebooks and lessons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.errors import UserError
from utils.packing.plan import best_fit
from utils.packing.rows import Packed


def pack_sequences(sequences: Sequence[Sequence[int]], block_size: int) -> list[list[int]]:
    """Pack the token ids of documents into rows of at most `block_size` ids. Only longer documents are cut.

    The rows are those of the setting `packing: documents` (`utils.packing.plan`).

    >>> pack_sequences([[0, 1, 2], [0, 3], [0, 4, 5, 6, 7, 8], [0]], block_size=4)
    [[0, 4, 5, 6], [7, 8, 0, 3], [0, 1, 2, 0]]

    Raises:
        UserError: block_size is below 1.
    """
    if block_size < 1:
        raise UserError(f"block_size must be at least 1, not {block_size}")
    lengths = np.array([len(ids) for ids in sequences if len(ids)], dtype=np.int64)
    ids = [token for sequence in sequences for token in sequence]
    layout = Packed(best_fit(lengths, block_size), block_size)
    rows: list[list[int]] = [[] for _ in range(len(layout))]
    segments = layout.segments(np.arange(len(layout)))
    for row, start, length in zip(segments.rows, segments.starts, segments.lengths, strict=True):
        rows[row] += ids[start : start + length]
    return rows


def add_special_tokens(sequences: Sequence[Sequence[int]], end_of_text: int) -> list[list[int]]:
    """Put the end-of-text token before each sequence of token ids, as in the documents of a prepared dataset.

    >>> add_special_tokens([[5, 6], []], end_of_text=0)
    [[0, 5, 6], [0]]
    """
    return [[end_of_text, *ids] for ids in sequences]
