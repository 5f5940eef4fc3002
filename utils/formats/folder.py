"""Folders of exports: written under a hidden name beside their destination, checked, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from utils.errors import SHOWN, UserError, cut
from utils.files import read_text, unwritable
from utils.folders import delete, remove, replace_folder, restore_folder, sync_files
from utils.formats.card import MADE_HERE
from utils.locks import try_flock

MARKER = "README.md"  # every export has a model card
WRITTEN = re.compile(  # the names of all files that an export may have
    r"README\.md|certificate\.json|config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|"
    r"chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|model\.gguf|"
    r"model\.onnx(\.data)?"
)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write an export into. It is renamed to `folder` on success and deleted after an error.

    An older export at `folder` is replaced on success and kept after an error.

    Raises:
        UserError: `folder` has something else, another process is writing there, or it cannot be written to.
        OSError: the disk is full or fails.
    """
    folder = Path(os.path.realpath(folder))
    try:
        restore_folder(folder)
        _check_replaceable(folder)
        hidden = folder.with_name(f".{folder.name}.tmp")
        hidden.mkdir(parents=True, exist_ok=True)
        with _locked(hidden, folder):
            try:
                for path in hidden.iterdir():  # left by an export that was killed
                    delete(path)
                yield hidden
                sync_files(hidden)
                replace_folder(folder, hidden)
            except BaseException:
                remove(hidden)
                raise
    except OSError as error:
        raise unwritable(folder, error) from None


def _check_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is free, an empty folder, or an export and nothing else."""
    if not os.path.lexists(folder):
        return
    names = os.listdir(folder) if folder.is_dir() else None
    if names == []:
        return
    reason = "is not an export"
    if names and MARKER in names and MADE_HERE in read_text(folder / MARKER, errors="replace"):
        unknown = sorted(name for name in names if not WRITTEN.fullmatch(name))
        if not unknown:
            return
        reason = f"has {cut(unknown[0], SHOWN)}, which does not belong to an export"
    raise UserError(f"{folder}: exists and {reason}: it is left as it is; --out names another folder")


@contextlib.contextmanager
def _locked(hidden: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. It moves with the folder and ends with the process.

    Raises:
        UserError: another process holds it, or has renamed the folder in the meantime.
    """
    handle = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            try_flock(handle)
            moved = not os.path.samestat(os.fstat(handle), os.stat(hidden))
        except (BlockingIOError, FileNotFoundError):
            moved = True
        if moved:
            raise UserError(f"{folder}: another process is writing an export there")
        yield
    finally:
        os.close(handle)
