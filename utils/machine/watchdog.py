"""A watchdog: if this process is killed, it stops a child that would otherwise go on, and removes a temporary folder.

It waits for the end of a pipe that only this process holds open, so it works wherever there are pipes. It is a script
of its own (`python watchdog.py PID FOLDER`) in its own session, so that a signal to the process group does not reach
it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_SECONDS = 60.0  # for a training to finish its step and save a checkpoint
CALLED_OFF = b"done"


@contextlib.contextmanager
def watched(pid: int, folder: Path) -> Iterator[None]:
    """If this process dies inside the block, its child `pid` gets SIGTERM, and `folder` is removed."""
    command = [sys.executable, "-I", __file__, str(pid), str(folder)]
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):  # the watchdog was killed
            watchdog.communicate(CALLED_OFF)


def main(pid: int, folder: str) -> None:
    """Wait for the end of stdin; unless it was called off, stop the process and remove the folder."""
    if sys.stdin.buffer.read() == CALLED_OFF:
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while True:
            os.kill(pid, 0)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
