"""A cache of the index: the content of runs that have ended, in one file beside them, so that thousands are read fast.

The files of a run are the truth: an entry is used only if stat reports the same about all of them as when they were
read. If the cache is missing, damaged, made by other code, or not writable, the runs are read without it.
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

Stamp = list[list[int] | None]  # times, inode and size of each of LOOKED_AT in a run; None for one that is missing

# A folder changes when an entry of it is created, deleted or replaced, such as the seal, or meta/ by a link.
LOOKED_AT = (Path(), RECORD, NOTES, CONFIG, METRICS_LOG, ARTIFACTS, EVALUATIONS)
SETTLED_NS = 2_000_000_000  # with a coarse clock, a younger file may change again without another time
WORTH_WRITING = 20  # new, changed or deleted entries; reading fewer runs is faster than writing the whole cache
MOST_BYTES = 1 << 30  # size limit of the cache file


class IndexCache:
    """The cache of the folder `runs_dir`: call `look` and `keep` for each run, then `write` once."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._old = _read(runs_dir)
        self._entries: dict[str, Any] = {}

    def look(self, name: str) -> tuple[Mapping[str, Any] | None, Stamp | None]:
        """The cached facts about the run `name`, or None if it must be read, and the stamp of its files for `keep`."""
        stamp = _stamp(os.path.join(self.runs_dir, name))
        entry = self._old.get(name)
        if entry is None or entry["stamp"] != stamp:
            return None, stamp
        self._entries[name] = entry
        return entry["facts"], stamp

    def keep(self, name: str, stamp: Stamp | None, facts: Mapping[str, Any]) -> None:
        """Cache facts that were read from a run that has ended, after `stamp` was taken."""
        if stamp is None:
            return
        with suppress(orjson.JSONEncodeError):
            if orjson.loads(orjson.dumps(facts)) == facts:  # NaN would come back as null
                self._entries[name] = {"stamp": stamp, "facts": facts}

    def write(self) -> None:
        """Write the cache file if enough entries have changed; does nothing if it cannot be written."""
        names = {*self._old, *self._entries}
        if sum(self._old.get(name) is not self._entries.get(name) for name in names) < WORTH_WRITING:
            return
        body = orjson.dumps(self._entries)
        content = orjson.dumps({"code": _code(), "crc32": zlib.crc32(body)}) + b"\n" + body
        if len(content) <= MOST_BYTES:
            with suppress(OSError):
                write_atomic(self.runs_dir / INDEX_CACHE, content)


def _read(runs_dir: Path) -> dict[str, Any]:
    """The entries by name of the run; empty if the cache cannot be used."""
    path = runs_dir / INDEX_CACHE
    try:
        if path.lstat().st_uid not in (0, os.geteuid(), runs_dir.stat().st_uid):  # not from an owner of these runs
            return {}
        head, _, body = read_bytes(path, limit=MOST_BYTES).partition(b"\n")
        if orjson.loads(head) == {"code": _code(), "crc32": zlib.crc32(body)}:
            return dict(orjson.loads(body))
    except (OSError, ValueError):
        pass
    return {}


def _stamp(run: str) -> Stamp | None:
    """The stamp of a run; None if a file could change unnoticed, because it is a link or has changed just now."""
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
    """A hash of the code that reads runs, since other code may read something else from the same files."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(utils.files.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
