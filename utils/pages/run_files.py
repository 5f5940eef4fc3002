"""The files of a run that its page lists and sends: regular files inside its directory, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.files import is_regular, open_regular
from utils.pages.keys import key_of
from utils.runs.layout import RECORD
from utils.terminal.words import one_line

MOST_FILES = 2000  # of a list
CHUNK = 1 << 18  # bytes that are sent at once


@dataclass(frozen=True)
class RunFile:
    """One file of a run.

    name: its path inside the run, as a page shows it.
    key: its name in a request.
    """

    name: str
    key: str
    bytes: int
    path: Path


def list_files(run: Path) -> list[RunFile]:
    """List the regular files of a run, sorted by name. Links to folders are not followed; links to files are left out.

    A folder without run.json has none, because it is not a run: a link among the runs may lead anywhere.
    """
    found: list[RunFile] = []
    if not is_regular(run / RECORD, run):
        return found
    for place, folders, names in os.walk(run):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            inside = os.path.relpath(path, run)
            try:
                size = path.lstat().st_size
                is_file = path.is_file() and not path.is_symlink()
            except OSError:  # deleted meanwhile
                continue
            if is_file:
                found.append(RunFile(one_line(inside), _file_key(inside), size, path))
            if len(found) == MOST_FILES:
                return found
    return found


def _file_key(inside: str) -> str:
    """The key of a path inside a run: the path itself if all of its parts are plain."""
    parts = inside.split(os.sep)
    return "/".join(parts) if all(key_of(part) == part for part in parts) else key_of(inside)


def open_file(run: Path, key: str) -> tuple[RunFile, io.BufferedReader] | None:
    """Open the file that a request names; None if the run has no such file, or it cannot be read."""
    file = next((file for file in list_files(run) if file.key == key), None)
    try:
        return None if file is None else (file, open_regular(file.path, run))
    except OSError:  # deleted or replaced since it was listed
        return None


def chunks(file: io.BufferedReader) -> Iterator[bytes]:
    """Yield the content of an open file, and close it at the end."""
    with file:
        while data := file.read(CHUNK):
            yield data
