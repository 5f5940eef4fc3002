"""Find runs: all runs of a folder, the one that RUN on a command line names, and its export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoints.folder import EXPORT_CONFIG_FILE, STATE_FILE, WEIGHTS_FILE
from utils.errors import nearest
from utils.files import expand_home, read_json
from utils.runs.layout import EXPORT, RECORD
from utils.runs.names import promoted_run
from utils.runs.run import RunError, read_record, read_status


def list_run_paths(runs_dir: Path) -> list[Path]:
    """The run directories in `runs_dir`, oldest first: by start time, then id.

    Hidden folders are skipped, because they are being created or deleted.
    """
    found = []
    for path in runs_dir.glob(f"[!.]*/{RECORD}"):
        try:
            found.append((read_record(path.parent).get("start") or "", path.parent.name, path.parent))
        except RunError:
            found.append(("", path.parent.name, path.parent))
    return [path for *_, path in sorted(found)]


def resolve_run(name: str, runs_dir: Path) -> Path:
    """The run directory that RUN on a command line names; for a tag, its newest run.

    Raises:
        RunError: as for `resolve_runs`, or RUN names a sweep of several runs.
    """
    paths = resolve_runs(name, runs_dir)
    if len(paths) > 1 and read_record(paths[-1]).get("tag") != name:
        raise RunError(f"{name} is a sweep of {len(paths)} runs: name one of them: {_listed(paths)}")
    return paths[-1]


def resolve_runs(name: str, runs_dir: Path) -> list[Path]:
    """The run directories that RUN on a command line names, oldest first; a tag or a sweep may name several.

    RUN is the first of these that exists: a path, NAME@vN of a promoted run, an id, `latest`, a tag, a sweep (or
    --multirun), a part of exactly one id.

    Raises:
        RunError: there is no such run, or several ids contain RUN.
    """
    name = expand_home(name)
    if os.path.isfile(os.path.join(name, RECORD)):
        return [Path(name)]
    if os.sep in name and os.path.isdir(name):
        raise RunError(f"{name} is not a run directory: it has no {RECORD}")
    if promoted := promoted_run(name, runs_dir):
        return [promoted]
    paths = list_run_paths(runs_dir)
    if not paths:
        raise RunError(f"no run {name}: {runs_dir} has no runs yet")
    by_id = {path.name: path for path in paths}
    if name in by_id:
        return [by_id[name]]
    if name == "latest":
        return paths[-1:]
    tags: dict[str, list[Path]] = {}
    sweeps: dict[str, list[Path]] = {}
    for path in paths:
        try:
            record = read_record(path)
        except RunError:
            continue
        if tag := record.get("tag"):
            tags.setdefault(tag, []).append(path)
        if sweep := (record.get("sweep") or {}).get("name"):
            sweeps.setdefault(sweep, []).append(path)
    if found := tags.get(name) or sweeps.get(name):
        return found
    matches = [path for run_id, path in by_id.items() if name and name in run_id]
    if len(matches) > 1:
        raise RunError(f"run {name} is ambiguous, {len(matches)} ids contain it: {_listed(matches)}")
    if matches:
        return matches
    raise RunError(f"no run {name} in {runs_dir}{nearest(name, [*tags, *sweeps, *by_id])}")


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")


def parent_path(run: Path, parent: Mapping[str, Any]) -> Path:
    """The directory of a run's parent.

    It is looked for beside the run, by its id, and then at the place that it had when the run started. For a run that
    began with the weights of an export, the result is the export with these weights.

    Args:
        parent: the entry in run.json. Its `path` is only a hint, since both runs may have moved.

    Raises:
        RunError: the parent is in neither place.
    """
    beside = [run.parent / parent["run"], Path(os.path.realpath(run)).parent / parent["run"]]
    if "pretrained" in parent:
        if (Path(parent["path"]) / EXPORT_CONFIG_FILE).is_file():
            return Path(parent["path"])
        published = Path(parent["path"]).parent.name == "snapshots"  # in the cache of the Hugging Face hub
        raise RunError(
            f"{run.name} began with weights of {parent['run']}, which is no longer at {parent['path']}: "
            + (f"python weights.py download {parent['run'].removeprefix('hf:')}" if published else "put it back there")
        )
    if (weights := parent.get("export")) is not None:
        for place in (*(run / EXPORT for run in beside), Path(parent["path"])):
            if export_checksum(place) == weights:
                return place
    else:
        for place in (*beside, Path(parent["path"])):
            if (place / RECORD).is_file():
                return place
    raise RunError(
        f"{run.name} began with weights of {parent['run']}, which is neither beside it in {run.parent} "
        f"nor at {parent['path']}"
    )


def moved_path(path: str, root: Path) -> str:
    """The current place of a recorded absolute path: as recorded or, if the project has moved, below `root`.

    >>> moved_path("/no/such/project/utils/runs", Path.cwd()) == str(Path.cwd() / "utils" / "runs")
    True
    """
    if not os.path.isabs(path) or os.path.lexists(path):
        return path
    parts = Path(path).parts
    endings = (root.joinpath(*parts[first:]) for first in range(1, len(parts)))  # longest first
    return next((os.path.abspath(place) for place in endings if place.exists()), path)


def is_export(path: Path) -> bool:
    """Whether a folder is an export, perhaps a damaged one, rather than a run directory or a checkpoint."""
    found = any((path / name).is_file() for name in (EXPORT_CONFIG_FILE, WEIGHTS_FILE))
    return found and not any((path / name).is_file() for name in (RECORD, STATE_FILE))


def export_checksum(folder: Path) -> str | None:
    """The checksum of the weights in the configuration of an export; None if there is no readable export."""
    try:
        return str(read_json(folder / EXPORT_CONFIG_FILE)["weights_crc32"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def find_export(name: str | None, runs_dir: Path) -> Path:
    """The export folder of the run `name`, or the export at the path `name`, which may be outside a run directory.

    Without a name, the export of the newest run that has one.

    Raises:
        RunError: there is no such run, or it has no export.
    """
    if name is None:
        for path in reversed(list_run_paths(runs_dir)):
            if (path / EXPORT).is_dir():
                return path / EXPORT
        raise RunError(f"no run in {runs_dir} has an export yet: python train.py --run-tag baseline makes one")
    if name and is_export(Path(expand_home(name))):
        return Path(expand_home(name))
    path = resolve_run(name, runs_dir)
    export = path / EXPORT
    if not export.is_dir():
        raise RunError(f"run {path.name} ({read_status(path)}) has no export: it is written when training completes")
    return export
