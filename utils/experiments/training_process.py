"""Running train.py in a process of its own, which may run other code: its output, signals and run directory."""

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

FORWARDED = ("step ", "estimated", "warning", "failed", "error")  # how the lines begin that are shown


def run_training(
    project: Path, flags: Sequence[str], runs_dir: Path, output: IO[str], temporary: Path
) -> tuple[Path | None, int]:
    """Run train.py of the project folder `project` in a process of its own.

    Args:
        output: where those lines of its output go that begin with one of FORWARDED.
        temporary: a folder that is removed if this process is killed.

    Returns:
        The run directory that it made in `runs_dir` (None if it made none), and its exit status.
    """
    existing = {path.name for path in runs_dir.iterdir()} if runs_dir.is_dir() else set()
    command = [sys.executable, str(script_file(project, "train.py")), *flags]
    exit_status, pid = _train(command, project, output, temporary)
    return _new_run(runs_dir, existing, pid), exit_status


def _train(command: Sequence[str], folder: Path, output: IO[str], temporary: Path) -> tuple[int, int]:
    """Run a training process and forward our signals to it; if we are killed, it stops and `temporary` is removed.

    A closed `output` does not stop it.

    Returns:
        Its exit status and process id. After a signal the status is never 0, even if training had just completed, so
        that the caller starts no further training.
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
                        if line.startswith(FORWARDED):  # not the hint how to resume: its code will be deleted
                            with contextlib.suppress(OSError):  # losing output must not stop training
                                print(printable(line), end="", file=output, flush=True)
                    return process.wait() or (stopped_by and 128 + stopped_by), process.pid
                except KeyboardInterrupt:  # Ctrl-C reaches the child too, which stops cleanly
                    stopped_by = stopped_by or signal.SIGINT
    finally:
        with contextlib.suppress(ValueError):
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _new_run(runs_dir: Path, existing: set[str], pid: int) -> Path | None:
    """The run directory, not among `existing`, that the process `pid` has made; None if there is none."""
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        if path.name not in existing and (path / RECORD).is_file() and read_record(path).get("pid") == pid:
            return path
    return None
