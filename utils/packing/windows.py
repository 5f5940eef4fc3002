"""Windows of a text as samples; sample n of a stream is a pure function of (seed, stream, n)."""

from __future__ import annotations

import functools

import numpy as np

from utils.packing.joined import Joined
from utils.packing.shuffle import Order

# Each use has its own stream of random numbers, so that they are independent.
STREAMS = {"train": 0, "train_eval": 1, "val": 2}


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, stream: str, epoch: int, n_windows: int, n_phases: int) -> tuple[int, np.ndarray]:
    """The offset of the first window of a pass (0 .. n_phases - 1), and a permutation of its windows.

    Philox4x64-10 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011] with key (seed, stream) and
    the pass as the high word of its counter. Only raw words are used, because numpy guarantees that they never change,
    unlike the output of its distributions.
    """
    words = np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, epoch]).random_raw(n_windows + 1)
    return int(words[0] % np.uint64(n_phases)), np.argsort(words[1:], kind="stable")


def windows_of_pass(n_tokens: int, block_size: int) -> int:
    """The number of windows that one pass over a split visits."""
    return max(n_tokens // block_size - 1, 1)


def sample_offsets(
    seed: int, stream: str, first: int, count: int, n_tokens: int, block_size: int, lazily: bool = False
) -> np.ndarray:
    """Start offsets of samples first .. first + count - 1 of a stream, shape (count,), int64.

    A pass cuts the tokens into adjacent windows of block_size, from a random start, and visits each once, in random
    order. After as many samples as a pass has, independently drawn offsets would have left a third of the text unseen;
    the effect on the loss is within the noise of seeds (docs/LOG.md).

    Args:
        lazily: compute the order on demand (`shuffle.Order`), so that a dataset of any size needs no memory for it; the
            resulting order is different.
    """
    n_windows = windows_of_pass(n_tokens, block_size)
    n_phases = n_tokens - n_windows * block_size
    parts = []
    for epoch in range(first // n_windows, (first + count - 1) // n_windows + 1):
        order: np.ndarray | Order
        if lazily:
            order = Order(seed, STREAMS[stream], epoch, n_windows)
            phase = order.word % n_phases
        else:
            phase, order = _epoch_order(seed, stream, epoch, n_windows, n_phases)
        begin = epoch * n_windows  # the number of the epoch's first sample
        parts.append(phase + order[max(first - begin, 0) : first + count - begin] * block_size)
    return np.concatenate(parts)


def sample_windows(tokens: np.ndarray | Joined, offsets: np.ndarray, block_size: int) -> np.ndarray:
    """The samples that start at `offsets` (B,), each followed by one more token: (B, T + 1)."""
    return tokens.take(offsets[:, None] + np.arange(block_size + 1))
