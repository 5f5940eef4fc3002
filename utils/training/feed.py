"""Batches at fixed addresses, as a CUDA graph of a step needs them, prepared while the device computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data import BatchSampler
from utils.packing.windows import sample_windows

ON_DEVICE = 1 << 28  # a training split of up to so many tokens is kept on the device, in 4 bytes each


class Feed:
    """The batches of a run's updates, one after the other, in the same tensors.

    A training split of up to ON_DEVICE tokens is copied to the device once; an update then needs only the offsets
    of its sequences. For a longer one, and for rows of documents, a thread gathers the next update in advance.

    Args:
        sampler: makes the batches.
        micro_steps: micro-steps per update.
    """

    def __init__(self, sampler: BatchSampler, micro_steps: int) -> None:
        self.sampler, self._micro_steps = sampler, micro_steps
        tokens = sampler.corpus.split("train")
        self._has_rows = sampler.corpus.rows("train", sampler.block_size) is not None
        self._tokens: torch.Tensor | None = None
        if not self._has_rows and len(tokens) <= ON_DEVICE:
            self._tokens = torch.from_numpy(np.array(tokens, dtype=np.int32)).to(sampler.device)
            self._positions = torch.arange(sampler.block_size + 1, device=sampler.device)
        self._thread = ThreadPoolExecutor(1, "feed")
        self._tensors = [torch.zeros_like(part, device=sampler.device) for part in self._gather(0)]
        self._ahead: tuple[int, Future[list[torch.Tensor]]] | None = None

    def load(self, step: int) -> None:
        """Load the batches of update `step` into the tensors, without waiting for the device."""
        future = self._ahead[1] if self._ahead is not None and self._ahead[0] == step else None
        made = future.result() if future is not None else self._gather(step)
        for part, new in zip(self._tensors, made, strict=True):
            part.copy_(new, non_blocking=True)
        if self._tokens is None:
            self._ahead = step + 1, self._thread.submit(self._gather, step + 1)

    def batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a micro-step of the loaded update, (batch_size / micro_steps, T) each."""
        if self._has_rows:
            inputs, targets, _ = self._tensors
            return inputs[micro_step], targets[micro_step]
        windows = self._tensors[0][micro_step]
        if self._tokens is not None:
            windows = self._tokens[windows + self._positions].long()  # (share, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def target_share(self, micro_step: int) -> torch.Tensor | None:
        """The share of the update's targets that a micro-step has, () on the device; None: all shares are equal."""
        return self._tensors[2][micro_step] if self._has_rows else None

    def _gather(self, step: int) -> list[torch.Tensor]:
        """The tensors to load, by micro-step: offsets (share, 1), windows (share, T + 1), or rows and target shares."""
        if self._has_rows:
            shares = torch.tensor(self.sampler.target_shares(step, self._micro_steps), dtype=torch.float32)
            parts = [torch.from_numpy(part) for part in self.sampler.update(step)]
            return [*map(self._by_micro_step, parts), self._by_micro_step(shares)[:, 0]]
        offsets = np.array(self.sampler.train_offsets(step))
        if self._tokens is not None:
            return [self._by_micro_step(torch.from_numpy(offsets[:, None]))]
        windows = sample_windows(self.sampler.corpus.split("train"), offsets, self.sampler.block_size)
        return [self._by_micro_step(torch.from_numpy(windows.astype(np.int64)))]

    def _by_micro_step(self, part: torch.Tensor) -> torch.Tensor:
        """(micro_steps, batch_size / micro_steps, ...), pinned if large, so that copies to CUDA do not wait."""
        part = part.unflatten(0, (self._micro_steps, -1))
        return part.pin_memory() if self._tokens is None and self.sampler.device.type == "cuda" else part
