"""Permutations computed on demand: however large one is, it takes no time and no memory to create."""

from __future__ import annotations

import functools

import numpy as np

ROUNDS = 6
BLOCK = 4096  # places that are computed together
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # from SplitMix64 [Steele et al. 2014]


@functools.lru_cache(maxsize=16)
def epoch_words(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """Raw words of Philox4x64-10 for a pass of a stream, (count,) uint64; numpy guarantees that they never change."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, 0, epoch]).random_raw(count)


def permuted(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The elements at `places` (uint64, each below n) of a random permutation of 0 .. n - 1, int64.

    A Feistel network [Luby and Rackoff 1988] permutes the numbers below a power of two; a result that is not below n is
    permuted again until it is [Black and Rogaway 2002].

    Args:
        keys: (ROUNDS,) random words, uint64.
    """
    found = _network(places, n, keys)
    while (beyond := found >= n).any():
        found[beyond] = _network(found[beyond], n, keys)
    return found.astype(np.int64)


def _network(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    bits = max((n - 1).bit_length(), 2)
    low = np.uint64(bits // 2)
    masks = [np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1)]
    halves = [numbers >> low, numbers & masks[1]]
    for number, key in enumerate(keys):
        mixed = (halves[1 - number % 2] + key) * _ODD
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIXER
        halves[number % 2] = halves[number % 2] ^ ((mixed ^ (mixed >> np.uint64(32))) & masks[number % 2])
    return (halves[0] << low) | halves[1]


@functools.lru_cache(maxsize=8)
def _block(seed: int, stream: int, epoch: int, n: int, block: int) -> np.ndarray:
    """Elements block * BLOCK onwards of the order of a pass; a whole block hardly takes longer than a few elements."""
    places = np.arange(block * BLOCK, min((block + 1) * BLOCK, n), dtype=np.uint64)
    return permuted(places, n, epoch_words(seed, stream, epoch, ROUNDS + 1)[1:])


class Order:
    """The random order of n samples in one pass of a stream.

    word: one more random word for this pass.
    """

    def __init__(self, seed: int, stream: int, epoch: int, n: int) -> None:
        self._key, self.n = (seed, stream, epoch, n), n
        self.word = int(epoch_words(seed, stream, epoch, ROUNDS + 1)[0])

    def __getitem__(self, chosen: slice) -> np.ndarray:
        """The samples at these places of the order, int64."""
        start, stop, _ = chosen.indices(self.n)
        blocks = range(start // BLOCK, max(stop - 1, start) // BLOCK + 1)
        parts = [_block(*self._key, block) for block in blocks]
        parts = parts if len(parts) == 1 else [np.concatenate(parts)]
        return parts[0][start - blocks[0] * BLOCK : stop - blocks[0] * BLOCK]


def in_random_order(seed: int, stream: int, first: int, count: int, n: int) -> np.ndarray:
    """Elements first .. first + count - 1 of a stream whose passes each visit all n samples once, (count,) int64."""
    parts = []
    for epoch in range(first // n, (first + count - 1) // n + 1):
        begin = epoch * n
        parts.append(Order(seed, stream, epoch, n)[max(first - begin, 0) : first + count - begin])
    return np.concatenate(parts)
