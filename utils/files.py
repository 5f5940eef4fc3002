"""Atomic writing and safe reading of files.

A file is written under a temporary name in the same folder, synced, and renamed, so it is complete or absent. Only
regular files are read, and links must not lead out of their folder. New files get the mode that the umask leaves, so
that a group can share a folder of runs.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from utils.errors import UserError
from utils.locks import folder_lock

JSON_BYTES = 64 << 20  # limit for a JSON file; the largest ones written, for a model of a million layers, are smaller
MODE = 0o666  # mode of a new file, before the umask is applied
# Errors of the machine rather than mistakes in the command: printed as one line with exit status 1.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_fd(path: Path, inside: Path | None = None, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without blocking; a pipe or a device, which could block or never end, is refused.

    Args:
        inside: the folder that links must not lead out of, by default the folder of the file.
        flags: for os.open; os.O_CREAT creates the file.

    Raises:
        OSError: the file cannot be opened, is not a regular file, or is outside `inside`; `strerror` says which.
    """
    if _has_links(path, inside or path.parent):
        folder = os.path.realpath(inside or path.parent)
        if not Path(os.path.realpath(path)).is_relative_to(folder):
            raise OSError(errno.EPERM, f"leads out of {inside or path.parent}", str(path))
    return _regular_fd(path, flags)


def _has_links(path: Path, folder: Path) -> bool:
    """Whether the part of `path` below `folder` may contain a symbolic link, so that real paths must be compared.

    Computing real paths takes an lstat for each folder from the root down, which would be most of the time of reading
    an index of runs.
    """
    text, place = os.fspath(path), os.fspath(folder)
    if ".." in path.parts or not text.startswith(f"{place.rstrip(os.sep)}{os.sep}"):
        return True
    while len(text) > len(place):
        if os.path.islink(text):
            return True
        text = os.path.dirname(text)
    return False


def _regular_fd(path: Path, flags: int) -> int:
    """Like `regular_fd`, but links may lead anywhere."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, MODE)
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


def dangling_link(path: Path) -> Path | None:
    """The first dangling symbolic link among `path` and its parents; None if there is none."""
    ways = (place for place in (path, *path.parents) if place.is_symlink() and not place.exists())
    return next(ways, None)


def open_regular(path: Path, inside: Path | None = None) -> io.BufferedReader:
    """Open a regular file for reading (see `regular_fd`)."""
    return os.fdopen(regular_fd(path, inside), "rb")


def open_named(path: Path) -> io.BufferedReader:
    """Open a regular file that the user named, for reading; unlike for `open_regular`, links may lead anywhere.

    A pipe is refused, since it may never end, unless this process has it open already, as with a shell's `<(...)`.
    """
    if path.parent == Path("/dev/fd"):
        return path.open("rb")
    return os.fdopen(_regular_fd(path, os.O_RDONLY), "rb")


def is_regular(path: Path, inside: Path | None = None) -> bool:
    """Whether `open_regular` can open the file."""
    try:
        open_regular(path, inside).close()
    except OSError:
        return False
    return True


def read_bytes(path: Path, inside: Path | None = None, limit: int = JSON_BYTES) -> bytes:
    """Read a regular file (see `regular_fd`).

    Raises:
        OSError: the file cannot be opened, or is larger than `limit` bytes.
    """
    with open_regular(path, inside) as file:
        return _content(file, path, limit)


def read_named(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Read a file that the user named (see `open_named`).

    Raises:
        OSError: as for `read_bytes`.
    """
    with open_named(path) as file:
        return _content(file, path, limit)


def _content(file: io.BufferedReader, path: Path, limit: int) -> bytes:
    content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit >> 20:,} MiB", str(path))
    return content


def read_text(path: Path, inside: Path | None = None, errors: str = "strict") -> str:
    """Read a regular file as UTF-8 text (see `read_bytes`).

    Raises:
        OSError: as for `read_bytes`.
        ValueError: the file is not UTF-8.
    """
    return read_bytes(path, inside).decode("utf-8", errors)


