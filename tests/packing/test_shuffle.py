"""Random permutations computed place by place, without storing them."""

from __future__ import annotations

import numpy as np
import pytest

from utils.packing.shuffle import BLOCK, Order, in_random_order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 100, 1000, 4097])
def test_each_number_appears_once(n: int) -> None:
    order = Order(1, 0, 3, n)
    assert sorted(order[0:n].tolist()) == list(range(n))
    assert order[n // 2 : n].tolist() == order[0:n].tolist()[n // 2 :]


def test_the_order_depends_on_seed_stream_and_pass_and_never_changes() -> None:
    orders = {tuple(Order(*key, 1000)[0:20]) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}
    assert len(orders) == 4
    assert Order(1, 0, 0, 1000)[0:8].tolist() == [253, 682, 25, 815, 579, 992, 962, 994]


def test_neighbours_are_separated() -> None:
    """In a random permutation of n, few neighbours stay neighbours, and numbers move by n / 3 on average."""
    order = Order(5, 0, 0, 10_000)
    numbers = order[0:10_000]
    assert (np.abs(np.diff(numbers)) == 1).sum() < 10
    assert np.abs(numbers - np.arange(10_000)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_places_are_found_across_blocks() -> None:
    order = Order(5, 0, 0, 3 * BLOCK)
    whole = np.concatenate([order[0:BLOCK], order[BLOCK : 2 * BLOCK], order[2 * BLOCK : 3 * BLOCK]])
    assert order[BLOCK - 3 : 2 * BLOCK + 3].tolist() == whole[BLOCK - 3 : 2 * BLOCK + 3].tolist()


def test_passes_follow_each_other() -> None:
    first, second = Order(7, 2, 0, 10)[0:10].tolist(), Order(7, 2, 1, 10)[0:10].tolist()
    assert in_random_order(7, 2, 0, 20, 10).tolist() == first + second
    assert in_random_order(7, 2, 8, 5, 10).tolist() == (first + second)[8:13]
