"""What was read of runs that have ended, kept in one file beside them, so that an index of thousands is read fast.

The files of a run are what counts: an entry is used only while all of them look as they did when they were read. A
cache that is missing, damaged, of other code, or not writable is no error: the runs are read, as without it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

import utils.files
from utils.files import read_bytes, write_atomic
from utils.runs.layout import ARTIFACTS, CONFIG, EVALUATIONS, INDEX_CACHE, METRICS_LOG, NOTES, RECORD

Stamp = list[list[int] | None]  # of a run: what lstat says about each of LOOKED_AT

# The folders change when a file in them is made, deleted or replaced: the seal, say, or meta/ by a link.
LOOKED_AT = (Path(), RECORD, NOTES, CONFIG, METRICS_LOG, ARTIFACTS, EVALUATIONS)
SETTLED_NS = 2_000_000_000  # a file may change twice at what a coarse clock calls one time
WORTH_WRITING = 20  # entries that are new, other or gone: so few runs are read faster than all are written
MOST_BYTES = 1 << 30


class IndexCache:
    """The cache of the folder `runs_dir`: `look` and `keep` for each run, then `write` once."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._old = _read(runs_dir)
        self._entries: dict[str, Any] = {}

    def look(self, name: str) -> tuple[Mapping[str, Any] | None, Stamp | None]:
        """What is kept about the run `name`, None if it has to be read; and how its files look now, for `keep`."""
        stamp = _stamp(os.path.join(self.runs_dir, name))
        entry = self._old.get(name)
        if entry is None or entry["stamp"] != stamp:
            return None, stamp
        self._entries[name] = entry
        return entry["facts"], stamp

    def keep(self, name: str, stamp: Stamp | None, facts: Mapping[str, Any]) -> None:
        """Keep what was read of a run that has ended, after its files looked like `stamp`."""
        if stamp is None:
            return
        with suppress(orjson.JSONEncodeError):
            if orjson.loads(orjson.dumps(facts)) == facts:  # NaN, say, would come back as null
                self._entries[name] = {"stamp": stamp, "facts": facts}

    def write(self) -> None:
        """Replace the file, if that is worth it and possible."""
        names = {*self._old, *self._entries}
        if sum(self._old.get(name) is not self._entries.get(name) for name in names) < WORTH_WRITING:
            return
        body = orjson.dumps(self._entries)
        content = orjson.dumps({"code": _code(), "crc32": zlib.crc32(body)}) + b"\n" + body
        if len(content) <= MOST_BYTES:
            with suppress(OSError):
                write_atomic(self.runs_dir / INDEX_CACHE, content)


def _read(runs_dir: Path) -> dict[str, Any]:
    """The entries by name of run; none if the cache cannot be used."""
    path = runs_dir / INDEX_CACHE
    try:
        if path.lstat().st_uid not in (0, os.geteuid(), runs_dir.stat().st_uid):  # who may not change these runs
            return {}
        head, _, body = read_bytes(path, limit=MOST_BYTES).partition(b"\n")
        if orjson.loads(head) == {"code": _code(), "crc32": zlib.crc32(body)}:
            return dict(orjson.loads(body))
    except (OSError, ValueError):
        pass
    return {}


def _stamp(run: str) -> Stamp | None:
    """How the files of a run look; None if one may change without looking so: it is a link, or changed just now."""
    stamp: Stamp = []
    settled = time.time_ns() - SETTLED_NS
    for place in _PLACES:
        try:
            found = os.lstat(run + place)
        except OSError:
            stamp.append(None)
            continue
        if stat.S_ISLNK(found.st_mode) or found.st_ctime_ns > settled:
            return None
        stamp.append([found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size])
    return stamp


_PLACES = [f"{os.sep}{place}" if place.parts else "" for place in LOOKED_AT]


@functools.cache
def _code() -> str:
    """A hash of the code that reads runs: other code may find something else in the same files."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(utils.files.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
