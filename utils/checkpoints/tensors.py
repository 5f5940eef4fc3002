"""Tensors in safetensors files: written straight from memory, mapped, or read by several threads.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.checkpoints.folder import CheckpointError, write_parts
from utils.checkpoints.header import TensorEntry, header_of
from utils.crc32 import READ_BYTES, crc32, joined
from utils.files import open_named, open_regular

READERS = 2  # threads; most of their time goes into new pages of memory, see docs/LOG.md
PART_BYTES = 1 << 23  # that a thread reads at a time
AHEAD_BYTES = 1 << 25  # that are read before they are asked for

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file straight from the memory of the tensors; returns its entry in the manifest.

    The library's own writer first copies every tensor into a bytes object: half the speed, twice the memory
    (docs/LOG.md).
    """
    outlines = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return write_stream(path, outlines, lambda name: [tensors[name]])


Outlines = Mapping[str, tuple[torch.dtype, torch.Size]]  # types and shapes of tensors, by their names


def stream_order(outlines: Outlines) -> list[str]:
    """The names of tensors in the order of their bytes in a file.

    Larger items first, as the library does: then each tensor is aligned to its own item size.
    """
    return sorted(outlines, key=lambda name: (-outlines[name][0].itemsize, name))


def write_stream(
    path: Path,
    outlines: Outlines,
    pieces: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file of tensors that need not be in memory together; returns its entry in the manifest.

    Args:
        pieces: gives the numbers of a tensor, in host memory; asked for each in `stream_order`.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in stream_order(outlines):
        dtype, shape = outlines[name]
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
        for name in stream_order(outlines):
            for piece in pieces(name):
                yield _memory(piece)

    return write_parts(path, parts())


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def map_tensors(path: Path, named: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of the file in memory; writing to them does not change it.

    Nothing is copied: filling a gigabyte of new memory takes longer than reading it from a disk.

    Args:
        named: a person named the file, or a hub's cache has it, so a link may lead anywhere.

    Raises:
        CheckpointError: it is not a safetensors file, or a tensor reaches beyond its end.
    """
    with _one_error(path, "not a safetensors file: "), open_named(path) if named else open_regular(path) as file:
        return _mapped(file, header_of(file).tensors)


Tensors = Iterator[tuple[str, torch.Tensor]]
Read = tuple[str, torch.Tensor, list[tuple[int, Future[int]]]]  # a tensor, and the length and checksum of its parts


@contextlib.contextmanager
def open_tensors(path: Path, *, expected: str | None = None) -> Iterator[Tensors]:
    """The tensors of a safetensors file in the order of their bytes, each in memory of its own.

    Several threads begin to read at once and stay a little ahead of the caller. What the caller does not keep is freed,
    so a large file needs the memory of its largest tensor, or of AHEAD_BYTES.

    Args:
        expected: the CRC-32 of the whole file, if it is known.

    Raises:
        CheckpointError: it is not a safetensors file; or, after the last tensor, has another checksum.
    """
    with contextlib.ExitStack() as stack:
        with _one_error(path, "not a safetensors file: "):
            file = stack.enter_context(open_regular(path))
            pool = stack.enter_context(ThreadPoolExecutor(READERS))
            entries = header_of(file).tensors
            position = min((entry.begin for entry in entries.values()), default=os.fstat(file.fileno()).st_size)
            file.seek(0)
            checksum = crc32(file.read(position))
            reads = _reads_ahead(pool, file.fileno(), entries, check=expected is not None)
            reads = itertools.chain(list(itertools.islice(reads, 1)), reads)  # begins to read
        yield _filled(path, reads, checksum, expected)


def _filled(path: Path, reads: Iterator[Read], checksum: int, expected: str | None) -> Tensors:
    """The tensors that are being read, each once it has its values; `checksum` is that of what comes before them."""
    with _one_error(path, "not a safetensors file: "):
        for name, tensor, parts in reads:
            for length, part in parts:
                checksum = joined(checksum, part.result(), length)
            yield name, tensor
        if expected is not None and f"{checksum:08x}" != expected:
            raise CheckpointError(f"{path}: damaged: its CRC-32 is {checksum:08x}, not {expected}")


def _reads_ahead(
    pool: ThreadPoolExecutor, handle: int, entries: Mapping[str, TensorEntry], check: bool
) -> Iterator[Read]:
    """Tensors that threads are filling, with as many of the next ones as fit into AHEAD_BYTES."""
    begun: deque[Read] = deque()
    ahead = 0
    for name, entry in entries.items():
        while begun and ahead + entry.bytes > AHEAD_BYTES:
            ahead -= sum(length for length, _ in begun[0][2])
            yield begun.popleft()
        tensor = torch.empty(entry.shape, dtype=_dtype(name, entry))
        memory = _memory(tensor)
        parts = []
        for start in range(0, len(memory), PART_BYTES):
            part = memory[start : start + PART_BYTES]
            parts.append((len(part), pool.submit(_read_part, handle, part, entry.begin + start, check)))
        ahead += len(memory)
        begun.append((name, tensor, parts))
    yield from begun


def _read_part(handle: int, memory: memoryview, place: int, check: bool) -> int:
    """Fill memory with the bytes of a file from a place on; returns their CRC-32, or 0 without a check."""
    checksum = done = 0
    while done < len(memory):
        chunk = memory[done : done + READ_BYTES]
        count = os.preadv(handle, [chunk], place + done)
        if not count:
            raise ValueError("it became shorter while it was read")
        if check:  # while the bytes are in the caches
            checksum = crc32(chunk[:count], checksum)
        done += count
    return checksum


def map_entries(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors at known places of a file that a person named, as views of it (see `map_tensors`).

    Raises:
        CheckpointError: it cannot be read, or is shorter.
    """
    with _one_error(path), open_named(path) as file:
        return _mapped(file, entries)


@contextlib.contextmanager
def _one_error(path: Path, prefix: str = "") -> Iterator[None]:
    """What goes wrong with a file becomes a CheckpointError; `prefix`: before what is wrong with its contents."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {prefix}{error}") from None


def _mapped(file: BinaryIO, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _view(memory, name, entry) for name, entry in entries.items()}


def _view(memory: mmap.mmap, name: str, entry: TensorEntry) -> torch.Tensor:
    """A tensor of a file that is mapped into memory, at whatever address it lies; it keeps the mapping alive."""
    dtype = _dtype(name, entry)
    if not entry.elements:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=entry.elements, offset=entry.begin).view(entry.shape)


def _dtype(name: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ValueError(f"{name}: {entry.dtype} is not read here")
    return DTYPES[entry.dtype]
