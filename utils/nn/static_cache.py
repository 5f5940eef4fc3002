"""A KVCache whose steps use no numbers from the host, so that a CUDA graph can replay them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from utils.config.settings import ModelConfig
from utils.nn.kv_cache import KVCache


class StaticCache(KVCache):
    """Within `static_pass`, positions, slots and the mask come from tensors that advance on the device.

    Outside of it, as for the prompt, it works like a KVCache. The host keeps its lengths up to date by calling `count`
    after each static pass.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, batch_size, capacity, device, dtype)
        self._flat = self._by_slot.flatten(1, 2).unbind()  # 2 L of (B * S, K, D), the same memory
        self._first = self._rows * capacity  # (B, 1), where each sequence begins in _flat
        self._group = config.n_head // config.kv_heads
        self._zero = torch.zeros((), device=device, dtype=dtype)  # added to the scores
        self._minus_inf = torch.full((), -math.inf, device=device, dtype=dtype)
        self._attended = 0

    @contextlib.contextmanager
    def static_pass(self, attended: int) -> Iterator[None]:
        """A context of forward passes without numbers from the host; they see the first `attended` slots, masked."""
        self._attended = attended
        try:
            yield
        finally:
            self._attended = 0

    def count(self, tokens: int) -> None:
        """Count the tokens that a static pass appended to each sequence."""
        self.lengths = [length + tokens for length in self.lengths]

    def begin(self, idx: torch.Tensor, lengths: Sequence[int] | None = None) -> slice | torch.Tensor:
        """Like KVCache.begin; in a static pass the positions are a tensor (B, T)."""
        if not self._attended:
            return super().begin(idx, lengths)
        T = idx.size(1)
        positions = self._positions[:, None]  # (B, 1)
        if T > 1:
            positions = positions + self._numbers[:T]  # (B, T)
        self._flat_slots = (positions % self.capacity + self._first).flatten()  # (B * T,)
        self.tokens.view(-1).index_copy_(0, self._flat_slots, idx.flatten())
        visible = self._numbers[: self._attended] <= positions[:, :, None]  # (B, T, attended)
        self._mask = self._additive_mask(visible[:, None])
        self._window_mask = self._mask
        if self._window is not None:
            self._window_mask = self._additive_mask(self._within_window(positions, visible[:, None]))
        self._read = self._by_head[:, :, :, : self._attended].unbind()  # 2 L of (B, K, attended, D)
        return positions

    def _additive_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """The mask (B, 1, T | G T, attended) to add to the scores, for the slots `visible` (B, 1, T, attended)."""
        mask = torch.where(visible, self._zero, self._minus_inf)
        return mask.repeat(1, 1, self._group, 1) if mask.size(2) > 1 and self._group > 1 else mask

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Like KVCache.attend. Heads that share keys are rows of one product: kernels for groups take no mask."""
        if not self._attended:
            return super().attend(layer, q, k, v)
        B, T, H, D = q.shape
        K, G, v_layer = k.size(2), self._group, self._n_layer + layer
        self._flat[layer].index_copy_(0, self._flat_slots, k.reshape(B * T, K, D))
        self._flat[v_layer].index_copy_(0, self._flat_slots, v.reshape(B * T, K, D))
        q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
        mask = self._mask if layer < self._full_attention_layers else self._window_mask
        assert mask is not None
        y = F.scaled_dot_product_attention(q, self._read[layer], self._read[v_layer], attn_mask=mask)
        return y.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)

    def end(self) -> None:
        """Like KVCache.end."""
        if self._attended:
            self._positions += self._flat_slots.numel() // len(self.lengths)
            return
        super().end()
        _ = self.positions  # brought up to date now: a graph would repeat the addition at each replay
