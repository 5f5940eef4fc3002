"""The hidden work folder beside a dataset, which keeps finished parts so that a killed preparation can be continued."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.corpora.datasets import TOKENIZER_JSON
from utils.errors import UserError
from utils.files import read_json, read_text, write_json
from utils.folders import delete, remove, sync_folder
from utils.locks import Holder, try_flock

PLAN, LOCK = "plan.json", "preparation.lock"


def work_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.preparing")


class WorkFolder:
    """A work folder, whose lock this process holds.

    path: the folder; its `texts/` and `tokens/` have the parts, and `dataset/` becomes the dataset.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = work_path(target)
        self.texts, self.tokens, self.dataset = (self.path / name for name in ("texts", "tokens", "dataset"))
        self.tokenizer = self.path / TOKENIZER_JSON

    def begin(self, plan: Any) -> bool:
        """Keep the parts if they were made by the same plan; otherwise delete them.

        Returns:
            Whether parts were kept.

        Raises:
            OSError: the disk is full or read-only.
        """
        kept = False
        with contextlib.suppress(OSError, ValueError):
            kept = read_json(self.path / PLAN) == plan
        if not kept:
            for name in os.listdir(self.path):
                if name != LOCK:
                    delete(self.path / name)
            write_json(self.path / PLAN, plan)
        for folder in (self.texts, self.tokens):
            folder.mkdir(exist_ok=True)
        delete(self.dataset)
        self.dataset.mkdir()
        return kept and any(self.texts.iterdir())

    def publish(self, replace: bool) -> None:
        """Move the dataset to its place, and delete the work folder.

        Raises:
            OSError: the dataset cannot be moved.
        """
        sync_folder(self.dataset)
        if replace and self.target.exists():
            old = self.path / "old"
            delete(old)
            self.target.rename(old)
        self.dataset.rename(self.target)
        sync_folder(self.target.parent)
        self.delete()

    def delete_if_new(self) -> None:
        """Delete the folder unless it has parts of an interrupted preparation."""
        if not (self.path / PLAN).exists():
            self.delete()

    def delete(self) -> None:
        remove(self.path)


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[WorkFolder]:
    """Lock the work folder of a dataset, which is created if it does not exist.

    Raises:
        UserError: another process prepares the same dataset, or the folder cannot be made.
    """
    work = WorkFolder(target)
    try:
        handle = _locked(work.path)
    except BlockingIOError:
        raise UserError(f"{target}: is being prepared by {holder_text(target)}") from None
    except OSError as error:
        raise UserError(f"{error.filename or work.path}: cannot be written: {error.strerror}") from None
    try:
        yield work
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """Take the lock of a folder, which another process may delete at any time.

    Returns:
        The file descriptor of the lock.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    while True:
        path.mkdir(parents=True, exist_ok=True)
        lock = path / LOCK
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            if not try_flock(handle) and _lives(lock):
                raise BlockingIOError
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{Holder.this().signature}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lives(lock: Path) -> bool:
    """For file systems without flock: whether the process that signed the lock is alive, or on another machine."""
    holder = _holder(lock)
    if holder is None or holder == Holder.this():
        return False
    return not holder.is_here or holder.is_alive(lock.stat().st_mtime)


def _holder(lock: Path) -> Holder | None:
    try:
        return Holder.parse(read_text(lock))
    except (OSError, ValueError):
        return None


def holder_text(target: Path) -> str:
    return str(_holder(work_path(target) / LOCK) or "another process")


def is_being_prepared(work: Path) -> bool:
    """Whether a process holds the lock of a work folder."""
    try:
        handle = os.open(work / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_flock(handle, fcntl.LOCK_SH) and _lives(work / LOCK)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
