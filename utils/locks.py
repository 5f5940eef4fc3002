"""Locks between processes: flock, or where the file system has none, a file that names its holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

LOCK_SECONDS = 10.0  # to wait for another writer of a JSON file, which holds the lock for milliseconds
LOCK_FILE = ".lock.tmp"  # of a folder, without flock; a process that was killed may leave it, and prune removes it
RELEASED = "released"  # the last word of a signature whose process has released the lock
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What flock raises on NFS without a lock manager, Lustre without the flock option, and the like.
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


def try_flock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file, without waiting; False if its file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: any other failure.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


@cache
def boot_id() -> str:
    """Tells this boot of this machine from all others, whatever its name; empty where the system has no such id."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Holder(NamedTuple):
    """The process that holds a lock, as it signed it. boot: empty if an older version did."""

    pid: int
    host: str
    boot: str = ""

    @classmethod
    def this(cls) -> Holder:
        return cls(os.getpid(), socket.gethostname(), boot_id())

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The holder whose signature is the line `text`; None if it has no end, or says that the lock was released."""
        line, end, _ = text.partition("\n")
        try:
            pid, host, *boot = line.split()
            if not end or boot[-1:] == [RELEASED]:
                return None
            return cls(int(pid), host, *boot)
        except (ValueError, TypeError):
            return None

    @property
    def signature(self) -> str:
        return " ".join(filter(None, map(str, self)))

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine since its boot, so that its id means something here."""
        return self.host == socket.gethostname() and self.boot in ("", boot_id())

    def is_alive(self, seen: float) -> bool:
        """Whether a process of this machine still runs.

        Args:
            seen: when it gave its last sign of life, in seconds since 1970. A process that started later has its id
                by chance.
        """
        import psutil

        try:
            return psutil.Process(self.pid).create_time() <= seen + 1
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return False
        except psutil.AccessDenied:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock that writers of the JSON files in `folder` take; it ends with the process, and leaves no file.

    Raises:
        TimeoutError: another process holds it for too long.
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                has_flock = try_flock(handle)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock", str(folder)) from None
                time.sleep(0.01)
        if has_flock:
            yield
        else:
            with _lock_file(folder / LOCK_FILE, deadline):
                yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock_file(path: Path, deadline: float) -> Iterator[None]:
    """Hold a lock that is a file. One whose process is gone, or cannot be asked until `deadline`, is taken over.

    Raises:
        TimeoutError: a process of this machine holds it until `deadline`.
        OSError: the file cannot be made.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            break
        late = time.monotonic() > deadline
        with contextlib.suppress(FileNotFoundError):
            holder, seen = _signed(path)
            here = holder is not None and holder.is_here
            alive = here and holder is not None and holder.is_alive(seen)
            if alive and late:
                raise TimeoutError(errno.ETIMEDOUT, f"{holder} holds its lock", str(path))
            if late or (here and not alive):
                path.unlink()
                continue
        time.sleep(0.01)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{Holder.this().signature}\n")
        yield
    finally:
        path.unlink(missing_ok=True)


def _signed(path: Path) -> tuple[Holder | None, float]:
    """Who has signed a lock file, and its mtime."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return Holder.parse(os.read(handle, 4096).decode(errors="replace")), os.fstat(handle).st_mtime
    finally:
        os.close(handle)
