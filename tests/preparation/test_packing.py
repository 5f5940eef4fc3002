"""Packing: best-fit decreasing, as its definition does it piece by piece."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from utils.errors import UserError
from utils.preparation import packing
from utils.preparation.packing import add_special_tokens, cut_documents, pack_documents, pack_sequences


def rows_of_definition(lengths: np.ndarray, capacity: int) -> list[int]:
    """Free tokens of each row when one piece after the other, longest first, goes where it leaves least room."""
    free: list[int] = []
    for length in sorted(cut_documents(lengths, capacity)[2], reverse=True):
        fitting = [row for row, room in enumerate(free) if room >= length]
        if not fitting:
            free.append(capacity)
        row = min(fitting, key=lambda row: free[row]) if fitting else -1
        free[row] -= length
    return sorted(free)


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_those_of_best_fit_decreasing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 30))
    lengths = generator.integers(0, 45, size=generator.integers(0, 60))
    packed = pack_documents(lengths, capacity)
    filled = [int(packed.length[begin:end].sum()) for begin, end in zip(packed.rows, packed.rows[1:], strict=False)]
    assert sorted(capacity - tokens for tokens in filled) == rows_of_definition(lengths, capacity)
    covered = [
        (d, s + i) for d, s, n in zip(packed.document, packed.start, packed.length, strict=True) for i in range(n)
    ]
    assert sorted(covered) == [(document, i) for document, length in enumerate(lengths) for i in range(length)]


def test_capacities_beyond_16_bits() -> None:
    packed = pack_documents(np.array([70_000, 5, 150_000]), 100_000)
    assert packed.rows.tolist() == [0, 1, 3, 4]
    assert packed.length.tolist() == [100_000, 70_000, 5, 50_000]


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_nothing_to_pack(sequences: list[list[int]]) -> None:
    assert pack_sequences(sequences, 8) == []


def test_a_row_needs_a_token() -> None:
    with pytest.raises(UserError, match="block_size must be at least 1, not 0"):
        pack_sequences([[1]], 0)


def test_sequences_are_left_as_they_are() -> None:
    sequences = [[1, 2], [3]]
    assert pack_sequences(add_special_tokens(sequences, 0), 8) == [[0, 1, 2, 0, 3]]
    assert sequences == [[1, 2], [3]]


def test_the_examples() -> None:
    assert doctest.testmod(packing).failed == 0
