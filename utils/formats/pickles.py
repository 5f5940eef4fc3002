"""Read pickles of torch, without running any code in them. Nothing else in this project reads pickles.

torch.load(weights_only=True) makes tensors, numbers, texts and containers, and refuses everything else. Before that,
the archive is checked: its parts must not be compressed, and the pickle must not name anything by which a small file
could fill the memory, because torch itself would call bytearray(10**12), or encode a text again and again.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import SHOWN, UserError, cut, first_line, is_out_of_memory, shown
from utils.files import open_named

STRUCTURE_BYTES = 64 << 20  # of the pickle itself, which has no elements of tensors
MOST_PARTS = 1 << 18
MOST_VALUES = 1 << 20
NAMES = re.compile(  # that a pickle may name, as pickletools prints them
    r"collections OrderedDict|(__builtin__|builtins) (set|complex)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (Size|device|bool|\w+Storage|b?float\d\w*|u?int\d+|complex\d+)"
)
# The end of an archive: optionally the end record of Zip64 and its locator, then the end record without a comment.
END64, LOCATOR, END = struct.Struct("<4s36xQQ"), struct.Struct("<4s4xQ4x"), struct.Struct("<4s8xIIH")


def read_pickle(path: Path) -> Any:
    """The object that torch.save wrote, with its tensors on the CPU and mapped from the file.

    Raises:
        UserError: reading it would run code, it is damaged, or it is not an archive of torch 1.6 or newer.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings are for the author of the file
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _refusal(path, f"to import {found[1]}" if found else "for more than tensors and containers") from None
    except Exception as error:  # torch raises many types for a damaged archive
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: damaged: {cut(first_line(error), SHOWN)}") from None
    try:
        _check_tensors(path, value)
    except RecursionError:
        raise UserError(f"{path}: refused: nested too deeply") from None
    return value


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"{path}: refused: this pickle asks {what}, and unpickling can run any code; none of it was run")


def _check_archive(path: Path) -> None:
    """Raises UserError unless the file is an archive of torch that needs no more memory than its size on disk."""
    try:
        with open_named(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"PK\x03\x04":
                raise UserError(
                    f"{path}: not an archive of torch: pickles of torch before 1.6 or of other programs are not read"
                )
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            _check_parts(path, parts, size)
            if not _has_one_directory(file, size):
                raise UserError(f"{path}: refused: another program may find other parts in it than torch does")
            for part in parts:
                if part.filename.lower().endswith("data.pkl"):  # torch ignores case when it looks for this part
                    _check_names(path, _content(file, part))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def _check_parts(path: Path, parts: list[zipfile.ZipInfo], size: int) -> None:
    """Raises UserError if the parts of an archive of `size` bytes are compressed or together larger than it."""
    if len(parts) > MOST_PARTS or sum(part.file_size for part in parts) > size:
        raise UserError(f"{path}: refused: its parts are larger than the file")
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: refused: {shown(part.filename)} is compressed, which torch.save never does")
        if part.filename.lower().endswith("data.pkl") and part.file_size > STRUCTURE_BYTES:
            raise UserError(f"{path}: refused: {part.file_size:,} bytes that are not the elements of tensors")


def _has_one_directory(file: IO[bytes], size: int) -> bool:
    """Whether the directory that the end record of an archive points to is the one directly before that record.

    zipfile reads the directory directly before the end record, torch the one that it points to. In a file with two
    directories, torch would read parts that have not been checked.
    """
    file.seek(size - END.size)
    magic, length, start, comment = END.unpack(file.read())
    end = size - END.size
    if end >= LOCATOR.size + END64.size:
        file.seek(end - LOCATOR.size)
        locator, place = LOCATOR.unpack(file.read(LOCATOR.size))
        if locator == b"PK\x06\x07":
            end -= LOCATOR.size + END64.size
            file.seek(end)
            magic64, length, start = END64.unpack(file.read(END64.size))
            if magic64 != b"PK\x06\x06" or place != end:
                return False
    return bool(magic == b"PK\x05\x06" and not comment and start + length == end)


def _content(file: IO[bytes], part: zipfile.ZipInfo) -> bytes:
    """The content of a stored part; its checksum is not compared, because torch.save can leave it out."""
    file.seek(part.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(part.file_size)


def _check_names(path: Path, structure: bytes) -> None:
    """Raises UserError if a pickle names anything that is not in NAMES. The pickle is parsed, not run."""
    for opcode, argument, _ in pickletools.genops(structure):
        if opcode.name == "GLOBAL" and not NAMES.fullmatch(name := str(argument)):
            raise _refusal(path, f"to import {shown(name.replace(' ', '.'))[1:-1]}")


def _check_tensors(path: Path, value: Any) -> None:
    """Raises UserError if tensors have more elements than the file stores, or containers repeat values too often."""
    total, counts = 0, {}  # bytes of all tensors; id of a value -> number of values in it, 0 while counting

    def count(value: Any) -> int:
        """The number of values in `value`; a shared one counts each time."""
        nonlocal total
        if isinstance(value, torch.Tensor):
            if id(value) not in counts:
                needed = math.prod(value.shape) * value.element_size()
                if value.layout is not torch.strided or needed > value.untyped_storage().nbytes():
                    raise UserError(
                        f"{path}: refused: a tensor of shape {shown(tuple(value.shape))} without its elements"
                    )
                total += needed
                counts[id(value)] = 1
            return 1
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return 1
        known = counts.get(id(value))
        if known is None:
            counts[id(value)] = 0
            known = counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        elif known == 0:
            raise UserError(f"{path}: refused: a container that contains itself")
        return known

    if count(value) > MOST_VALUES:
        raise UserError(f"{path}: refused: more than {MOST_VALUES:,} values, each shared one as often as it is shared")
    if total > 2 * path.stat().st_size:  # tied tensors share their storage
        raise UserError(f"{path}: refused: its tensors share their storage too often")
