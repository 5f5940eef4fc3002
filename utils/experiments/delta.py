"""Searches for what makes a difference: the first bad item of a sequence, and the smallest set of changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

Outcome = Literal["good", "bad", "unresolved"]
Change = TypeVar("Change")


def smallest_set(changes: Sequence[Change], test: Callable[[Sequence[Change]], Outcome]) -> list[Change]:
    """Find a bad set of changes of which each is needed: delta debugging [Zeller, Hildebrandt 2002].

    A. Zeller, R. Hildebrandt, "Simplifying and isolating failure-inducing input", IEEE Trans. Softw. Eng. 28 (2002):
    the algorithm ddmin. The number of tests is at most quadratic, and about 2 log2(n) if a single change is to blame.

    Args:
        changes: all of them together are bad, and none of them is good.
        test: tests a subset, given in the order of `changes`; each subset is tested once.
    """
    known: dict[tuple[int, ...], bool] = {}

    def is_bad(indices: Sequence[int]) -> bool:
        key = tuple(sorted(indices))
        if key not in known:
            known[key] = test([changes[index] for index in key]) == "bad"
        return known[key]

    found, parts = list(range(len(changes))), 2
    while len(found) > 1:
        bounds = [len(found) * part // parts for part in range(parts + 1)]
        subsets = [found[low:high] for low, high in itertools.pairwise(bounds)]
        complements = [[index for index in found if index not in subset] for subset in subsets]
        if (smaller := next(filter(is_bad, subsets), None)) is not None:
            found, parts = smaller, 2
        elif parts > 2 and (smaller := next(filter(is_bad, complements), None)) is not None:
            found, parts = smaller, parts - 1
        elif parts < len(found):
            parts = min(2 * parts, len(found))
        else:
            break
    return [changes[index] for index in found]


def first_bad(count: int, test: Callable[[int], Outcome]) -> tuple[int, int]:
    """Binary search for the first bad index from 0 to count - 1; the first index is good and the last is bad.

    In place of an index that cannot be tested, the nearest one that can be is tested.

    Returns:
        The last index known to be good and the first known to be bad. They are neighbours, unless none of the indices
        between them can be tested.
    """
    good, bad = 0, count - 1
    unresolved: set[int] = set()
    while between := [index for index in range(good + 1, bad) if index not in unresolved]:
        middle = (good + bad) / 2
        index = min(between, key=lambda one: abs(one - middle))
        outcome = test(index)
        if outcome == "good":
            good = index
        elif outcome == "bad":
            bad = index
        else:
            unresolved.add(index)
    return good, bad
