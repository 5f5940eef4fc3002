"""Files of a run that only trackers and people need: a damaged one is put aside and never makes training fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.files import is_regular, put_aside, read_json, write_json
from utils.runs.index import read_notes
from utils.runs.layout import (
    ARTIFACTS,
    CONFIG_SOURCES,
    CURVES,
    FLIGHT_RECORDER,
    LOGS,
    METRIC_REGISTRY,
    MODEL_SUMMARY,
    NOTES,
    OLD_TENSORBOARD,
    SEAL,
    TRAIN_LOG,
    fed_note,
)
from utils.runs.metrics import read_registry
from utils.runs.run import NO_NOTES

Warn = Callable[[str], None]
WRITTEN_ANEW = (SEAL, CURVES, FLIGHT_RECORDER, TRAIN_LOG)  # rewritten or appended to without being read


def mend(run: Path, warn: Warn) -> None:
    """Put aside the files of the run directory `run` that cannot be used, each with a warning, and rewrite notes.json.

    The other files are written again by training, a rebuild or the seal. Call this with the lock of the run held.
    """
    for folder in (ARTIFACTS, OLD_TENSORBOARD):
        if os.path.lexists(run / folder) and not (run / folder).is_dir():
            _put_aside(run / folder, "not a folder", warn)
    (run / ARTIFACTS).mkdir(exist_ok=True)
    for name in WRITTEN_ANEW:
        if os.path.lexists(run / name) and not is_regular(run / name, run):
            _put_aside(run / name, "not a file of the run", warn)
    for path, check in _checked(run):
        try:
            if os.path.lexists(path):
                check(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = _readable_part(path) if path == run / NOTES else None
            reason = error.strerror if isinstance(error, OSError) else "damaged"
            if _put_aside(path, str(reason), warn) and said is not None:
                write_json(path, said)


def _checked(run: Path) -> Iterator[tuple[Path, Callable[[Path], Any]]]:
    """Yield each file with a function that raises if the file cannot be used."""
    yield run / NOTES, lambda path: read_notes(path.parent)
    yield run / METRIC_REGISTRY, read_registry
    yield run / MODEL_SUMMARY, read_modules
    yield run / CONFIG_SOURCES, lambda path: read_json(path, run).keys()
    for path in run.glob((LOGS / fed_note("*").name).as_posix()):
        yield path, lambda path: {name: int(fed) for name, fed in read_json(path, run)["offsets"].items()}


def read_modules(path: Path) -> tuple[dict[str, Any], ...]:
    """Read the list of the model's parameters in meta/model.json.

    Raises:
        OSError, ValueError, LookupError, TypeError: the file is missing or damaged.
    """
    modules = tuple(dict(module) for module in read_json(path, path.parent.parent))
    for module in modules:
        str(module["name"]), list(module["shape"]), int(module["parameters"])
    return modules


def _readable_part(path: Path) -> dict[str, Any]:
    """The valid part of a damaged notes.json. If the pin is unknown, the run is pinned, so that nothing deletes it."""
    try:
        notes = dict(read_json(path))
    except (OSError, ValueError, TypeError):
        notes = {}
    tags, note, pinned = notes.get("tags"), notes.get("note"), notes.get("pinned")
    return {
        **NO_NOTES,
        "tags": [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else [],
        "note": note if isinstance(note, str) else "",
        "pinned": pinned if isinstance(pinned, bool) else True,
    }


def _put_aside(path: Path, reason: str, warn: Warn) -> bool:
    """Rename a file that cannot be used, with a warning; return False if that fails."""
    try:
        aside = put_aside(path)
    except OSError as error:
        warn(f"{path} cannot be used ({reason}), and it cannot be renamed: {error.strerror}")
        return False
    pinned = "; the run is pinned unless its notes say otherwise" if path.name == NOTES.name else ""
    warn(f"{path} cannot be used ({reason}); it was renamed to {aside.name}{pinned}")
    return True
