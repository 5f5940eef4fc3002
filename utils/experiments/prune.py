"""Freeing disk space: which checkpoints and runs may go, oldest first. No torch here.

Never touched: runs that are being trained, pinned, promoted, or the parent of another run; nor what cannot be read.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import size_of
from utils.runs.index import IndexedRun, read_index
from utils.runs.layout import CHECKPOINTS, LOCK
from utils.runs.names import read_models
from utils.runs.origin import RESUMABLE
from utils.runs.run import lock_is_free

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
AGES = {"h": 3600, "d": 86400, "w": 7 * 86400}  # seconds
ASIDE = ".pruned"  # ending of what is being deleted: a crash leaves nothing that looks whole


@dataclass(frozen=True)
class Removal:
    """One thing that can go. what: "checkpoints" or "run"."""

    run: str
    what: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """total: bytes of all runs; kept: run -> why it is not touched."""

    total: int
    removals: list[Removal]
    kept: dict[str, str]

    @property
    def freed(self) -> int:
        return sum(removal.bytes for removal in self.removals)


def plan_pruning(
    runs_dir: Path,
    *,
    keep_last: int = 0,
    older_than: float = 0.0,
    max_bytes: int | None = None,
    whole_runs: bool = False,
    unfinished: bool = False,
) -> PrunePlan:
    """What to remove: checkpoints before whole runs, those of the oldest run first.

    Args:
        keep_last: so many of the newest runs are not touched.
        older_than: seconds since the start of a run that may be touched.
        max_bytes: stop once all runs together are not larger; None: remove all that may go.
        whole_runs: whether runs may go, not only their checkpoints; with `max_bytes` they always may.
        unfinished: whether runs that could be resumed may be touched.

    Raises:
        UserError: the folder or models.json cannot be read.
    """
    runs = read_index(runs_dir)
    sizes = {run.id: size_of(run.path) for run in runs}
    kept = _kept(runs, runs_dir, keep_last, older_than, unfinished)
    candidates = [run for run in runs if run.id not in kept]
    removals: list[Removal] = []
    total = left = sum(sizes.values())

    def enough() -> bool:
        return max_bytes is not None and left <= max_bytes

    for run in candidates:
        folder = run.path / CHECKPOINTS
        if not enough() and (size := size_of(folder)):
            removals.append(Removal(run.id, "checkpoints", folder, size))
            left -= size
    for run in candidates if whole_runs or max_bytes is not None else ():
        if enough():
            break
        freed = [removal for removal in removals if removal.run == run.id]
        removals = [removal for removal in removals if removal.run != run.id]
        removals.append(Removal(run.id, "run", run.path, sizes[run.id]))
        left -= sizes[run.id] - sum(removal.bytes for removal in freed)
    return PrunePlan(total, removals, kept)


def _kept(
    runs: Sequence[IndexedRun], runs_dir: Path, keep_last: int, older_than: float, unfinished: bool
) -> dict[str, str]:
    promoted = {version["run"] for versions in read_models(runs_dir).values() for version in versions}
    parents = {run.record["parent"]["run"] for run in runs if run.record.get("parent")}
    readable = [run for run in runs if run.readable]
    newest = {run.id for run in readable[max(0, len(readable) - keep_last) :]} if keep_last else set()
    reasons = {
        "cannot be read": lambda run: not run.readable or run.notes_are_lost,
        "running": lambda run: run.status == "running" or not lock_is_free(run.path),
        "pinned": lambda run: run.notes["pinned"],
        "promoted": lambda run: run.id in promoted,
        "parent of another run": lambda run: run.id in parents,
        "could be resumed (--unfinished)": lambda run: not unfinished and run.status in RESUMABLE,
        "among the newest": lambda run: run.id in newest,
        "not old enough": lambda run: (run.row()["age"] or 0.0) < older_than,
    }
    found = ((run, next((why for why, holds in reasons.items() if holds(run)), None)) for run in runs)
    return {run.id: why for run, why in found if why}


def remove(removal: Removal) -> None:
    """Delete what a plan names: renamed first, so that nothing half is left, and with the lock of the run held.

    Raises:
        OSError: it cannot be deleted; BlockingIOError: the run is being trained by now.
    """
    aside = removal.path.with_name(f".{removal.path.name}{ASIDE}")
    run = removal.path if removal.what == "run" else removal.path.parents[len(CHECKPOINTS.parts) - 1]
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(aside, ignore_errors=True)  # what a process before has not finished
        removal.path.rename(aside)
        shutil.rmtree(aside)
    finally:
        os.close(handle)


def parse_size(text: str) -> int:
    """Bytes in "20GB", "500 MiB" or "1.5 GB".

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match.group(2).upper() not in UNITS:
        raise UserError(f"expected a size like 20GB or 500MiB, got {text!r}")
    return round(float(match.group(1)) * UNITS[match.group(2).upper()])


def parse_age(text: str) -> float:
    """Seconds in "12h", "30d" or "8w".

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([hdw])\s*", text)
    if match is None:
        raise UserError(f"expected an age like 12h, 30d or 8w, got {text!r}")
    return float(match.group(1)) * AGES[match.group(2)]