def read_json(path: Path, inside: Path | None = None) -> Any:
    """Read the value in a JSON file (see `read_bytes`).

    Raises:
        OSError: as for `read_bytes`.
        ValueError: the file is not JSON, or is nested too deeply.
    """
    content = read_bytes(path, inside)
    with suppress(ValueError):  # the standard library accepts more, such as NaN, and has better messages
        return orjson.loads(content)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_or_empty(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """Read the object in a JSON file that training can do without; empty if it is missing, damaged or not an object."""
    try:
        value = read_json(path, inside)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def expand_home(text: str) -> str:
    """Expand a leading `~` to the home folder, as a shell does.

    A shell does not expand the `~` in `--flag=~/runs`, and nothing else expands one in a configuration file.

    Raises:
        UserError: the path names the home folder of an unknown user, and no file of that name exists.
    """
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.lexists(path):
        raise UserError(f"{text}: there is no home folder {path.split(os.sep)[0]} (./{text} for a file of that name)")
    return path


def real_path(path: Path) -> Path:
    """The absolute path with links resolved; a link loop is left as it is, where Path.resolve of Python 3.11 raises."""
    return Path(os.path.realpath(path))


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write `data` to `path` atomically: after a crash the file has either the old or the new content.

    A link at `path` is replaced, not followed. An existing file keeps its mode.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    try:
        with os.fdopen(handle, "wb") as file:
            _keep_mode(handle, path)
            file.write(_encoded(data))
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep_mode(handle: int, path: Path) -> None:
    """Give an open file the permissions of the regular file at `path`, if there is one."""
    try:
        old = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(old) and stat.S_IMODE(old) != stat.S_IMODE(os.fstat(handle).st_mode):
        os.chmod(handle, stat.S_IMODE(old))


def _encoded(data: bytes | memoryview | str) -> bytes | memoryview:
    """Encode text as UTF-8; a file name or argument in it may contain lone surrogates, which are escaped."""
    return data.encode("utf-8", errors="backslashreplace") if isinstance(data, str) else data


def write_output(path: Path, data: bytes | str) -> None:
    """Write `data` to a path that the user named: a file, the target of a link, a device or a pipe.

    A regular file is replaced by `write_atomic`. But if stdout or stderr is redirected to it, as in
    `--out /dev/stdout > log`, `data` follows what it contains already.

    Raises:
        OSError: the path cannot be written, or is a pipe without a reader, a socket or a disk; `strerror` says which.
    """
    if (target := output_target(path)) is not None:
        write_atomic(target, data)
        return
    if (stream := _stream_at(path)) is not None:
        handle = os.dup(stream)
    else:
        # Without O_NONBLOCK, opening a pipe would wait for a reader.
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(error.errno, "no process reads this pipe", str(path)) from None
            raise
        os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as file:
        file.write(_encoded(data))


def _stream_at(path: Path) -> int | None:
    """The descriptor of stdout or stderr, if that is the file at `path`; otherwise None."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
    return None


def output_target(path: Path) -> Path | None:
    """The regular file that writing to `path` creates or replaces.

    None for what must not be replaced: a device, a pipe, or the file that stdout or stderr is redirected to.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # a new file, or the target of a link
        return Path(os.path.realpath(path))
    if stat.S_ISREG(mode):
        return Path(os.path.realpath(path)) if _stream_at(path) is None else None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISCHR(mode):
        return None
    if not stat.S_ISFIFO(mode):
        kind = "a disk" if stat.S_ISBLK(mode) else KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, not a file", str(path))
    return None


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON (see `write_atomic`)."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def change_json(path: Path, change: Callable[[Any], Any], read: Callable[[Path], Any] = read_json) -> Any:
    """Replace the value in a JSON file by `change(value)`, under a lock, so that no writer undoes another's change.

    Args:
        change: maps the old value, or None if the file does not exist, to the new one.
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


def put_aside(path: Path) -> Path:
    """Rename a file or folder to NAME.damaged, or with a number added if that exists; return the new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged_{number}")
    path.rename(aside)
    return aside


def unwritable(place: Path, error: OSError, mistake: UserError | None = None) -> OSError | UserError:
    """The error to raise if a place that the user named cannot be written.

    Returns:
        An OSError if the disk is full or fails; otherwise `mistake`, by default a UserError that names the place.
    """
    if error.errno in DISK_ERRORS:
        return OSError(error.errno, error.strerror, str(place))
    return mistake or UserError(f"{place}: cannot be written: {error.strerror or error}")
