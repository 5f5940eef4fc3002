"""Batches in tensors that stay where they are, for a recorded step, made ready while the device computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data import BatchSampler, sample_windows

ON_DEVICE = 1 << 28  # tokens of a training split that are kept on the device, in 4 bytes each


class Feed:
    """The batches of a run's updates, one after the other, in the same tensors.

    A training split of up to ON_DEVICE tokens is copied to the device once; an update then needs only the places
    where its sequences start. Of a longer one, a thread gathers the windows of the next update meanwhile.

    Args:
        sampler: whose batches these are.
        micro_steps: of an update.
    """

    def __init__(self, sampler: BatchSampler, micro_steps: int) -> None:
        self.sampler = sampler
        tokens = sampler.corpus.split("train")
        share, width = sampler.batch_size // micro_steps, sampler.block_size + 1
        self._tokens: torch.Tensor | None = None
        if len(tokens) <= ON_DEVICE:
            self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(sampler.device)
            self._steps_in_window = torch.arange(width, device=sampler.device)
            self._next = torch.zeros((micro_steps, share, 1), dtype=torch.int64, device=sampler.device)  # offsets
        else:
            self._thread = ThreadPoolExecutor(1, "feed")
            self._next = torch.zeros((micro_steps, share, width), dtype=torch.int64, device=sampler.device)  # windows
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None

    def load(self, step: int) -> None:
        """Put the batches of update `step` in place; the device is not waited for."""
        if self._tokens is not None:
            self._next.copy_(torch.tensor(self.sampler.train_offsets(step)).view(self._next.shape), non_blocking=True)
            return
        future = self._ahead[1] if self._ahead is not None and self._ahead[0] == step else None
        windows = future.result() if future is not None else self._windows(step)
        self._next.copy_(windows.view(self._next.shape), non_blocking=True)
        self._ahead = step + 1, self._thread.submit(self._windows, step + 1)

    def batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a micro-step of the update that was loaded, (batch_size / micro_steps, T) each."""
        windows = self._next[micro_step]
        if self._tokens is not None:
            windows = self._tokens[windows + self._steps_in_window].long()  # (share, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _windows(self, step: int) -> torch.Tensor:
        """(batch_size, T + 1) int64, where the device can copy it from while the host goes on."""
        offsets = np.array(self.sampler.train_offsets(step))
        windows = sample_windows(self.sampler.corpus.split("train"), offsets, self.sampler.block_size)
        on_host = torch.from_numpy(windows.astype(np.int64))
        return on_host.pin_memory() if self.sampler.device.type == "cuda" else on_host
