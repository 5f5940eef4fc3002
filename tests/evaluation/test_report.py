"""Notes of evaluate.py on windows and on results that cannot be compared, and results without leaked documents."""

from __future__ import annotations

import numpy as np
import pytest

from utils.evaluation.report import OTHER_SPLITS, comparison_notes, window_lines
from utils.evaluation.texts import Tokens, WithoutLeaks


def test_each_run_has_a_line_if_windows_differ() -> None:
    small, large = {"block_size": 64, "stride": 32}, {"block_size": 1024, "stride": 512}
    assert list(window_lines(["a", "b"], [small, small])) == [
        "each token is predicted once, in windows of 64 tokens, advancing by 32"
    ]
    assert list(window_lines(["a", "b"], [small, large])) == [
        "each token is predicted once, in windows of",
        "  64 tokens, advancing by 32: a",
        "  1,024 tokens, advancing by 512: b",
    ]


@pytest.mark.parametrize(("sizes", "differ"), [((513, 511), False), ((512, 510), False), ((1000, 700), True)])
def test_splits_are_reported_as_different_if_their_sizes_differ_by_more_than_a_token(
    sizes: tuple[int, int], differ: bool
) -> None:
    records = [{"data_hash": "x", "tokenizer_hash": "y", "bytes": size} for size in sizes]
    assert list(comparison_notes(records)) == ([OTHER_SPLITS] if differ else [])


def test_bytes_without_leaks_are_scaled_like_all_bytes() -> None:
    """A tokenizer that changes the text: its 3 tokens of 4 bytes stand for 6 bytes of text."""
    tokens = Tokens(np.array([0, 1, 1, 1]), 6, True, lambda places: places == 2)
    without = WithoutLeaks(tokens, np.array([0, 4]))
    without.add(1, np.ones(3))
    assert (without.score().tokens, without.score().bytes) == (2, 4)
