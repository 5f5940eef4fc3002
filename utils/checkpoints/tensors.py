"""Write safetensors files straight from memory, and map them into memory [github.com/huggingface/safetensors]."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.checkpoints.folder import CheckpointError, write_parts
from utils.checkpoints.header import TensorEntry, header_of
from utils.crc32 import joined, part_crc32
from utils.files import open_named, open_regular

READERS = 2  # threads that compute the checksum of a file
PART_BYTES = 1 << 26  # part of a file that one thread reads at a time
ALIGNMENT = 64  # bytes; at other addresses, kernels may sum in another order, which changes the last bits

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


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a safetensors file straight from the memory of the tensors; return its entry for the manifest.

    The library's own writer first copies every tensor into a bytes object, which takes twice the time and twice the
    memory (docs/LOG.md).
    """
    outlines = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return write_stream(path, outlines, lambda name: [tensors[name]], metadata)


Outlines = Mapping[str, tuple[torch.dtype, torch.Size]]  # name -> type and shape of a tensor


def stream_order(outlines: Outlines) -> list[str]:
    """The names of tensors in the order of their bytes in a file.

    Larger item sizes come first, as in the library, so that each tensor is aligned to its own item size.
    """
    return sorted(outlines, key=lambda name: (-outlines[name][0].itemsize, name))


def write_stream(
    path: Path,
    outlines: Outlines,
    pieces: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file of tensors that need not be in memory together; return its entry for the manifest.

    Args:
        pieces: returns the consecutive parts of a tensor, in host memory; called for each tensor in `stream_order`.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in stream_order(outlines):
        dtype, shape = outlines[name]
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)

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
    """Map the tensors of a safetensors file into memory; writing to them does not change the file.

    Nothing is copied, because filling a gigabyte of new memory takes longer than reading it from a disk.

    Args:
        named: whether the user named the file, or it is in the cache of a hub, so that links may lead anywhere.

    Raises:
        CheckpointError: the file cannot be read, or is not a valid safetensors file.
    """
    with _one_error(path, "not a safetensors file: "), open_named(path) if named else open_regular(path) as file:
        return _mapped(file, header_of(file).tensors)


@contextlib.contextmanager
def open_tensors(path: Path, expected: str) -> Iterator[dict[str, torch.Tensor]]:
    """Like `map_tensors`, while threads compute the checksum of the file, which is compared on exit.

    Tensors that are not aligned to ALIGNMENT are copied.

    Args:
        expected: the CRC-32 of the whole file.

    Raises:
        CheckpointError: the file is not a safetensors file or, on exit, has another checksum.
    """
    with contextlib.ExitStack() as stack:
        with _one_error(path, "not a safetensors file: "):
            file = stack.enter_context(open_regular(path))
            pool = ThreadPoolExecutor(READERS)
            stack.callback(pool.shutdown, cancel_futures=True)
            size = os.fstat(file.fileno()).st_size
            lengths = [min(PART_BYTES, size - start) for start in range(0, size, PART_BYTES)]
            parts = [
                pool.submit(part_crc32, file.fileno(), number * PART_BYTES, length)
                for number, length in enumerate(lengths)
            ]
            tensors = _mapped(file, header_of(file).tensors)
        yield {name: _aligned(tensor) for name, tensor in tensors.items()}
        with _one_error(path, "not a safetensors file: "):
            checksum = 0
            for length, part in zip(lengths, parts, strict=True):
                checksum = joined(checksum, part.result(), length)
        if f"{checksum:08x}" != expected:
            raise CheckpointError(f"{path}: damaged: its CRC-32 is {checksum:08x}, not {expected}")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def map_entries(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Map tensors at known places of a file that the user named (see `map_tensors`).

    Raises:
        CheckpointError: the file cannot be read, or is too short.
    """
    with _one_error(path), open_named(path) as file:
        return _mapped(file, entries)


@contextlib.contextmanager
def _one_error(path: Path, prefix: str = "") -> Iterator[None]:
    """Turn OSError and ValueError into a CheckpointError that names the file; `prefix` is for those of its content."""
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
    """A tensor in a mapped file, perhaps unaligned; it keeps the mapping alive."""
    dtype = _dtype(name, entry)
    if not entry.elements:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=entry.elements, offset=entry.begin).view(entry.shape)


def _dtype(name: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {entry.dtype} is not supported")
    return DTYPES[entry.dtype]
