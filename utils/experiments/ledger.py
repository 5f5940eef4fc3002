"""The ledger of the gate: gate.jsonl in the folder of runs, an append-only file with a line for each verdict."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import regular_fd
from utils.locks import folder_lock, try_flock
from utils.runs.layout import GATE

Entry = Mapping[str, Any]


def read_ledger(runs_dir: Path) -> list[Entry]:
    """Read all entries, oldest first; lines that a crash cut off, or that are not entries, are left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        handle = regular_fd(runs_dir / GATE)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{runs_dir / GATE}: cannot be read: {error.strerror}") from None
    entries: list[Entry] = []
    with os.fdopen(handle, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("key"), str) and "verdict" in entry:
                    entries.append(entry)
    return entries


def append(runs_dir: Path, entry: Entry) -> None:
    """Append a line, whole or not at all, even if other processes write at the same time.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    with folder_lock(runs_dir):
        handle = regular_fd(runs_dir / GATE, flags=os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # keep apart from a line that was cut off
                line = b"\n" + line
            if os.write(handle, line) != len(line):
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(runs_dir / GATE))
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def trial_lock(runs_dir: Path, key: str) -> Iterator[None]:
    """Hold the lock of one comparison, so that two gates do not train the same runs.

    Raises:
        UserError: another process holds it.
    """
    path = runs_dir / f".gate_{key[:16]}.lock"
    handle = regular_fd(path, flags=os.O_RDWR | os.O_CREAT)
    try:
        try:
            try_flock(handle)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(handle)):  # its holder removed it
                raise BlockingIOError
        except BlockingIOError:
            raise UserError("another process is comparing these two already: wait for its verdict") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
