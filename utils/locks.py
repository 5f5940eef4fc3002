"""Locks between processes: flock or, on file systems without it, a file that names its holder."""

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

LOCK_SECONDS = 10.0  # how long to wait for another writer of a JSON file, which holds the lock for milliseconds
LOCK_FILE = ".lock.tmp"  # the lock of a folder without flock; if a killed process leaves it behind, prune removes it
RELEASED = "released"  # last word of the signature of a process that has released the lock
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The errors of flock on NFS without a lock manager, on Lustre without the flock option, and the like.
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


def try_flock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file without waiting; return False if its file system does not support locks.

    Raises:
        BlockingIOError: another process holds the lock.
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
    """An id unique to this boot of this machine; empty if the system provides none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Holder(NamedTuple):
    """The process that holds a lock, as recorded in its signature. boot: empty if an older version wrote it."""

    pid: int
    host: str
    boot: str = ""

    @classmethod
    def this(cls) -> Holder:
        return cls(os.getpid(), socket.gethostname(), boot_id())

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Parse the signature in the first line of `text`; None if it is incomplete, malformed or released."""
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
        """Whether the process belongs to this machine and its current boot, so that its pid can be looked up."""
        return self.host == socket.gethostname() and self.boot in ("", boot_id())

    def is_alive(self, seen: float) -> bool:
        """Whether the process, which must belong to this machine, is still running.

        Args:
            seen: time of its last sign of life, in seconds since 1970; a process that started later reuses the pid.
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
    """Hold the lock that writers of the JSON files in `folder` take.

    With flock, the lock ends with the process and leaves no file.

    Raises:
        TimeoutError: another process holds the lock for too long.
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
    """Hold a lock by creating a file.

    An existing lock file is taken over if its process has ended, or at the `deadline` if that cannot be checked here.

    Raises:
        TimeoutError: a live process of this machine still holds the lock at the `deadline`.
        OSError: the file cannot be created.
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
    """The holder named in a lock file, and the file's mtime."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return Holder.parse(os.read(handle, 4096).decode(errors="replace")), os.fstat(handle).st_mtime
    finally:
        os.close(handle)
