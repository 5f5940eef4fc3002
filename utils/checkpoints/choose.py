"""Choose among the checkpoints of a folder: which one to use, keep, rename or delete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from utils.checkpoints.files import Checkpoint, read_checkpoint
from utils.checkpoints.folder import (
    CHOICES,
    CheckpointError,
    best_path,
    folder_name,
    is_choice,
    list_checkpoints,
)
from utils.errors import nearest, shown
from utils.folders import remove


def newest_good(
    folder: Path,
    *,
    strict: bool,
    warn: Callable[[str], None],
    problem: Callable[[Checkpoint], str] = lambda checkpoint: "",
) -> tuple[Checkpoint | None, list[Path]]:
    """Find the newest usable checkpoint, with a warning about each newer one that cannot be used.

    Args:
        strict: whether an unusable newest checkpoint is an error.
        problem: returns what is wrong with a checkpoint that was read, empty if nothing is.

    Returns:
        The checkpoint, None if the folder has none at all; and the unusable ones that are newer.

    Raises:
        CheckpointError: no checkpoint is usable or, with `strict`, the newest one is not.
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
            warn(f"{error}: trying the checkpoint before it")
    if first_error is not None:
        raise CheckpointError(f"{folder}: no checkpoint can be used; the newest: {first_error}")
    return None, []


def choose_checkpoint(folder: Path, which: str, *, strict: bool, warn: Callable[[str], None]) -> Checkpoint:
    """Read the checkpoint of another run that `which` names: `latest`, `best` or a step.

    Raises:
        CheckpointError: `which` is none of these, there is no such checkpoint, or it is damaged.
    """
    if not is_choice(which):
        raise CheckpointError(
            f"checkpoint {shown(which)}: expected {', '.join(CHOICES)} or a step{nearest(which, CHOICES)}"
        )
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
    """Read the checkpoint at `path`, which must be the one of `step`.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another step.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.step != step:
        raise CheckpointError(f"{path}: it holds the checkpoint of step {checkpoint.step} instead")
    return checkpoint


def put_aside(paths: Iterable[Path]) -> None:
    """Rename unusable checkpoints to `step_..._damaged`, so that the run can write these steps again."""
    for path in paths:
        name = path.with_name(f"{path.name}_damaged")
        remove(name)
        path.rename(name)


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, that of step `best` if it was written."""
    checkpoints = list_checkpoints(folder)
    kept = folder / folder_name(best) if best is not None else None
    if kept is not None and not kept.is_dir():  # it could not be written, so the previous best one is kept
        kept = best_path(folder)
    for _, path in checkpoints[keep_last:]:
        if path != kept:
            old = path.with_name(f".{path.name}.old")  # renamed first, so that a crash leaves no partial checkpoint
            path.rename(old)
            remove(old)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left partly written or partly deleted."""
    for path in folder.glob(".*"):
        remove(path)
