"""The keys and values of the last tokens of each sequence, for decoding one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from utils.config.settings import ModelConfig
from utils.nn.attention import causal_attention

NO_TOKEN = -1  # the id of what precedes the first token of a sequence


class KVCache:
    """Buffers for `capacity` tokens of each sequence, allocated once; slot p % capacity holds token p.

    A sequence longer than the capacity overwrites its oldest tokens: a window slides over it. Sequences may have
    different lengths. On a GPU, attention always covers all slots, under a mask, so that shapes never change; on a CPU
    it covers only the slots in use.

    A forward pass calls `begin` with its tokens, `attend` once in each layer, and `end`.

    keys, values: (L, B, K, S, D), S = capacity.
    tokens: (B, S), by slot.
    lengths: the lengths of the sequences, on the host; `positions` has the same numbers on the device.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2 * config.n_layer, batch_size, capacity, config.kv_heads, config.head_width)
        self._by_slot = torch.zeros(shape, device=device, dtype=dtype)  # in the order of writing
        self._by_head = self._by_slot.transpose(2, 3)  # in the order of reading
        self.keys, self.values = self._by_head.chunk(2)
        self._n_layer = config.n_layer
        self.tokens = torch.full((batch_size, capacity), NO_TOKEN, device=device)
        self.lengths = [0] * batch_size
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._ahead = 0  # the tokens that _positions does not count yet
        self.capacity = capacity
        self._numbers = torch.arange(capacity, device=device)  # the numbers of the slots
        self._rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self._static = device.type == "cuda"
        self._window, self._full_attention_layers = config.sliding_window, config.full_attention_layers

    @property
    def positions(self) -> torch.Tensor:
        """The position of the next token of each sequence, (B,), on the device."""
        if self._ahead:
            self._positions += self._ahead
            self._ahead = 0
        return self._positions

    def reset(self) -> None:
        """Forget all sequences."""
        self.positions.zero_()
        self.lengths = [0] * len(self.lengths)

    def forget(self, count: int) -> None:
        """Forget the last `count` tokens of each sequence, none of which may have overwritten an older one."""
        assert max(self.lengths) <= self.capacity
        self.positions.sub_(count)
        self.lengths = [length - count for length in self.lengths]

    def begin(self, idx: torch.Tensor, lengths: Sequence[int] | None = None) -> slice | torch.Tensor:
        """Make room for tokens idx (B, T); several tokens at once (T > 1) must not overwrite older ones.

        Args:
            lengths: the number of tokens of each sequence, if they differ; the rest of a row is padding. The cache
                must be empty.

        Returns:
            The positions of the tokens, (B, T), or one slice if they are the same in all sequences.
        """
        T, longest = idx.size(1), max(self.lengths)
        assert T == 1 or longest + T <= self.capacity, f"{longest + T} tokens exceed the {self.capacity} of the cache"
        assert lengths is None or longest == 0
        self._counts = [T] * len(self.lengths) if lengths is None else list(lengths)
        self._is_empty = longest == 0
        self._visible = self.capacity if self._static else min(longest + T, self.capacity)
        self._stored = self._by_head[:, :, :, : self._visible].unbind()  # 2 L of (B, K, visible, D)
        self._mask = None
        self._window_mask = None
        if min(self.lengths) == longest:
            first = longest % self.capacity
            slots = slice(first, first + T)
            self.tokens[:, slots] = idx
            self._new = self._by_slot[:, :, slots].unbind()  # 2 L of (B, T, K, D)
            self._slots: torch.Tensor | None = None  # (B, T) if the sequences differ in length
            windowed = self._window is not None and longest + T > self._window
            if not self._is_empty and (T > 1 or self._static or windowed):
                positions = torch.arange(longest, longest + T, device=idx.device)[None]
                visible = self._visible_to(positions)
                if T > 1 or self._static:  # otherwise the one token sees all slots in use
                    self._mask = visible
                self._window_mask = self._within_window(positions, visible) if windowed else self._mask
            return slice(longest, longest + T)
        positions = self.positions[:, None] + self._numbers[:T]  # (B, T)
        self._slots = positions % self.capacity
        self.tokens[self._rows, self._slots] = idx
        self._mask = self._visible_to(positions)
        self._window_mask = self._within_window(positions, self._mask)
        return positions

    def _visible_to(self, positions: torch.Tensor) -> torch.Tensor:
        """The mask (B, 1, T, visible) of the slots that tokens at these positions (B, T) attend to."""
        return (self._numbers[: self._visible] <= positions[:, :, None])[:, None]

    def _within_window(self, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """`visible` (B, 1, T, slots) without the slots outside the window of tokens at these positions (B, T)."""
        if self._window is None:
            return visible
        # The distance to the newest token of each slot.
        back = (positions[:, :, None] - self._numbers[: visible.size(-1)]) % self.capacity
        return visible & (back < self._window)[:, None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values, and let each new token attend to its sequence up to itself.

        Args:
            q: (B, T, H, D).
            k, v: (B, T, K, D).

        Returns:
            (B, T, H * D).
        """
        B, T, H, _ = q.shape
        L = self._n_layer
        keys, values = self._stored[layer], self._stored[L + layer]
        if self._slots is None:
            self._new[layer].copy_(k)
            self._new[L + layer].copy_(v)
        else:
            keys[self._rows, :, self._slots] = k
            values[self._rows, :, self._slots] = v
        full = self._window is None or layer < self._full_attention_layers
        if self._is_empty:
            return causal_attention(q, k, v, window=None if full else self._window)
        mask = self._mask if full else self._window_mask
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=keys.size(1) != H
        )  # (B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, -1)

    def end(self) -> None:
        """Count the tokens passed to `begin`, once all layers have stored them."""
        if len(set(self._counts)) == 1:
            self._ahead += self._counts[0]
        else:
            self._positions += torch.tensor(self._counts, device=self._positions.device)
        self.lengths = [length + new for length, new in zip(self.lengths, self._counts, strict=True)]

    def tokens_before(self, count: int) -> torch.Tensor:
        """The last tokens of each sequence, (B, count); NO_TOKEN before its start and for overwritten tokens."""
        back = torch.arange(count, 0, -1, device=self.tokens.device)
        positions = self.positions[:, None] - back  # (B, count)
        unknown = (positions < 0) | (back > self.capacity)
        return self.tokens[self._rows, positions % self.capacity].masked_fill(unknown, NO_TOKEN)

    def replace(self, rows: Sequence[int], other: KVCache) -> None:
        """Replace the sequences in `rows` with those of another cache, which all have the same length."""
        count = other.lengths[0]
        # A slice if these are all rows, because a list of rows would have to be copied to the device.
        chosen = slice(None) if len(rows) == len(self.lengths) else list(rows)
        self.keys[:, chosen, :, :count] = other.keys[:, :, :, :count]
        self.values[:, chosen, :, :count] = other.values[:, :, :, :count]
        self.tokens[chosen, :count] = other.tokens[:, :count]
        self.positions[chosen] = count
        for row in rows:
            self.lengths[row] = count
