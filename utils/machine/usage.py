"""Samples of what the process takes from the machine: processor, memory, GPU, disk."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import psutil
import torch

MIB, GIB = 2**20, 2**30


class SystemSampler:
    """Takes a sample every `interval` seconds, when it is asked to.

    Args:
        device: that trains.
        folder: whose disk the run is written to.
        interval: seconds; 0: never.
    """

    def __init__(self, device: torch.device, folder: Path, interval: float) -> None:
        self.device, self.folder, self.interval = device, folder, interval
        self._process = psutil.Process()
        self._process.cpu_percent()  # the share is that since the call before
        self._last = time.monotonic()

    def due(self) -> bool:
        return self.interval > 0 and time.monotonic() - self._last >= self.interval

    def sample(self) -> dict[str, float]:
        """Values by metric name; what this machine cannot tell is left out."""
        self._last = time.monotonic()
        values: dict[str, float] = {}
        with contextlib.suppress(psutil.Error, OSError):
            values["system/process_cpu"] = self._process.cpu_percent()
            values["system/process_memory"] = round(self._process.memory_info().rss / MIB, 1)
        if self.device.type == "cuda":
            values["system/gpu_memory"] = round(torch.cuda.memory_reserved(self.device) / MIB, 1)
            with contextlib.suppress(Exception):  # needs the pynvml package and a driver that lets it look
                values["system/gpu_utilization"] = float(torch.cuda.utilization(self.device))
        with contextlib.suppress(OSError):
            values["system/disk_free"] = round(shutil.disk_usage(self.folder).free / GIB, 3)
        return values
