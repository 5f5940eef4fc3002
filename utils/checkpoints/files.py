"""Checkpoints: everything that a resume needs, as safetensors and JSON; complete or absent, never half written.

    step_000500/model.safetensors       the weights, tied ones once
                optimizer.safetensors   the tensors of the optimizer's state, `parameter/key`
                tokenizer.json          without which the weights mean nothing
                state.json              the rest: step, random states, best loss, offsets of the logs, ...
                manifest.json           size and CRC-32 of each of these, written last
    base.safetensors                    of a run that trains adapters: its frozen weights, which no checkpoint repeats

A checkpoint is written beside its place, synced, and renamed into it. Reading checks the manifest, so a
flipped bit or a lost page is found before it is trained on.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.checkpoints.folder import (
    BASE_FILE,
    CHUNK_BYTES,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    check_file,
    read_manifest,
    read_object,
)
from utils.checkpoints.header import TensorEntry, header_of
from utils.crc32 import READ_BYTES, crc32, joined
from utils.files import open_named, open_regular
from utils.folders import remove, sync_folder

READERS = 2  # threads; most of their time goes into new pages of memory, see docs/LOG.md
PART_BYTES = 1 << 23  # that a thread reads at a time
AHEAD_BYTES = 1 << 25  # that are read before they are asked for

# https://github.com/huggingface/safetensors#format
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


@dataclass(frozen=True)
class Checkpoint:
    """What `read_checkpoint` returns; the tensors are in host memory, mapped from the files."""

    path: Path
    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer_tensors: Mapping[str, torch.Tensor]
    tokenizer: dict[str, Any]  # as its JSON form
    state: dict[str, Any]
    base: Mapping[str, Any] | None = None  # the entry of its BASE_FILE in the manifest, if it has one


def write_checkpoint(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    optimizer_tensors: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, Any],
    state: Mapping[str, Any],
    before_manifest: Callable[[], None] = lambda: None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, replacing a damaged one of the same step.

    Args:
        path: becomes the checkpoint.
        weights, optimizer_tensors: in host memory, contiguous.
        before_manifest: called when everything but the manifest is on disk, to sync the logs.
        base: what `write_base` returned, if `weights` leaves the frozen ones out.

    Raises:
        OSError: the disk is full, gone or read-only; nothing is left behind.
    """

    def write(folder: Path) -> dict[str, Any]:
        return {
            WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, weights),
            OPTIMIZER_FILE: write_tensors(folder / OPTIMIZER_FILE, optimizer_tensors),
        }

    write_folder(path, write, tokenizer, state, before_manifest, base)


def write_folder(
    path: Path,
    write: Callable[[Path], Mapping[str, Any]],
    tokenizer: Mapping[str, Any],
    state: Mapping[str, Any],
    before_manifest: Callable[[], None] = lambda: None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """`write_checkpoint`, with tensors in files that `write` writes and syncs in a folder; it returns their entries."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        manifest = {
            **write(temporary),
            TOKENIZER_FILE: write_object(temporary / TOKENIZER_FILE, tokenizer),
            STATE_FILE: write_object(temporary / STATE_FILE, state),
        }
        if base is not None:
            manifest[BASE_FILE] = dict(base)
        before_manifest()
        write_object(temporary / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": manifest})
        sync_folder(temporary)
        remove(path)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        remove(temporary)
        raise


def write_base(folder: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the frozen weights that the checkpoints in `folder` share; returns their entry in a manifest.

    Raises:
        OSError: the disk is full, gone or read-only; nothing is left behind.
    """
    path = folder / Path(BASE_FILE).name
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        entry = write_tensors(temporary, weights)
        temporary.replace(path)
        sync_folder(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return entry


def write_object(path: Path, value: Any) -> dict[str, Any]:
    """Write and sync a JSON file; returns its entry in the manifest."""
    return _write(path, [_json_bytes(value)])


def _json_bytes(value: Any) -> memoryview:
    return memoryview((json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _write(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Write and sync a file; returns its entry in the manifest."""
    checksum = size = 0
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                checksum = crc32(chunk, checksum)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"size": size, "crc32": f"{checksum:08x}"}


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

    return _write(path, parts())


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_checkpoint(path: Path, *, checked: bool = False) -> Checkpoint:
    """Read a checkpoint and check every byte of it against its manifest.

    Args:
        checked: another rank has checked it just now.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    manifest = read_manifest(path)
    if not checked:
        with ThreadPoolExecutor(max_workers=2) as pool:
            for _ in pool.map(lambda name: check_file(path / name, *manifest[name]), manifest):
                pass
    state = read_object(path / STATE_FILE)
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path / STATE_FILE}: names no step")
    weights, optimizer = _tensors_of(path, manifest)
    return Checkpoint(
        path=path,
        step=state["step"],
        weights=weights,
        optimizer_tensors=optimizer,
        tokenizer=read_object(path / TOKENIZER_FILE),
        state=state,
        base={"size": manifest[BASE_FILE][0], "crc32": manifest[BASE_FILE][1]} if BASE_FILE in manifest else None,
    )


def _tensors_of(
    path: Path, manifest: Mapping[str, Any]
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The weights and the tensors of the optimizer's state."""
    if INDEX_FILE in manifest:
        from utils.checkpoints.shards import JoinedTensors

        return JoinedTensors(path, "model"), JoinedTensors(path, "optimizer")
    base = map_tensors(path / BASE_FILE) if BASE_FILE in manifest else {}
    return {**base, **map_tensors(path / WEIGHTS_FILE)}, map_tensors(path / OPTIMIZER_FILE)


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


def weight_differences(weights: Mapping[str, torch.Tensor | TensorEntry], model: torch.nn.Module) -> str:
    """In words, how names and shapes of weights differ from those of the model; empty if they do not."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes = getattr(weights, "shapes", None)  # of tensors in shards, which are joined when they are asked for
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()} if shapes is None else dict(shapes)
    differences = [
        *(f"{key} is missing" for key in expected if key not in found),
        *(f"{key} is unexpected" for key in found if key not in expected),
        *(
            f"{key} has shape {found[key]}, expected {expected[key]}"
            for key in expected
            if key in found and found[key] != expected[key]
        ),
    ]
    more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more
