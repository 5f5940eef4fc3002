"""Freeing disk space: which checkpoints and runs may be deleted, the oldest first.

Runs that are being trained, pinned, promoted, unreadable, or the parent of another run are never touched, nor is a run
with a folder that is a link out of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import real_path
from utils.folders import size_of
from utils.locks import folder_lock
from utils.runs.index import IndexedRun, read_index
from utils.runs.layout import ARTIFACTS, CHECKPOINTS, EXPORT, LOGS, META
from utils.runs.lock import RunLock, is_held
from utils.runs.names import read_models
from utils.runs.origin import RESUMABLE

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
AGES = {"h": 3600, "d": 86400, "w": 7 * 86400}  # seconds
RUNNING = "running"  # a reason not to touch a run
LEADS_OUT = "has a link that leads out of it"  # likewise: the target may not be part of the run
FOLDERS = (META, LOGS, ARTIFACTS, EXPORT, CHECKPOINTS)  # the folders of a run in which files may be deleted
TEMPORARY = ".*.tmp"  # files that were being written
ASIDE = ".pruned"  # ending of the name of a folder that is being deleted


@dataclass(frozen=True)
class Removal:
    """One folder or file to delete.

    run: the id of the run that it belongs to; empty for leftovers beside the runs.
    what: "checkpoints", "run", or "leftover" (of a process that was killed).
    """

    run: str
    what: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """What to delete.

    total: bytes of all runs and leftovers.
    kept: run -> why it is not touched.
    """

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
    """Choose what to delete: checkpoints before whole runs, and the oldest runs first.

    Args:
        keep_last: the number of newest runs that are not touched.
        older_than: runs that started less than this many seconds ago are not touched.
        max_bytes: stop once all runs together are not larger; None: delete everything that may be deleted.
        whole_runs: delete runs, not only their checkpoints; with `max_bytes`, runs may be deleted anyway.
        unfinished: also delete from runs that could be resumed.

    Raises:
        UserError: the folder or models.json cannot be read.
    """
    runs = read_index(runs_dir)
    sizes = {run.id: size_of(run.path) for run in runs}
    kept = _kept(runs, runs_dir, keep_last, older_than, unfinished)
    candidates = [run for run in runs if run.id not in kept]
    removals = list(_leftovers(runs_dir, [run for run in runs if kept.get(run.id) not in (RUNNING, LEADS_OUT)]))
    total = sum(sizes.values()) + sum(removal.bytes for removal in removals if not removal.run)
    left = total - sum(removal.bytes for removal in removals)
    for removal in removals:
        if removal.run:
            sizes[removal.run] -= removal.bytes

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
        freed = [removal for removal in removals if removal.run == run.id and removal.what == "checkpoints"]
        removals = [removal for removal in removals if removal not in freed]
        removals.append(Removal(run.id, "run", run.path, sizes[run.id]))
        left -= sizes[run.id] - sum(removal.bytes for removal in freed)
    return PrunePlan(total, removals, kept)


def _leftovers(runs_dir: Path, runs: Sequence[IndexedRun]) -> Iterator[Removal]:
    """What killed processes have left behind: half-deleted folders and half-written files.

    Args:
        runs: the runs that are not being trained, and whose FOLDERS are within them.
    """
    places = [("", runs_dir, (f".*{ASIDE}", TEMPORARY))]
    for run in runs:
        if run.path.is_dir() and not run.path.is_symlink():
            folders = [run.path, *(run.path / folder for folder in (META, LOGS, ARTIFACTS, EXPORT))]
            places += [(run.id, folder, (f".*{ASIDE}", TEMPORARY)) for folder in folders]
            places.append((run.id, run.path / CHECKPOINTS, (TEMPORARY, ".*.old")))
    for run_id, folder, patterns in places:
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            size = size_of(path) if path.is_dir() else path.lstat().st_size
            yield Removal(run_id, "leftover", path, size)


def _kept(
    runs: Sequence[IndexedRun], runs_dir: Path, keep_last: int, older_than: float, unfinished: bool
) -> dict[str, str]:
    """The runs that are not touched, each with the first reason that applies."""
    promoted = {version["run"] for versions in read_models(runs_dir).values() for version in versions}
    parents = {run.record["parent"]["run"] for run in runs if run.record.get("parent")}
    readable = [run for run in runs if run.readable]
    newest = {run.id for run in readable[max(0, len(readable) - keep_last) :]} if keep_last else set()
    reasons = {
        RUNNING: lambda run: run.status == "running" or is_held(run.path, run.record),
        LEADS_OUT: lambda run: any(_is_outside(run.path / folder, run.path) for folder in FOLDERS),
        "cannot be read": lambda run: not run.readable or run.notes_are_lost,
        "pinned": lambda run: run.notes["pinned"],
        "promoted": lambda run: run.id in promoted,
        "parent of another run": lambda run: run.id in parents,
        "could be resumed (--unfinished)": lambda run: not unfinished and run.status in RESUMABLE,
        "among the newest": lambda run: run.id in newest,
        "not old enough": lambda run: (run.row(())["age"] or 0.0) < older_than,
    }
    found = ((run, next((why for why, holds in reasons.items() if holds(run)), None)) for run in runs)
    kept = {run.id: why for run, why in found if why}
    places = {os.path.realpath(run.path): kept[run.id] for run in runs if run.id in kept}
    aliases = ((run, places.get(os.path.realpath(run.path))) for run in runs)  # keep second links to them too
    return {run.id: kept.get(run.id, why) for run, why in aliases if why}


def _is_outside(folder: Path, run: Path) -> bool:
    return not real_path(folder).is_relative_to(real_path(run))


def remove_all(removals: Sequence[Removal]) -> dict[Removal, str]:
    """Delete each of `removals`; returns those that could not be deleted, with the reason."""
    failed = {}
    for removal in removals:
        try:
            remove(removal)
        except OSError as error:
            failed[removal] = error.strerror or str(error)
    return failed


def remove(removal: Removal) -> None:
    """Delete a folder while holding the lock of its run; it is renamed first, so that a half-deleted one is recognised.

    Raises:
        BlockingIOError: the run is being trained now.
        OSError: the folder cannot be deleted.
    """
    if removal.what == "leftover":
        _remove_leftover(removal)
        return
    aside = removal.path.with_name(f".{removal.path.name}{ASIDE}")
    run = removal.path if removal.what == "run" else removal.path.parents[len(CHECKPOINTS.parts) - 1]
    lock = RunLock(run)
    try:
        with contextlib.suppress(OSError):  # left by a process that was killed
            _delete(aside)
        removal.path.rename(aside)
        _delete(aside)
    finally:
        lock.release()


def _remove_leftover(removal: Removal) -> None:
    """Delete a leftover, unless it is gone by now.

    The locks make sure that its run is not being trained and that no JSON file beside it is being written.
    """
    path = removal.path
    runs = [folder for folder in path.parents if removal.run and folder.name == removal.run]
    try:
        lock = RunLock(runs[0]) if runs else None
    except FileNotFoundError:
        return
    try:
        with folder_lock(path.parent), contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        if lock is not None:
            lock.release()


def _delete(folder: Path) -> None:
    """Delete a folder; if it is a link (to another disk, say), delete both the link and its target.

    If another entry of the same folder leads to the target too, only this link is deleted.
    """
    if not folder.is_symlink():
        shutil.rmtree(folder)
        return
    target = real_path(folder)
    others = (path for path in folder.parent.iterdir() if path != folder)
    if target.is_dir() and not any(target == real_path(path) or target in real_path(path).parents for path in others):
        shutil.rmtree(target)
    folder.unlink()


def parse_size(text: str) -> int:
    """Parse a size such as "20GB", "500 MiB" or "1.5 GB" into bytes.

    Raises:
        UserError: `text` is not of this form.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match.group(2).upper() not in UNITS:
        raise UserError(f"expected a size like 20GB or 500MiB, got {text!r}")
    return round(float(match.group(1)) * UNITS[match.group(2).upper()])


def parse_age(text: str) -> float:
    """Parse an age such as "12h", "30d" or "8w" into seconds.

    Raises:
        UserError: `text` is not of this form.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([hdw])\s*", text)
    if match is None:
        raise UserError(f"expected an age like 12h, 30d or 8w, got {text!r}")
    return float(match.group(1)) * AGES[match.group(2)]
