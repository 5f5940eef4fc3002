"""The header of a safetensors file: its tensors and their places. Read without torch, and validated as untrusted input.

A file consists of 8 bytes with the length of the header, little-endian; the header, a JSON object; and the bytes of the
tensors, one after the other, without gaps [https://github.com/huggingface/safetensors#format].
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from utils.checkpoints.folder import CheckpointError
from utils.errors import SHOWN, cut, shown
from utils.files import open_named, open_regular

HEADER_BYTES = 100_000_000  # limit set by the format
HEADER_VALUES = 4_000_000  # limit for numbers, lists and objects, which take more memory than their text
MOST_DIMENSIONS = 64
PART_BYTES = 1 << 20  # size of one read
BITS = {  # bits per element; elements of fewer than 8 bits are packed
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorEntry(NamedTuple):
    """One tensor of a file.

    begin, end: offsets of its bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The tensors of a safetensors file by name, in the order of their bytes, and the metadata of its writer."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path, named: bool = False) -> Header:
    """Read the header of a safetensors file, and check that it describes the file to the last byte.

    Args:
        named: whether the user named the file, so that links may lead anywhere.

    Raises:
        CheckpointError: the file cannot be read, or is not a safetensors file.
    """
    try:
        with open_named(path) if named else open_regular(path) as file:
            return header_of(file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def tensors_sha256(path: Path) -> str:
    """The SHA-256 of the names, types, shapes and bytes of all tensors, in hexadecimal digits.

    It does not depend on the metadata in the header, or on the formatting of the header.

    Raises:
        CheckpointError: the file cannot be read, or is not a safetensors file.
    """
    tensors = read_header(path).tensors
    outlines = [(name, entry.dtype, entry.shape) for name, entry in tensors.items()]
    digest = hashlib.sha256(json.dumps(outlines).encode())
    try:
        with open_regular(path) as file:
            file.seek(min((entry.begin for entry in tensors.values()), default=0))
            while part := file.read(PART_BYTES):
                digest.update(part)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def header_of(file: BinaryIO) -> Header:
    """Parse the header of an open file. No memory is allocated for sizes that the header merely claims.

    Raises:
        ValueError: the header is invalid; the message says why.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length + 8 > size:
        raise ValueError("the header is longer than the file")
    if length > HEADER_BYTES:
        raise ValueError(f"the header has {length:,} bytes, more than the {HEADER_BYTES:,} that the format allows")
    text = file.read(length)
    if sum(map(text.count, (b",", b"[", b"{"))) > HEADER_VALUES:
        raise ValueError("the header has more values than any model needs")
    try:
        header = json.loads(text, object_pairs_hook=_different_names)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: char {error.pos} of the header") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    entries = {name: _entry(name, entry, 8 + length, size) for name, entry in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    _check_cover(ordered, 8 + length, size)
    return Header(dict(ordered), metadata)


def _different_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{cut(twice, SHOWN)} is in the header twice")
    return found


def _entry(name: str, entry: Any, start: int, size: int) -> TensorEntry:
    """Parse one entry of the header.

    Args:
        start: the offset in the file from which `data_offsets` count.
        size: the size of the file in bytes.

    Raises:
        ValueError: the entry is invalid; the message says why.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{cut(name, SHOWN)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{cut(name, SHOWN)}: unknown dtype {shown(dtype)}")
    if not _is_list_of_sizes(shape):
        raise ValueError(f"{cut(name, SHOWN)}: shape: expected at most {MOST_DIMENSIONS} sizes, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(number) is int for number in offsets):
        raise ValueError(f"{cut(name, SHOWN)}: data_offsets: expected two numbers, got {shown(offsets)}")
    if not 0 <= offsets[0] <= offsets[1] <= size - start:
        raise ValueError(f"{cut(name, SHOWN)} lies outside the file")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{cut(name, SHOWN)}: {dtype} of shape {shown(tuple(shape))} needs {shown(-(-bits // 8))} bytes, "
            f"it has {shown(offsets[1] - offsets[0])}"
        )
    if not is_shape(shape):
        raise ValueError(f"{cut(name, SHOWN)}: shape {shown(shape)}: too large, even for an empty tensor")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def is_shape(value: Any) -> bool:
    """Whether torch can create a tensor of these sizes; even if one is 0, the others must fit into its strides."""
    return _is_list_of_sizes(value) and math.prod(size or 1 for size in value) < 2**63


def _is_list_of_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(entries: Iterable[tuple[str, TensorEntry]], start: int, size: int) -> None:
    """Raise ValueError unless the tensors, in their order, cover the file from `start` to its end."""
    end, before = start, ""
    for name, entry in entries:
        if entry.begin < end:
            raise ValueError(f"{cut(name, SHOWN)} overlaps {cut(before, SHOWN)}")
        if entry.begin > end:
            raise ValueError(f"{entry.begin - end:,} bytes before {cut(name, SHOWN)} belong to no tensor")
        end, before = entry.end, name
    if end != size:
        raise ValueError(f"the last {size - end:,} bytes of the file belong to no tensor")
