"""A script's main() in a forked process: like a command of its own, but torch is imported once for all of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FORK = multiprocessing.get_context("fork")
MEMORY = 2 << 30  # bytes that a process may allocate on top of what its imports have taken
HEAVY = ("torch.utils.tensorboard", "duckdb", "scipy.stats", "matplotlib.figure", "plotly.graph_objects", "plotext")
Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: None if it was killed because it did not end; negative: the signal that ended it."""

    status: int | None
    out: str
    err: str
    seconds: float


def import_all() -> None:
    """Import what the scripts import while they work, so that forked processes need not."""
    import utils

    for module in pkgutil.walk_packages(utils.__path__, "utils."):
        if module.name.count(".") == 2:  # utils/*.py are old names, which warn
            importlib.import_module(module.name)
    for name in HEAVY:
        importlib.import_module(name)


def run(main: Main, argv: Sequence[str], folder: Path, seconds: float) -> Ended:
    """Call `main(argv)` in a forked process, in the folder `folder`, for at most `seconds`."""
    paths = folder.with_name("stdout"), folder.with_name("stderr")
    began = time.monotonic()
    process = FORK.Process(target=_child, args=(main, argv, folder, *paths))
    process.start()
    assert process.pid is not None
    process.join(seconds)
    status = process.exitcode
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.kill()
        process.join()
    took = time.monotonic() - began
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return Ended(status, out, err, took)


def _child(main: Main, argv: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(folder)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        handle = os.open(name, flags | (os.O_CREAT | os.O_TRUNC if number else 0), 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", write_through=True) for number in (1, 2)
    )
    inherited = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_DATA, inherited + MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    sys.exit(main(argv))
