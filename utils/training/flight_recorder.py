"""The flight recorder: the last steps in detail, written when a run diverges or fails."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.files import write_json
from utils.machine.device import memory_in_use
from utils.runs.metrics import encode_number
from utils.training.step_buffer import StepRecord

STEPS = 64


class FlightRecorder:
    """Keeps the last STEPS steps in memory; what can be computed later is computed when they are written.

    Args:
        device: its random state and memory in use are recorded.
        groups: names of the optimizer's parameter groups.
        offsets: returns where in the training tokens the samples of a step start.
        draws: whether steps draw random numbers (dropout); if not, the random state does not change between calls of
            `look`.
    """

    def __init__(
        self, device: torch.device, groups: Sequence[str], offsets: Callable[[int], list[int]], draws: bool = True
    ) -> None:
        self.device, self.groups, self.offsets, self.draws = device, list(groups), offsets, draws
        self._steps: deque[tuple[StepRecord, torch.Tensor, int]] = deque(maxlen=STEPS)  # with random state and memory
        self.look()

    def look(self) -> None:
        """Read the values that are too slow to read at every step; they are recorded until the next call."""
        self._memory, self._rng = memory_in_use(self.device), _rng_state(self.device)

    def record(self, update: StepRecord) -> None:
        """Record an update; nothing is transferred from the device."""
        self._steps.append((update, _rng_state(self.device) if self.draws else self._rng, self._memory))

    def dump(self, path: Path, reason: str) -> None:
        """Write the steps as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, {"reason": reason, "steps": [self._as_json(*noted) for noted in self._steps]})

    def _as_json(self, s: StepRecord, rng: torch.Tensor, memory: int) -> dict[str, Any]:
        norms = zip(self.groups, s.grad_norms.tolist(), strict=True)
        return {
            "step": s.step,
            "time": round(s.time, 4),
            "loss": encode_number(s.loss.item()),
            "grad_norms": {name: encode_number(norm) for name, norm in norms},
            "lr": s.lr,
            "sample_offsets": self.offsets(s.step),
            "rng_crc32": fingerprint(rng),
            "memory_bytes": memory,
        }


def _rng_state(device: torch.device) -> torch.Tensor:
    """The random state that dropout on `device` draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def fingerprint(rng_state: torch.Tensor) -> str:
    """CRC-32 of a random state."""
    return f"{zlib.crc32(rng_state.numpy().data):08x}"
