"""Which checkpoint of a folder is used, kept, put aside or deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from utils.checkpoints.files import Checkpoint, read_checkpoint
from utils.checkpoints.folder import (
    CheckpointError,
    best_path,
    folder_name,
    list_checkpoints,
)


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and that of step `best` (or the best one that there is)."""
    checkpoints = list_checkpoints(folder)
    kept = folder / folder_name(best) if best is not None else None
    if kept is not None and not kept.is_dir():  # it could not be written: the best one of before is kept
        kept = best_path(folder)
    for _, path in checkpoints[keep_last:]:
        if path != kept:
            old = path.with_name(f".{path.name}.old")  # renamed first: a crash leaves no half checkpoint
            path.rename(old)
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_good(
    folder: Path,
    *,
    strict: bool,
    warn: Callable[[str], None],
    problem: Callable[[Checkpoint], str] = lambda checkpoint: "",
) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that can be used, and the newer ones that cannot, which are told.

    Args:
        problem: what is wrong with a checkpoint that can be read; empty: nothing.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are only unusable ones, or with `strict` the newest one is.
    """
    first_error: CheckpointError | None = None
    unusable: list[Path] = []
    for step, path in list_checkpoints(folder):
        try:
            checkpoint = _read(path, step)
            if reason := problem(checkpoint):
                raise CheckpointError(f"{path}: {reason}")
            return checkpoint, unusable
        except CheckpointError as error:
            if strict:
                raise
            first_error = first_error or error
            unusable.append(path)
            warn(f"{error}: looking for the one before")
    if first_error is not None:
        raise CheckpointError(f"{folder}: no checkpoint can be used; the newest: {first_error}")
    return None, []


def choose_checkpoint(folder: Path, which: str, *, strict: bool, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of another run that `which` means: `latest`, `best` or a step.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    steps = {step: path for step, path in list_checkpoints(folder)}
    run = folder.parent.parent.name
    if not steps:
        raise CheckpointError(f"{run} has no checkpoints")
    if which == "latest":
        checkpoint, _ = newest_good(folder, strict=strict, warn=warn)
        assert checkpoint is not None
        return checkpoint
    path = best_path(folder) if which == "best" else steps.get(int(which))
    if path is None:
        available = ", ".join(f"{step}" for step in sorted(steps))
        missing = "no best checkpoint (keep_best was off)" if which == "best" else f"no checkpoint of step {which}"
        raise CheckpointError(f"{run} has {missing}; there are: {available}")
    return _read(path, next(step for step, found in steps.items() if found == path))


def _read(path: Path, step: int) -> Checkpoint:
    """The checkpoint at `path`, which says by its name that it is of `step`."""
    checkpoint = read_checkpoint(path)
    if checkpoint.step != step:
        raise CheckpointError(f"{path}: it holds the checkpoint of step {checkpoint.step}, which is another one")
    return checkpoint


def put_aside(paths: Iterable[Path]) -> None:
    """Rename unusable checkpoints to `step_..._damaged`: the run goes on from before them."""
    for path in paths:
        name = path.with_name(f"{path.name}_damaged")
        shutil.rmtree(name, ignore_errors=True)
        path.rename(name)
