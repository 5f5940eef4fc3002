"""What evaluate.py says of results that do not compare, and results without leaked documents."""

from __future__ import annotations

import numpy as np
import pytest

from utils.evaluation.report import OTHER_SPLITS, comparison_notes
from utils.evaluation.texts import Tokens, WithoutLeaks


@pytest.mark.parametrize(("sizes", "differ"), [((513, 511), False), ((512, 510), False), ((1000, 700), True)])
def test_splits_begin_elsewhere_if_their_sizes_differ_by_more_than_a_token(
    sizes: tuple[int, int], differ: bool
) -> None:
    records = [{"data_hash": "x", "tokenizer_hash": "y", "bytes": size} for size in sizes]
    assert list(comparison_notes(records)) == ([OTHER_SPLITS] if differ else [])


def test_bytes_without_leaks_are_scaled_as_all_are() -> None:
    """A tokenizer that changes the text: its 3 tokens of 4 bytes stand for 6 bytes of text."""
    tokens = Tokens(np.array([0, 1, 1, 1]), 6, True, lambda places: places == 2)
    without = WithoutLeaks(tokens, np.array([0, 4]))
    without.add(1, np.ones(3))
    assert (without.score().tokens, without.score().bytes) == (2, 4)
