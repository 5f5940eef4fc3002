"""Joined makes several arrays one sequence."""

from __future__ import annotations

import numpy as np
import pytest

from utils.packing.joined import Joined

PARTS = [np.arange(0, 5), np.zeros(0, dtype=np.int64), np.arange(5, 6), np.arange(6, 20)]
WHOLE = np.arange(20)


@pytest.mark.parametrize("places", [[[0, 19], [5, 4]], [7, 8, 9], [], [[3]], list(range(20))])
def test_elements_are_taken_as_from_one_array(places: list[int]) -> None:
    chosen = np.array(places, dtype=np.int64)
    found = Joined(PARTS).take(chosen)
    assert (found.tolist(), found.shape) == (WHOLE.take(chosen).tolist(), chosen.shape)


@pytest.mark.parametrize("chosen", [slice(0, 20), slice(3, 7), slice(6, None), slice(None, 5), slice(8, 8)])
def test_a_slice_is_a_sequence_too(chosen: slice) -> None:
    part = Joined(PARTS)[chosen]
    assert np.asarray(part).tolist() == WHOLE[chosen].tolist()
    assert len(part) == len(WHOLE[chosen])
    if len(part):
        assert part.take(np.arange(len(part))).tolist() == WHOLE[chosen].tolist()


def test_an_index_beyond_the_end_is_an_error() -> None:
    with pytest.raises(IndexError):
        Joined(PARTS).take(np.array([20]))


def test_the_offset_of_each_part_is_added() -> None:
    ends = Joined(
        [np.array([2, 5], dtype=np.uint64), np.zeros(0, dtype=np.uint64), np.array([1, 4], dtype=np.uint64)], [0, 5, 5]
    )
    assert np.asarray(ends).tolist() == [2, 5, 6, 9]
    assert ends.take(np.array([3, 0])).tolist() == [9, 2]
    assert ends.searchsorted(np.array([[0, 1, 2], [5, 6, 8]])).tolist() == [[0, 0, 1], [2, 3, 3]]
    assert ends.searchsorted(np.array([9])).tolist() == [4]
