"""Files that are complete or absent, and files that can be opened without harm.

Writing: beside the place, synced, renamed into it. Reading: regular files only, and none that a link takes elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JSON_BYTES = 64 << 20  # of a JSON file: the largest that are written, about a model of a million layers, have less
LOCK_SECONDS = 10.0  # to wait for another writer of a JSON file, which holds the lock for milliseconds
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)  # of file systems without flock
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_fd(path: Path, inside: Path | None = None, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, at once: a pipe or a device could block or never end.

    Args:
        inside: the folder that a link must not lead out of; by default that of the file.
        flags: for os.open; os.O_CREAT makes the file.

    Raises:
        OSError: it cannot be opened, is something else, or lies outside `inside`; `strerror` says which.
    """
    if path.is_symlink() or inside is not None:
        folder = os.path.realpath(inside or path.parent)
        if not Path(os.path.realpath(path)).is_relative_to(folder):
            raise OSError(errno.EPERM, f"leads out of {inside or path.parent}", str(path))
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"is {KINDS.get(kind, 'something else')}, not a file", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_regular(path: Path, inside: Path | None = None) -> io.BufferedReader:
    """A regular file for reading (see `regular_fd`)."""
    return os.fdopen(regular_fd(path, inside), "rb")


def is_regular(path: Path, inside: Path | None = None) -> bool:
    """Whether `open_regular` would open the file."""
    try:
        open_regular(path, inside).close()
    except OSError:
        return False
    return True


def read_bytes(path: Path, inside: Path | None = None, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file (see `regular_fd`).

    Raises:
        OSError: it cannot be opened, or is larger than `limit` bytes.
    """
    with open_regular(path, inside) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit >> 20:,} MiB", str(path))
    return content


def read_text(path: Path, inside: Path | None = None, errors: str = "strict") -> str:
    """The content of a regular file as text (see `read_bytes`).

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, inside).decode("utf-8", errors)


def read_json(path: Path, inside: Path | None = None) -> Any:
    """The value in a JSON file (see `read_bytes`).

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, inside))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Replace `path` by `data`; a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is unchanged.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", errors="backslashreplace")  # a file name or argument may be no valid text
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON (see `write_atomic`)."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def change_json(path: Path, change: Callable[[Any], Any], read: Callable[[Path], Any] = read_json) -> Any:
    """Replace the value in a JSON file by what `change` makes of it; of several writers none undoes another's change.

    Args:
        change: gets the value, None if there is no file.
        read: reads the file.

    Returns:
        The new value.

    Raises:
        OSError: the file cannot be read or written, or another process holds the lock for too long.
        ValueError: the file is damaged.
    """
    with folder_lock(path.parent):
        try:
            old = read(path)
        except FileNotFoundError:
            old = None
        new = change(old)
        write_json(path, new)
        return new


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
        while not _locked(handle):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock", str(folder))
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without locks, a change of another process in the same moment may be lost
            raise
    return True


def put_aside(path: Path) -> Path:
    """Rename what is at `path` to a free name beside it, NAME.damaged, and return that.

    Raises:
        OSError: it cannot be renamed.
    """
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged_{number}")
    path.rename(aside)
    return aside


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of the files below `folder`; 0 if there is none."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return total
