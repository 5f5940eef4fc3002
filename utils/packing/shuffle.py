"""Permutations as functions: whatever their size, making one takes no time and no memory."""

from __future__ import annotations

import functools

import numpy as np

ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64 [Steele et al. 2014]


@functools.lru_cache(maxsize=64)
def epoch_words(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """(count,) raw words of Philox4x64-10 for a pass of a stream, uint64: numpy guarantees that they never change."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, 0, epoch]).random_raw(count)


class Shuffle:
    """A permutation of 0 .. n - 1: a Feistel network [Luby and Rackoff 1988] on the next power of two.

    A number that it takes beyond n - 1 goes through it again until it is below [Black and Rogaway 2002].

    Args:
        n: at least 1.
        keys: (ROUNDS,) random words, uint64.
    """

    def __init__(self, n: int, keys: np.ndarray) -> None:
        bits = max((n - 1).bit_length(), 2)
        self.n, self._keys = n, keys
        self._low = np.uint64(bits // 2)  # bits of the lower half
        self._masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1)

    def __getitem__(self, chosen: slice) -> np.ndarray:
        """What stands at these places of the permuted order, int64."""
        return self.take(np.arange(*chosen.indices(self.n), dtype=np.uint64))

    def take(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places` (uint64), int64."""
        found = self._once(places)
        while (beyond := found >= self.n).any():
            found[beyond] = self._once(found[beyond])
        return found.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        halves = [numbers >> self._low, numbers & self._masks[1]]
        for number, key in enumerate(self._keys):
            mixed = (halves[1 - number % 2] + key) * _ODD
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIXER
            halves[number % 2] = halves[number % 2] ^ ((mixed ^ (mixed >> np.uint64(32))) & self._masks[number % 2])
        return (halves[0] << self._low) | halves[1]


def shuffled(seed: int, stream: int, epoch: int, n: int) -> tuple[int, Shuffle]:
    """A further random word, and the order of n samples in a pass of a stream."""
    words = epoch_words(seed, stream, epoch, ROUNDS + 1)
    return int(words[0]), Shuffle(n, words[1:])


def in_random_order(seed: int, stream: int, first: int, count: int, n: int) -> np.ndarray:
    """Numbers first .. first + count - 1 of a stream over n samples, each pass of which visits each once: (count,)."""
    parts = []
    for epoch in range(first // n, (first + count - 1) // n + 1):
        begin = epoch * n
        parts.append(shuffled(seed, stream, epoch, n)[1][max(first - begin, 0) : first + count - begin])
    return np.concatenate(parts)
