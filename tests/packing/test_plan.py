"""Best-fit packing compared with its definition, document by document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.packing.plan import best_fit, load_plan
from utils.packing.rows import Packed


def by_definition(lengths: list[int], block_size: int) -> int:
    """The number of rows of best-fit decreasing, in which the rest of a long document opens a row."""
    rows = sum(length // block_size for length in lengths if length > block_size)
    room = [block_size - length % block_size for length in lengths if length > block_size and length % block_size]
    for length in sorted((length for length in lengths if length <= block_size), reverse=True):
        fitting = [(left, place) for place, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(block_size - length)
    return rows + len(room)


@pytest.mark.parametrize("block_size", [1, 4, 16, 50])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_in_one_row_and_documents_that_fit_are_whole(seed: int, block_size: int) -> None:
    lengths = np.random.default_rng(seed).geometric(0.08, size=200)
    rows = Packed(best_fit(lengths, block_size), block_size)
    segments = rows.segments(np.arange(len(rows)))
    assert len(rows) == by_definition(lengths.tolist(), block_size)
    taken = np.concatenate(
        [np.arange(first, first + n) for first, n in zip(segments.starts, segments.lengths, strict=True)]
    )
    assert sorted(taken.tolist()) == list(range(lengths.sum()))
    ends = np.cumsum(lengths)
    starts = dict(zip((ends - lengths).tolist(), lengths.tolist(), strict=True))
    for row, column, first, length in zip(
        segments.rows, segments.columns, segments.starts, segments.lengths, strict=True
    ):
        own = (segments.rows == row) & (segments.columns < column)
        assert segments.lengths[own].sum() == column  # side by side
        assert column + length <= block_size
        if column:  # only the first segment of a row may be a part
            assert starts[first] == length
    assert rows.used == lengths.sum()
    assert rows.cut == pytest.approx(lengths[lengths > block_size].sum() / lengths.sum())


@pytest.mark.parametrize(("lengths", "expected"), [([9, 9], 4), ([8, 8], 2), ([1], 1), ([], 0)])
def test_long_and_short_documents_fill_the_expected_rows(lengths: list[int], expected: int) -> None:
    rows = Packed(best_fit(np.array(lengths, dtype=np.int64), 8), 8)
    assert len(rows) == expected
    assert rows.used == sum(lengths)


def test_a_plan_is_read_back_unless_it_is_damaged(tmp_path: Path) -> None:
    plan, path = best_fit(np.array([3, 9, 1, 4, 4]), 4), tmp_path / "plans" / "a.plan"
    plan.save(path)
    found = load_plan(path)
    assert found is not None
    for name, value in vars(plan).items():
        assert np.array_equal(getattr(found, name), value), name
    content = path.read_bytes()
    for damaged in (content[:-8], content[:-1] + b"\1", b"", b"1234"):
        path.write_bytes(damaged)
        assert load_plan(path) is None
    assert load_plan(tmp_path / "none") is None
