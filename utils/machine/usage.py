"""System metrics: how much of the CPU, memory, GPU and disk is in use."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import psutil
import torch

MIB, GIB = 2**20, 2**30


class SystemSampler:
    """Measures system metrics at most every `interval` seconds: the caller asks `due`, then calls `sample`.

    Args:
        device: the one that trains.
        folder: a folder on the disk that the run is written to.
        interval: seconds; 0: never.
    """

    def __init__(self, device: torch.device, folder: Path, interval: float) -> None:
        self.device, self.folder, self.interval = device, folder, interval
        self._process = psutil.Process()
        self._process.cpu_percent()  # each call returns the share since the previous one
        self._last = time.monotonic()

    def due(self) -> bool:
        return self.interval > 0 and time.monotonic() - self._last >= self.interval

    def sample(self) -> dict[str, float]:
        """Values by metric name, without those that this machine cannot measure."""
        self._last = time.monotonic()
        values: dict[str, float] = {}
        with contextlib.suppress(psutil.Error, OSError):
            values["system/process_cpu"] = self._process.cpu_percent()
            values["system/process_memory"] = round(self._process.memory_info().rss / MIB, 1)
        if self.device.type == "cuda":
            values["system/gpu_memory"] = round(torch.cuda.memory_reserved(self.device) / MIB, 1)
            with contextlib.suppress(Exception):  # needs the pynvml package and a driver that permits it
                values["system/gpu_utilization"] = float(torch.cuda.utilization(self.device))
        with contextlib.suppress(OSError):
            values["system/disk_free"] = round(shutil.disk_usage(self.folder).free / GIB, 3)
        return values
