"""The named parts of a training step, and what watches them: nothing, a clock, the profiler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

from utils.machine.device import synchronize

PHASES = ("data", "forward", "backward", "optimizer", "logging")

Phase = Callable[[str], AbstractContextManager[object]]  # names a part of a step


def no_phase(_name: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class PhaseClock:
    """Wall time of each phase. The device is waited for at its end, so that its work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.calls = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began
        self.calls[name] += 1


class MarkedClock(PhaseClock):
    """A clock whose phases stand in the profiler's trace as well."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(name), super().__call__(name):
            yield
