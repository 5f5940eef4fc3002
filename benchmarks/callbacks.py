"""Callbacks with which the benchmarks time real runs of train.py; the setting `callbacks` of a run names one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from utils.training.callbacks import Callback, TrainingRun

MARK = "benchmark clock:"


class StepListener(Callback):
    """Calls `step_done` after each update, with the number of updates so far.

    A run makes the instance itself, so the function is set on the class (unittest.mock.patch.object).
    """

    step_done: ClassVar[Callable[[int], None]]

    def on_step(self, run: TrainingRun) -> None:
        type(self).step_done(run.state.step)


class ClockPrinter(Callback):
    """Prints the clock when the training loop begins and after every update."""

    def on_start(self, run: TrainingRun) -> None:
        print(MARK, time.time(), flush=True)

    def on_step(self, run: TrainingRun) -> None:
        print(MARK, time.time(), flush=True)
