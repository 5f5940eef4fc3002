"""Finding runs: all of a folder, the one that RUN on a command line names, and its export."""

from __future__ import annotations

import os
from pathlib import Path

from utils.errors import nearest
from utils.runs.layout import EXPORT, RECORD
from utils.runs.names import promoted_run
from utils.runs.run import RunError, read_record, read_status


def list_run_paths(runs_dir: Path) -> list[Path]:
    """The run directories in `runs_dir`, oldest first: by start time, then id."""
    found = []
    for path in runs_dir.glob(f"*/{RECORD}"):
        try:
            found.append((read_record(path.parent).get("start") or "", path.parent.name, path.parent))
        except RunError:
            found.append(("", path.parent.name, path.parent))
    return [path for *_, path in sorted(found)]


def resolve_run(name: str, runs_dir: Path) -> Path:
    """The run directory that RUN on a command line names.

    The first that exists of: a path, NAME@vN of a promoted run, an id, `latest`, a tag (the newest run wins), a part
    of exactly one id.

    Raises:
        RunError: there is no such run, or several ids contain the part.
    """
    if os.path.isfile(os.path.join(name, RECORD)):
        return Path(name)
    if os.sep in name and os.path.isdir(name):
        raise RunError(f"{name} is not a run directory: it has no {RECORD}")
    if promoted := promoted_run(name, runs_dir):
        return promoted
    paths = list_run_paths(runs_dir)
    if not paths:
        raise RunError(f"no run {name}: {runs_dir} has no runs yet")
    by_id = {path.name: path for path in paths}
    if name in by_id:
        return by_id[name]
    if name == "latest":
        return paths[-1]
    tags: dict[str, Path] = {}
    for path in paths:
        try:
            if tag := read_record(path).get("tag"):
                tags[tag] = path
        except RunError:
            continue
    if name in tags:
        return tags[name]
    matches = [run_id for run_id in by_id if name and name in run_id]
    if len(matches) == 1:
        return by_id[matches[0]]
    if matches:
        ids = ", ".join(matches[:5]) + (", ..." if len(matches) > 5 else "")
        raise RunError(f"run {name} is ambiguous, {len(matches)} ids contain it: {ids}")
    raise RunError(f"no run {name} in {runs_dir}{nearest(name, [*tags, *by_id])}")


def find_export(name: str | None, runs_dir: Path) -> Path:
    """The export folder of the run that `name` names; without a name, of the newest run that has an export.

    Raises:
        RunError: there is no such run, or it has no export.
    """
    if name is None:
        for path in reversed(list_run_paths(runs_dir)):
            if (path / EXPORT).is_dir():
                return path / EXPORT
        raise RunError(f"no run in {runs_dir} has an export yet: python train.py --run-tag baseline makes one")
    path = resolve_run(name, runs_dir)
    export = path / EXPORT
    if not export.is_dir():
        raise RunError(f"run {path.name} ({read_status(path)}) has no export: it is written when training completes")
    return export
