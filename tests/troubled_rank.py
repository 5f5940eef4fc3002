"""A callback that makes trouble on one rank after some steps; the variable TROUBLE says which: `raise 1 3`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from utils.checkpoints import shards
from workbench import Callback, TrainingRun


class Trouble(Callback):
    """What, on which rank, after which step."""

    def __init__(self) -> None:
        self.what, rank, step = os.environ["TROUBLE"].split()
        self.rank, self.step = int(rank), int(step)
        self.mark = Path(os.environ.get("TROUBLE_MARK", "mark"))

    def on_step(self, run: TrainingRun) -> None:
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
        if self.what == "hang":
            while True:
                time.sleep(1)


def fill_disk_once() -> None:
    """Let the next file of a checkpoint in shards find no space."""
    write = shards.write_tensors

    def full(*_: Any) -> None:
        shards.write_tensors = write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards.write_tensors = full  # type: ignore[assignment]
