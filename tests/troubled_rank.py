"""A callback that makes trouble on one rank after some step.

The environment variable TROUBLE names the trouble, the rank and the step: `raise 1 3`. On each rank the callback logs
the number of the rank and, if TROUBLE_CALLS names a folder, writes its calls into a file there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints import shards
from workbench import Callback, Metric, TrainingRun, register_metric


class Trouble(Callback):
    """The callback; see the module."""

    def __init__(self) -> None:
        register_metric(Metric("trouble/rank", "1"))
        self.what, rank, step = os.environ["TROUBLE"].split()
        self.rank, self.step = int(rank), int(step)
        self.mark = Path(os.environ.get("TROUBLE_MARK", "mark"))

    def on_start(self, run: TrainingRun) -> None:
        called(run, "start")

    def on_eval(self, run: TrainingRun, losses: Mapping[str, float]) -> None:
        called(run, f"eval {sorted(losses.items())}")

    def on_end(self, run: TrainingRun, status: str) -> None:
        called(run, f"end {status}")
        if self.what == "end" and run.rank == self.rank:
            raise ValueError("boom")

    def on_step(self, run: TrainingRun) -> None:
        called(run, "step")
        run.log({"trouble/rank": run.rank})
        if (run.rank, run.state.step) != (self.rank, self.step):
            return
        if self.what == "raise":
            raise ValueError("boom")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "freeze" and not self.mark.exists():  # once
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.what == "fill":
            with contextlib.suppress(OSError), (run.path.parent / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        if self.what == "stop":
            run.stop("enough")
        if self.what == "full":
            fill_disk_once()
        if self.what.startswith("late"):
            signal_in_next_sum(run, signal.Signals[self.what.removeprefix("late")])
        if self.what == "hang":
            while True:
                time.sleep(1)


def called(run: TrainingRun, hook: str) -> None:
    """Append a call to the file of this rank."""
    if folder := os.environ.get("TROUBLE_CALLS"):
        with (Path(folder) / f"rank{run.rank}").open("a") as file:
            file.write(f"{run.path} {run.state.step} {hook}\n")


def signal_in_next_sum(run: TrainingRun, signum: int) -> None:
    """Signal this rank during its next sum over the ranks, when its own contribution is already fixed."""
    ranks = run.state.ranks
    add = ranks.sum_exactly

    def interrupted(vector: torch.Tensor) -> torch.Tensor:
        ranks.sum_exactly = add  # type: ignore[method-assign]
        os.kill(os.getpid(), signum)
        return add(vector)

    ranks.sum_exactly = interrupted  # type: ignore[method-assign]


def fill_disk_once() -> None:
    """Let the next write of a sharded checkpoint fail for lack of space."""
    write = shards.write_tensors

    def full(*_: Any) -> None:
        shards.write_tensors = write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards.write_tensors = full  # type: ignore[assignment]
