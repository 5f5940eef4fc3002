"""Operations on whole folders: replace, delete, sync to disk, measure."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def replace_folder(folder: Path, new: Path) -> None:
    """Move the folder `new` to `folder`, replacing an existing one; if that fails, the existing one stays.

    Raises:
        OSError: the folder cannot be moved.
    """
    restore_folder(folder)
    old = _old(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        restore_folder(folder)
        raise
    sync_folder(folder.parent)
    remove(old)


def restore_folder(folder: Path) -> None:
    """Put the old folder back if `replace_folder` was killed between its two moves."""
    if not os.path.lexists(folder) and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    """The path to which a folder is moved while it is being replaced."""
    return folder.with_name(f".{folder.name}.old")


def delete(path: Path) -> None:
    """Delete a folder with its content, a file or a link; do nothing if `path` does not exist.

    Raises:
        OSError: something cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Like `delete`, but ignore what cannot be deleted.

    shutil.rmtree is used for folders only, because it opens what it deletes and would wait forever at a pipe.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that the names in it survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Sync the files in `folder` to disk, so that their content survives a power loss."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def links_out(folder: Path) -> list[Path]:
    """The symbolic links below a folder whose targets are outside it, sorted; writing through them writes elsewhere."""
    real, found = Path(os.path.realpath(folder)), []
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                found.append(path)
    return sorted(found)


def size_of(folder: Path) -> int:
    """Total size in bytes of the files below `folder`; 0 if it does not exist."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted in the meantime
                continue
    return total
