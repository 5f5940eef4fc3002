"""What people record about a run: its tag, note, tags and pin, and names for its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.checkpoints.folder import WEIGHTS_FILE, folder_name
from utils.config.section import is_unicode
from utils.config.tags import check_tag
from utils.errors import UserError
from utils.files import change_json, read_json, real_path, unwritable
from utils.runs.index import read_notes
from utils.runs.layout import EXPORT, MODELS, NOTES
from utils.runs.names import add_version
from utils.runs.run import RunError, change_record, read_record, read_status, utc_now
from utils.runs.seal import file_sha256


def edit(
    path: Path,
    *,
    tag: str | None = None,
    note: str | None = None,
    add_tags: tuple[str, ...] = (),
    remove_tags: tuple[str, ...] = (),
    pinned: bool | None = None,
) -> dict[str, Any]:
    """Change the tag, note, tags or pin of the run directory `path`; None leaves a value as it is.

    Args:
        tag: the name of the run (`RUN` on a command line); its id and directory do not change.

    Returns:
        All of these values after the change.

    Raises:
        UserError: the tag is not valid, a text is not valid Unicode, the notes are damaged, or the tag of a run that is
            being trained would change (only the training process writes its run.json).
        OSError: the disk is full or fails.
    """
    for flag, texts in (("--note", [note or ""]), ("--add-tag", add_tags)):
        for text in texts:
            if not is_unicode(text):
                raise UserError(f"{flag}: expected Unicode text, got {text!r}")
    record = read_record(path)
    if tag is not None:
        try:
            check_tag(tag)
        except ValueError as error:
            raise UserError(f"--tag: {error}") from None
        if read_status(path) == "running":
            raise RunError(f"{path.name} is being trained: its tag can be changed once it has ended")

    def change(notes: dict[str, Any]) -> dict[str, Any]:
        tags = [one for one in dict.fromkeys([*notes["tags"], *add_tags]) if one not in remove_tags]
        new = {"tags": tags, "note": note, "pinned": pinned}
        return {**notes, **{key: value for key, value in new.items() if value is not None}}

    try:
        notes = change_json(path / NOTES, change, lambda place: read_notes(place.parent))
    except ValueError as error:
        reason = "a field has the wrong type" if isinstance(error, ValidationError) else error
        raise RunError(f"{path / NOTES} cannot be read: {reason}") from None
    except OSError as error:
        mistake = RunError(f"{path / NOTES} cannot be changed: {error.strerror}")
        raise unwritable(path / NOTES, error, mistake) from None
    if tag is not None:
        change_record(path, tag=tag)
    return {"tag": record.get("tag") if tag is None else tag, **notes}


def promote(path: Path, name: str, runs_dir: Path) -> tuple[str, dict[str, Any]]:
    """Give the exported weights of the run directory `path` a name.

    Returns:
        NAME@vN, and its entry in models.json: run, the checkpoint that was exported, file, sha256, time.

    Raises:
        UserError: the run has no export or is not in `runs_dir`, or the name is not valid.
        OSError: the disk is full or fails.
    """
    path = Path(os.path.abspath(path))  # not resolved: a run in the folder may be a link
    if real_path(path.parent) != real_path(runs_dir):
        raise RunError(f"{path} is not in {runs_dir}: {MODELS} there names only runs beside it")
    weights = path / EXPORT / WEIGHTS_FILE
    try:
        training = read_json(path / EXPORT / "config.json", path)["training"]
        version = {
            "run": path.name,
            "checkpoint": folder_name(training["step"]),
            "weights": training.get("weights", "last"),
            "val/loss": training.get("val/loss"),
            "file": weights.relative_to(path).as_posix(),
            "sha256": file_sha256(weights),
            "time": utc_now(),
        }
    except FileNotFoundError:
        raise RunError(
            f"{path.name} ({read_status(path)}) has no export: it is written when training completes"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / EXPORT}: cannot be read: {error}") from None
    return f"{name}@v{add_version(runs_dir, name, version)}", version
