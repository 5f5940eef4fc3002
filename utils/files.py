"""Files that are complete or absent, and files that can be opened without harm.

Writing: beside the place, synced, renamed into it. Reading: regular files only, and none that a link takes elsewhere.
Modes are those that the umask leaves, as for any program, so a group can share a folder of runs.
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

JSON_BYTES = 64 << 20  # of a JSON file: the largest that are written, about a model of a million layers, have less
MODE = 0o666  # of a new file, less what the umask takes away
# Of the machine, not of the command: one line and exit status 1.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
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
    if _has_links(path, inside or path.parent):
        folder = os.path.realpath(inside or path.parent)
        if not Path(os.path.realpath(path)).is_relative_to(folder):
            raise OSError(errno.EPERM, f"leads out of {inside or path.parent}", str(path))
    return _regular_fd(path, flags)


def _has_links(path: Path, folder: Path) -> bool:
    """Whether a link is on the way from `folder` to `path`, or may be: then the real paths must be compared.

    These take an lstat for each folder from the root on, which is most of the time of reading an index of runs.
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
    """As `regular_fd`, wherever links lead."""
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
    """The link on the way to `path`, or at its end, whose target does not exist; None if there is none."""
    ways = (place for place in (path, *path.parents) if place.is_symlink() and not place.exists())
    return next(ways, None)


def open_regular(path: Path, inside: Path | None = None) -> io.BufferedReader:
    """A regular file for reading (see `regular_fd`)."""
    return os.fdopen(regular_fd(path, inside), "rb")


def open_named(path: Path) -> io.BufferedReader:
    """A regular file that a person named, for reading: unlike `open_regular`, wherever links lead.

    A pipe is refused, because nothing says when it ends, unless it is open already, as that of a shell's `<(...)` is.
    """
    if path.parent == Path("/dev/fd"):
        return path.open("rb")
    return os.fdopen(_regular_fd(path, os.O_RDONLY), "rb")


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
        return _content(file, path, limit)


def read_named(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a file that a person named (see `open_named`).

    Raises:
        OSError: as `read_bytes`.
    """
    with open_named(path) as file:
        return _content(file, path, limit)


def _content(file: io.BufferedReader, path: Path, limit: int) -> bytes:
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
    content = read_bytes(path, inside)
    with suppress(ValueError):  # NaN, say, which only the standard library takes; or its message is wanted
        return orjson.loads(content)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_or_empty(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file that serves people; empty if it is missing, damaged or something else."""
    try:
        value = read_json(path, inside)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def expand_home(text: str) -> str:
    """A path as a person wrote it, with their home folder in place of a leading `~`, as a shell does.

    A shell leaves the `~` of `--flag=~/runs` as it is, and nothing expands the one in a configuration file.

    Raises:
        UserError: it names the home of an unknown user, and not a file that exists.
    """
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.lexists(path):
        raise UserError(f"{text}: there is no home folder {path.split(os.sep)[0]} (./{text} for a file of that name)")
    return path


def real_path(path: Path) -> Path:
    """The absolute path without links; one that leads to itself stays, where Path.resolve of Python 3.11 raises."""
    return Path(os.path.realpath(path))


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Replace `path` by `data`; a crash leaves the old content or the new, never a part.

    For files of ours: a link at `path` is replaced, not followed. An older file keeps its mode.

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
    """The bytes of a text; a file name or an argument in it may be no valid text."""
    return data.encode("utf-8", errors="backslashreplace") if isinstance(data, str) else data


def write_output(path: Path, data: bytes | str) -> None:
    """Write a file that a person named: through a link into its target, into a device or a pipe as it is.

    A regular file is replaced by `write_atomic`, unless it is where stdout or stderr goes (`--out /dev/stdout > log`):
    there `data` follows what is in it already.

    Raises:
        OSError: it cannot be written, or is a pipe without a reader, a socket or a disk; `strerror` says which.
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
    """The descriptor of this process's stdout or stderr, if that is the file at `path`."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
    return None


def output_target(path: Path) -> Path | None:
    """The regular file that writing to `path` makes or replaces; None for what has to stay: a device, a pipe, the file
    that stdout or stderr goes to.

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
    """Replace `path` by `value` as indented JSON (see `write_atomic`)."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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


def unwritable(place: Path, error: OSError, mistake: UserError | None = None) -> OSError | UserError:
    """The error for a place that a person named: an OSError if the disk is full or fails, else a mistake of theirs.

    Args:
        mistake: that mistake, if it is said in other words.
    """
    if error.errno in DISK_ERRORS:
        return OSError(error.errno, error.strerror, str(place))
    return mistake or UserError(f"{place}: cannot be written: {error.strerror or error}")
