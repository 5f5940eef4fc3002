"""Trust: code that a run directory made elsewhere would run here runs only with permission.

A run directory is data, with two exceptions: it names callbacks, which a resume or fork imports, and its code.patch is
code that `reproduce` runs. docs/security.md explains what is trusted.
"""

from __future__ import annotations

import importlib.machinery
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.runs.layout import RECORD
from utils.runs.run import RunError, read_record
from utils.terminal.words import printable


def made_here(root: Path) -> dict[str, str]:
    """The entry `made` in run.json of a run that this process creates.

    Args:
        root: the project folder.
    """
    return {"host": socket.gethostname(), "root": os.fspath(root)}


def made_elsewhere(run: Path, root: Path) -> str | None:
    """Where a run was made, in words, if on another host or in another project folder; None if it was made here.

    Args:
        root: the project folder of this process.
    """
    try:
        record = read_record(run)
    except RunError:
        return "by something unknown"
    made = record.get("made")
    made = made if isinstance(made, dict) else _made(run, record, root)
    host, place = made.get("host"), made.get("root")
    if host != socket.gethostname():
        return f"on {host}" if isinstance(host, str) else "on an unknown host"
    if not isinstance(place, str):
        return "in an unknown folder"
    return None if os.path.realpath(place) == os.path.realpath(root) else f"in {place}"


def _made(run: Path, record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The entry `made` for an older record without it: this project, unless the record shows another place."""
    resumes = record.get("resumes") or []
    host = (resumes[0].get("before") or {}).get("host") if resumes else record.get("host")
    place = record.get("place")
    path = Path(str(place.get("path"))) if isinstance(place, dict) else run
    own = path.is_relative_to(os.path.abspath(root)) or path.parent == Path(os.path.abspath(run)).parent
    return {"host": host, "root": os.fspath(root) if own else os.fspath(path.parent)}


def require_trust(run: Path, root: Path, what: Sequence[str], trusted: bool) -> None:
    """Allow a run that was made elsewhere to run code only with --trust or, at a terminal, if the user confirms it.

    Args:
        root: the project folder.
        what: descriptions of the code; if empty, nothing is asked.
        trusted: whether --trust was given.

    Raises:
        UserError: the code may not run.
    """
    if trusted or not what or (where := made_elsewhere(run, root)) is None:
        return
    question = f"{run.name} was made {where}, and would run code here: {'; '.join(what)}"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(printable(f"{question}\nRun it? [y/N] "), end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise UserError(f"{question}; --trust allows it")


def enclosing_run(path: Path) -> Path | None:
    """The run directory that contains a file, or the link that leads to it; None if none does."""
    folders = (*Path(os.path.abspath(path)).parents, *Path(os.path.realpath(path)).parents)
    return next((folder for folder in folders if (folder / RECORD).is_file()), None)


def callback_words(names: Iterable[str]) -> list[str]:
    """Describe callbacks by their names, each with the file that it would be imported from."""
    return [f"callback {name} ({next(module_files(name.partition(':')[0]), 'not found')})" for name in names]


def module_files(module: str) -> Iterator[Path]:
    """Yield each file that importing a module may run: its own, and those of the packages that contain it.

    Nothing is imported, so files that a package would find by an import hook of its own are missing.
    """
    suffixes = importlib.machinery.all_suffixes()
    places = [Path(entry or os.curdir) for entry in sys.path]
    found: list[Path] = []
    parts = module.split(".")
    for number, part in enumerate(parts, start=1):
        places = [place / part for place in places]
        files = [place.with_name(place.name + suffix) for place in places for suffix in suffixes]
        files += [place / f"__init__{suffix}" for place in places for suffix in suffixes]
        if (loaded := sys.modules.get(".".join(parts[:number]))) is not None:
            files[:0] = [Path(file) for file in (getattr(loaded, "__file__", None),) if file]
            places += map(Path, getattr(loaded, "__path__", ()))
        found = [*filter(os.path.isfile, files), *found]
    yield from dict.fromkeys(found)


def check_callback_place(name: str, runs_dir: Path, root: Path) -> None:
    """Raise UserError if the module of a callback is inside a run directory or the folder of runs.

    Args:
        name: module:Class.
        root: the project folder.
    """
    project, runs = Path(os.path.realpath(root)), Path(os.path.realpath(runs_dir))
    for file in module_files(name.partition(":")[0]):
        place = Path(os.path.realpath(file))
        among_runs = place.is_relative_to(runs) and not project.is_relative_to(runs)
        if among_runs or enclosing_run(place) is not None:
            raise UserError(
                f"callbacks: {name} is {file}, inside a run: a run directory contains data, not code to import"
            )
