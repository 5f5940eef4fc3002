"""Run train.py with trouble at a chosen step.

    python tests/troubled_training.py MOMENT STEP [arguments of train.py]

A script, not tests: test_tracking_faults.py starts it. MOMENT is pause, tear or wait.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WAIT_SECONDS = 60.0


def pause_at(step: int) -> None:
    """After update `step`, wait until all views have shown something, report it on PAUSE_FD, wait for a line on stdin.

    The views flush often and retry soon.
    """
    from utils.tracking import feeder
    from utils.training import step as training

    feeder.POLL_SECONDS, feeder.FLUSH_SECONDS, feeder.RETRY_SECONDS = 0.05, 0.05, (0.1, 0.1, 0.1)
    feeders: list[feeder.Feeder] = []
    start, optimizer_step = feeder.Feeders.start, training.optimizer_step

    def remember(self: feeder.Feeders) -> None:
        feeders[:] = self.feeders
        start(self)

    def hold(state: training.TrainState, *grad_norms: Any) -> None:
        optimizer_step(state, *grad_norms)
        if state.step != step:
            return
        deadline = time.monotonic() + WAIT_SECONDS
        notes = [feeder.logs_dir / f"fed_{feeder.view.name}.json" for feeder in feeders]
        while not (notes and all(note.exists() for note in notes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.write(int(os.environ["PAUSE_FD"]), b"paused\n")
        sys.stdin.readline()

    feeder.Feeders.start = remember  # type: ignore[method-assign]
    training.optimizer_step = hold


def wait_at(_: int) -> None:
    """Report on PAUSE_FD before the first step, then wait forever, as for a pipe or a slow disk."""
    from utils.training import session

    def wait(*_: Any) -> None:
        os.write(int(os.environ["PAUSE_FD"]), b"paused\n")
        while True:
            time.sleep(WAIT_SECONDS)

    session.make_update = wait


def tear_at(step: int) -> None:
    """Die by SIGKILL when part of the metrics of `step` has been written."""
    write: Callable[..., int] = os.write
    marker = f'{{"step":{step},'.encode()

    def torn(fd: int, data: memoryview) -> int:
        if (found := bytes(data).find(marker)) >= 0:
            write(fd, data[: found + len(marker) + 10])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(fd, data)

    os.write = torn  # type: ignore[assignment]


if __name__ == "__main__":
    import train

    {"pause": pause_at, "tear": tear_at, "wait": wait_at}[sys.argv[1]](int(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))
