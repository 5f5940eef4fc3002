"""What evaluate.py says of results that do not compare."""

from __future__ import annotations

import pytest

from utils.evaluation.report import OTHER_SPLITS, comparison_notes


@pytest.mark.parametrize(("sizes", "differ"), [((513, 511), False), ((512, 510), False), ((1000, 700), True)])
def test_splits_begin_elsewhere_if_their_sizes_differ_by_more_than_a_token(
    sizes: tuple[int, int], differ: bool
) -> None:
    records = [{"data_hash": "x", "tokenizer_hash": "y", "bytes": size} for size in sizes]
    assert list(comparison_notes(records)) == ([OTHER_SPLITS] if differ else [])
