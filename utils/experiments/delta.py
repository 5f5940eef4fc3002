"""Finding what makes the difference: the first of a sequence, and the smallest set of changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

Outcome = Literal["good", "bad", "unresolved"]
Change = TypeVar("Change")


def smallest_set(changes: Sequence[Change], test: Callable[[Sequence[Change]], Outcome]) -> list[Change]:
    """A set of changes that is bad, and is not without any one of them: delta debugging [Zeller, Hildebrandt 2002].

    A. Zeller, R. Hildebrandt, "Simplifying and isolating failure-inducing input", IEEE Trans. Softw. Eng. 28 (2002):
    the algorithm ddmin. It takes at most a square number of tests, about twice the logarithm for one change alone.

    Args:
        changes: all together are bad, and none of them are good.
        test: of a subset, in the order of `changes`; a subset is tested once.
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
    """Binary search for the first bad one of 0 to count - 1, of which 0 is good and the last is bad.

    One that cannot be tested is passed over: the nearest one that can be is tested instead.

    Returns:
        The last that is known to be good, and the first that is known to be bad: neighbours, unless none between them
        can be tested.
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
