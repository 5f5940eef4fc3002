"""Several arrays on disk as one sequence, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Joined:
    """A concatenation of one-dimensional arrays that is indexed like one array.

    Args:
        parts: the arrays, at least one, all of the same dtype.
        added: for each part, a number that is added to its elements.
    """

    def __init__(self, parts: Sequence[np.ndarray], added: Sequence[int] | None = None) -> None:
        self.parts = list(parts)
        self._added = [0] * len(self.parts) if added is None else list(added)
        self._firsts = np.cumsum([0, *map(len, self.parts)])  # the first index of each part, and the total length
        self.dtype: np.dtype[Any] = self.parts[0].dtype

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def take(self, places: np.ndarray) -> np.ndarray:
        """The elements at `places`, an array of any shape with indices from 0 to len - 1."""
        numbers = self.parts_of(places)
        if numbers.size == 0 or numbers.min() == numbers.max():
            return self._of_part(int(numbers.flat[0]) if numbers.size else 0, places)
        found = np.empty(places.shape, dtype=self.dtype)
        for number in np.unique(numbers):
            chosen = numbers == number
            found[chosen] = self._of_part(int(number), places[chosen])
        return found

    def parts_of(self, places: np.ndarray) -> np.ndarray:
        """The number of the part that contains each place."""
        return np.searchsorted(self._firsts[1:], places, side="right")

    def searchsorted(self, values: np.ndarray) -> np.ndarray:
        """np.searchsorted with side="right": the number of elements at most each of `values`; elements must ascend."""
        lasts = np.array([int(part[-1]) + add for part, add in zip(self.parts, self._added, strict=True) if len(part)])
        filled = [number for number, part in enumerate(self.parts) if len(part)]
        places = np.searchsorted(lasts, values, side="right")
        found = np.full(values.shape, len(self), dtype=np.int64)
        for place in np.unique(places):
            if place < len(filled):
                number, chosen = filled[place], places == place
                local = (values[chosen] - self._added[number]).astype(self.dtype)
                found[chosen] = self._firsts[number] + np.searchsorted(self.parts[number], local, side="right")
        return found

    def _of_part(self, number: int, places: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.parts[number].take(places - self._firsts[number])
        return found + self.dtype.type(self._added[number]) if self._added[number] else found

    def __getitem__(self, chosen: slice) -> Joined:
        """A slice with step 1, still without copies."""
        start, stop, step = chosen.indices(len(self))
        assert step == 1
        pairs = [
            (part[max(start - first, 0) : max(stop - first, 0)], add)
            for part, add, first in zip(self.parts, self._added, self._firsts.tolist(), strict=False)
        ]
        kept = [pair for pair in pairs if len(pair[0])] or pairs[:1]
        return Joined([part for part, _ in kept], [add for _, add in kept])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = [
            part + self.dtype.type(add) if add else part for part, add in zip(self.parts, self._added, strict=True)
        ]
        return np.concatenate(parts).astype(dtype or self.dtype, copy=False)
