"""The lock of a run directory, held by the process that trains or changes the run for as long as that process lives.

On one machine, flock tells whether the lock is held. Other machines cannot see that, and some file systems have no
flock. Then the lock file itself tells, by the signature of its holder (process, host, boot) and its mtime, a heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.files import read_text, regular_fd
from utils.locks import RELEASED, Holder, folder_lock, try_flock
from utils.runs.layout import LOCK

HEARTBEAT_SECONDS = 15.0
STALE_HEARTBEAT_SECONDS = 60.0  # a run on another machine that has been silent for this long has crashed


class RunLock:
    """Takes the lock of the run directory `run` and holds it until `release`.

    has_flock: whether the file system supports flock.

    Raises:
        BlockingIOError: another process of this machine (without flock: of any machine) holds the lock.
        OSError: the lock file cannot be opened or written.
    """

    def __init__(self, run: Path) -> None:
        self._signed = False
        self.fd = regular_fd(run / LOCK, run, os.O_RDWR | os.O_CREAT)
        try:
            self.has_flock = try_flock(self.fd)
            if not self.has_flock:
                with folder_lock(run):
                    if _is_held_by_signature(run):
                        raise BlockingIOError(errno.EAGAIN, "another process holds its lock", str(run))
                    self.sign()
        except BaseException:
            os.close(self.fd)
            raise

    def sign(self) -> None:
        """Write the signature of this process into the lock file, which is also its first heartbeat."""
        self._write(Holder.this().signature)
        self._signed = True

    def release(self, silent_since: float | None = None) -> None:
        """Release the lock, so that others, on other machines too, can take it at once.

        Args:
            silent_since: mtime to give to the lock file, if this process did not train: the last sign of life of the
                previous holder, which tells how long that one trained.
        """
        if self._signed:
            with contextlib.suppress(OSError):  # a read-only disk: the lock is free after a minute of silence anyway
                self._write(f"{Holder.this().signature} {RELEASED}")
                if silent_since is not None:
                    os.utime(self.fd, (silent_since, silent_since))
        os.close(self.fd)

    def _write(self, text: str) -> None:
        line = f"{text}\n".encode()
        os.pwrite(self.fd, line, 0)  # before truncating, because a full disk may have no room for a new block
        os.ftruncate(self.fd, len(line))


def holder_of(run: Path) -> Holder | None:
    """The process that holds the lock of a run directory, or held it when it died; None if the lock was released."""
    try:
        return Holder.parse(read_text(run / LOCK, run))
    except (OSError, ValueError):
        return None


def holder_words(run: Path, record: Mapping[str, Any]) -> str:
    """The process that has a run, or had it when it died, in words: "process 5 on node3"."""
    holder = holder_of(run)
    if holder is None or (record.get("status") == "running" and record.get("host") != holder.host):
        return f"process {record.get('pid')} on {record.get('host')}"
    return str(holder)


def heartbeat_of(run: Path) -> float | None:
    """The time of the last heartbeat (the mtime of the lock file) in seconds since 1970; None without such a file."""
    try:
        fd = regular_fd(run / LOCK, run)  # a network disk may report an outdated mtime for a file that is not open
    except OSError:
        return None
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)


def heart_beats(run: Path) -> bool:
    """Whether the last heartbeat is at most STALE_HEARTBEAT_SECONDS old."""
    last = heartbeat_of(run)
    return last is not None and time.time() - last <= STALE_HEARTBEAT_SECONDS


def _is_held_by_signature(run: Path) -> bool:
    """Whether the process that signed the lock file, on any machine, is still alive."""
    holder, last = holder_of(run), heartbeat_of(run)
    if holder is None or last is None:
        return False
    return holder.is_alive(last) if holder.is_here else heart_beats(run)


def lock_is_free(run: Path) -> bool:
    """Whether no process of this machine holds the lock of the run directory `run`."""
    try:
        fd = regular_fd(run / LOCK, run)
    except OSError:  # the file is missing, or is something that no process can hold
        return True
    try:
        return try_flock(fd, fcntl.LOCK_SH) or not _is_held_by_signature(run)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def is_elsewhere(run: Path, record: Mapping[str, Any]) -> bool:
    """Whether the process that has the run, or had it when it died, belongs to another machine or an earlier boot.

    Args:
        record: run.json, which names the host of a run in training.
    """
    holder = holder_of(run)
    if holder is not None and not holder.is_here:
        return True
    return record.get("status") == "running" and record.get("host") != socket.gethostname()


def is_held(run: Path, record: Mapping[str, Any]) -> bool:
    """Whether a process is training or closing the run; on another machine, its heartbeat tells."""
    return heart_beats(run) if is_elsewhere(run, record) else not lock_is_free(run)


def wait_until_free(run: Path, seconds: float) -> bool:
    """Wait at most `seconds` for the lock of the run directory `run` to become free; return whether it is."""
    deadline = time.monotonic() + seconds
    while not (free := lock_is_free(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return free


def wait_until_silent(run: Path, read: Callable[[], Mapping[str, Any]], report: Callable[[str], None]) -> bool:
    """Wait until a process of another machine has released the lock, or has given no sign of life for a minute.

    Silence is measured by the clock of this machine, because that of the other machine or of the disk may be wrong.

    Args:
        read: reads run.json.
        report: prints one line for the user, before waiting.

    Returns:
        False if the process is alive and continues training.
    """
    last = heartbeat_of(run)
    silence = min(max(0.0, time.time() - (last or 0.0)), STALE_HEARTBEAT_SECONDS)
    left = STALE_HEARTBEAT_SECONDS - silence
    report(
        f"{run.name}: {holder_words(run, read())} gave its last sign of life {silence:.0f} s ago; if it gives none in "
        f"the next {left:.0f} s, it has died, and this process continues the run"
    )
    began = time.monotonic()
    silent_since = began - silence
    while is_elsewhere(run, record := read()):
        now, latest = time.monotonic(), heartbeat_of(run)
        if latest != last:
            if record["status"] == "running" or now - began > 2 * STALE_HEARTBEAT_SECONDS:
                return False
            last, silent_since = latest, now  # it has stopped training and is closing its trackers
        if now - silent_since >= STALE_HEARTBEAT_SECONDS:
            return True
        time.sleep(min(0.5, STALE_HEARTBEAT_SECONDS / 100))
    return True
