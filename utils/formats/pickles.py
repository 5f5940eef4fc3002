"""Pickles of torch: the one place that reads them, without running anything that is in them.

torch.load(weights_only=True) makes tensors, numbers, texts and containers of them, and refuses all else. Before that,
the archive must be one whose parts are stored as they are, so that a small file cannot become a large one.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import SHOWN, UserError, cut, shown
from utils.files import open_named

STRUCTURE_BYTES = 64 << 20  # of the pickle itself, in which tensors are only named
MOST_PARTS = 1 << 18
MOST_VALUES = 1 << 20


def read_pickle(path: Path) -> Any:
    """What torch.save wrote: the tensors on the CPU, mapped from the file.

    Raises:
        UserError: it needs code to be run, or is damaged, or not an archive of torch 1.6 or newer.
    """
    _check_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"to import {found[1]}" if found else "what only unpickling does"
        raise UserError(
            f"{path}: refused: this pickle asks {what}, and unpickling can run any code; nothing of it was run"
        ) from None
    except Exception as error:  # whatever a damaged archive makes of torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: damaged: {cut(reason, SHOWN)}") from None
    try:
        _check_tensors(path, value)
    except RecursionError:
        raise UserError(f"{path}: refused: nested too deeply") from None
    return value


def _check_archive(path: Path) -> None:
    """Raises UserError unless the file is an archive of torch whose parts together are no larger than it is."""
    try:
        with open_named(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"PK\x03\x04":
                raise UserError(
                    f"{path}: not an archive of torch: pickles of torch before 1.6 or of other programs are not read"
                )
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if len(parts) > MOST_PARTS or sum(part.file_size for part in parts) > size:
        raise UserError(f"{path}: refused: its parts are larger than the file")
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: refused: {shown(part.filename)} is compressed, which torch.save never does")
        if part.filename.endswith("/data.pkl") and part.file_size > STRUCTURE_BYTES:
            raise UserError(f"{path}: refused: {part.file_size:,} bytes that are no numbers of tensors")


def _check_tensors(path: Path, value: Any) -> None:
    """Raises UserError if tensors claim more numbers than the file has, or if few values stand for very many."""
    total, sizes = 0, {}  # bytes of all tensors; id of a container -> its values, 0 while they are counted

    def count(value: Any) -> int:
        """The values in `value`, each shared one as often as it is shared."""
        nonlocal total
        if isinstance(value, torch.Tensor):
            if id(value) not in sizes:
                needed = math.prod(value.shape) * value.element_size()
                if value.layout is not torch.strided or needed > value.untyped_storage().nbytes():
                    raise UserError(
                        f"{path}: refused: a tensor of shape {shown(tuple(value.shape))} without its numbers"
                    )
                total += needed
                sizes[id(value)] = 1
            return 1
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return 1
        known = sizes.get(id(value))
        if known is None:
            sizes[id(value)] = 0
            known = sizes[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        elif known == 0:
            raise UserError(f"{path}: refused: a container that is in itself")
        return known

    if count(value) > MOST_VALUES:
        raise UserError(f"{path}: refused: more than {MOST_VALUES:,} values, each shared one as often as it is shared")
    if total > 2 * path.stat().st_size:  # tied tensors share their numbers
        raise UserError(f"{path}: refused: its tensors share their numbers too often")
