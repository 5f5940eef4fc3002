"""A KVCache whose sequences join and leave one by one."""

from __future__ import annotations

import torch

from utils.config.settings import ModelConfig
from utils.nn.kv_cache import KVCache


class SlotCache(KVCache):
    """Memory for `slots` sequences. The first `len(lengths)` rows are in use, and a pass computes only these.

    To keep them together, the last sequence moves to the row of one that leaves.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, slots, capacity, device, dtype)
        self._all = self._by_slot, self.tokens, self._positions, self._rows
        self.slots = slots
        self._use(0)

    def _use(self, count: int) -> None:
        """Make passes cover the first `count` sequences."""
        by_slot, tokens, positions, rows = self._all
        _ = self.positions  # brought up to date for the rows that were in use so far
        self._by_slot = by_slot[:, :count]
        self._by_head = self._by_slot.transpose(2, 3)
        self.keys, self.values = self._by_head.chunk(2)
        self.tokens, self._positions, self._rows = tokens[:count], positions[:count], rows[:count]
        self.lengths = (self.lengths + [0])[:count]

    def join(self, other: KVCache) -> None:
        """Append the one sequence of another cache of the same model; there must be a free slot."""
        row = len(self.lengths)
        assert row < self.slots
        self._use(row + 1)
        self.replace([row], other)

    def leave(self, row: int) -> None:
        """Remove a sequence; the last one moves to its row."""
        last = len(self.lengths) - 1
        if row != last:
            used = min(self.lengths[last], self.capacity)
            self._by_slot[:, row, :used] = self._by_slot[:, last, :used]
            self.tokens[row] = self.tokens[last]
            self.positions[row] = self.positions[last]
            self.lengths[row] = self.lengths[last]
        self._use(last)
