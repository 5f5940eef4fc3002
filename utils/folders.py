"""Folders as a whole: replaced, deleted, made to survive a power loss, measured."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def replace_folder(folder: Path, new: Path) -> None:
    """Move the folder `new` to `folder`; if that fails, an old one there stays.

    Raises:
        OSError: it cannot be moved.
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
    """Put the old folder back where `replace_folder` was killed between its two moves."""
    if not os.path.lexists(folder) and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    """Where a folder is while it is being replaced."""
    return folder.with_name(f".{folder.name}.old")


def delete(path: Path) -> None:
    """Delete a folder with its content, or whatever else is there.

    Raises:
        OSError: something cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """As `delete`, but what cannot be deleted stays.

    shutil.rmtree opens what it is to delete, so at a pipe it would wait forever.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make the files in `folder` survive a power loss."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def links_out(folder: Path) -> list[Path]:
    """The links in a folder that lead out of it, sorted: whoever writes to these names writes elsewhere."""
    real, found = Path(os.path.realpath(folder)), []
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                found.append(path)
    return sorted(found)


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
