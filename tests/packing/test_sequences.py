"""Sequences of token ids are packed into rows."""

from __future__ import annotations

import doctest
import random

import pytest

from utils.errors import UserError
from utils.packing import sequences as module
from utils.packing.sequences import add_special_tokens, pack_sequences


def test_every_token_is_in_one_row_and_documents_that_fit_are_whole() -> None:
    generator = random.Random(0)
    sequences = [[(document, place) for place in range(generator.randint(0, 20))] for document in range(50)]
    rows = pack_sequences(sequences, 16)  # type: ignore[arg-type]
    assert sorted(token for row in rows for token in row) == sorted(token for ids in sequences for token in ids)
    assert max(map(len, rows)) <= 16
    for ids in sequences:
        holding = {number for number, row in enumerate(rows) if set(ids) & set(row)}
        assert len(holding) == -(-len(ids) // 16), "in as few rows as possible"


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_nothing_to_pack(sequences: list[list[int]]) -> None:
    assert pack_sequences(sequences, 8) == []


def test_a_row_needs_a_token() -> None:
    with pytest.raises(UserError, match="block_size must be at least 1, not 0"):
        pack_sequences([[1]], 0)


def test_the_given_sequences_are_not_changed() -> None:
    sequences = [[1, 2], [3]]
    assert pack_sequences(add_special_tokens(sequences, 0), 8) == [[0, 1, 2, 0, 3]]
    assert sequences == [[1, 2], [3]]


def test_the_examples_in_docstrings_run() -> None:
    assert doctest.testmod(module).failed == 0
