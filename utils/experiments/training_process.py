"""train.py in a process of its own, which can run other code than this one: its output, signals and run directory."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from utils.machine.watchdog import watched
from utils.runs.layout import RECORD
from utils.runs.run import read_record
from utils.terminal.cli import script_file
from utils.terminal.words import printable

FORWARDED = ("step ", "estimated", "warning", "failed", "error")  # beginnings of the lines of training that are shown


def train_again(
    project: Path, flags: Sequence[str], runs_dir: Path, output: IO[str], temporary: Path
) -> tuple[Path | None, int]:
    """Run train.py of the project folder `project` in a process of its own.

    Args:
        output: where the lines FORWARDED of its output go; `temporary`: removed if this process is killed.

    Returns:
        The run directory that it made in `runs_dir`, None if it made none, and its exit status.
    """
    existing = {path.name for path in runs_dir.iterdir()} if runs_dir.is_dir() else set()
    command = [sys.executable, str(script_file(project, "train.py")), *flags]
    exit_status, pid = _train(command, project, output, temporary)
    return _new_run(runs_dir, existing, pid), exit_status


def _train(command: Sequence[str], folder: Path, output: IO[str], temporary: Path) -> tuple[int, int]:
    """Run a training process and pass our signals on to it; if we are killed, it stops and `temporary` is removed.

    Losing our own output does not stop it.

    Returns:
        Its exit status and process id. After a signal the status is never 0: training may have ended by itself just
        then, but no further one must begin.
    """
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None
    passed_on = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.getsignal(signum) for signum in passed_on}
    stopped_by = 0

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = stopped_by or signum
        process.send_signal(signum)

    with contextlib.suppress(ValueError):  # not in the main thread
        for signum in passed_on:
            signal.signal(signum, pass_on)
    try:
        with watched(process.pid, temporary):
            while True:
                try:
                    for line in process.stdout:
                        if line.startswith(FORWARDED):  # not the hint how to resume: the code is deleted at the end
                            with contextlib.suppress(OSError):  # lost, like the output of training itself
                                print(printable(line), end="", file=output, flush=True)
                    return process.wait() or (stopped_by and 128 + stopped_by), process.pid
                except KeyboardInterrupt:  # Ctrl-C reaches the child too, which then stops in order
                    stopped_by = stopped_by or signal.SIGINT
    finally:
        with contextlib.suppress(ValueError):
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _new_run(runs_dir: Path, existing: set[str], pid: int) -> Path | None:
    """The run directory that the process `pid` has made since there were only the `existing` ones."""
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        if path.name not in existing and (path / RECORD).is_file() and read_record(path).get("pid") == pid:
            return path
    return None
