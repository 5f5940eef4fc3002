"""Safetensors in one or several files, read and written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoints.files import DTYPE_NAMES, DTYPES
from utils.errors import shown
from utils.files import regular_fd, write_json
from utils.formats.foreign_config import read_bounded_json
from utils.formats.table import FormatError, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LOADABLE = {"F64", "F32", "F16", "BF16"}
HEADER_BYTES = 32 << 20  # far more than any model needs


class Stored(NamedTuple):
    """Where a tensor is, and what it is."""

    file: Path
    shape: Shape
    dtype: torch.dtype


class Shards:
    """The tensors of a folder, by name. Their numbers are read from the disk when they are asked for.

    Args:
        folder: with model.safetensors, or with shards and their index.

    Raises:
        FormatError: no weights, a pickle instead, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path, names in self._files():
            self._add(path, names)

    def _files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Each file, and the tensors that the index expects in it."""
        if (self.folder / INDEX).is_file():
            of_file: dict[str, set[str]] = {}
            mapping = read_bounded_json(self.folder / INDEX).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise FormatError(f"{self.folder / INDEX}: weight_map: expected an object that names files")
            for tensor, name in mapping.items():
                if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                    raise FormatError(
                        f"{self.folder / INDEX}: weight_map: expected the name of a .safetensors file beside it, got "
                        f"{shown(name)}"
                    )
                of_file.setdefault(name, set()).add(tensor)
            for name in sorted(of_file):
                yield self.folder / name, of_file[name]
        elif (self.folder / WEIGHTS).is_file():
            yield self.folder / WEIGHTS, None
        elif pickle := next((name for name in PICKLES if (self.folder / name).exists()), None):
            raise FormatError(
                f"{self.folder}: {pickle} is a pickle, which can run any code when it is read, so it is refused; "
                f"only safetensors are read, and there is no {WEIGHTS}"
            )
        else:
            raise FormatError(f"{self.folder}: no weights: expected {WEIGHTS} or {INDEX}")

    def _add(self, path: Path, expected: set[str] | None) -> None:
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118: not a mapping
                    part = file.get_slice(name)
                    if part.get_dtype() not in LOADABLE:
                        if expected is None or name in expected:
                            self.tensors[name] = Stored(path, tuple(part.get_shape()), torch.uint8)
                        continue
                    self.tensors[name] = Stored(path, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                missing = (expected or set()) - set(file.keys())
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: damaged: {error}") from None
        if missing:
            raise FormatError(f"{path}: {min(missing)} is missing, which {INDEX} names")

    def get(self, name: str) -> torch.Tensor:
        """A tensor, in the memory of its file where it can be.

        Raises:
            FormatError: the file is damaged, or its numbers are none of a model.
        """
        stored = self.tensors[name]
        if stored.dtype == torch.uint8:
            raise FormatError(f"{stored.file}: {name}: expected {', '.join(sorted(LOADABLE))}, got another type")
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{stored.file}: damaged: {error}") from None

    @property
    def files(self) -> list[Path]:
        """The files with tensors, in order."""
        return sorted({stored.file for stored in self.tensors.values()})

    @property
    def dtype(self) -> torch.dtype:
        """That of most numbers."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])


def check_regular(path: Path) -> None:
    """Raises FormatError unless the file can be opened, has a header of a possible size and lies in its folder.

    Files in the cache of the hub are links into another folder of their repository.
    """
    inside = path.parent.parent.parent if path.parent.parent.name == "snapshots" else path.parent
    try:
        with os.fdopen(regular_fd(path, inside), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    if length > min(size - 8, HEADER_BYTES):
        raise FormatError(f"{path}: damaged: its header is said to have {length:,} bytes")


class Entry(NamedTuple):
    """A tensor to write: its numbers are made when their turn comes."""

    name: str
    shape: Shape
    make: Callable[[], torch.Tensor]


def write_shards(folder: Path, entries: Sequence[Entry], dtype: torch.dtype, shard_bytes: int) -> list[Path]:
    """Write tensors in their order, into one file or several with an index.

    Args:
        dtype: of all tensors in the files.
        shard_bytes: of one file at most, unless one tensor is larger.

    Returns:
        The files with tensors.
    """
    size_of = {entry.name: torch.Size(entry.shape).numel() * dtype.itemsize for entry in entries}
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(size_of[other.name] for other in groups[-1]) + size_of[entry.name] > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_tensors(folder / name, group, dtype)
    if len(groups) > 1:
        mapping = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(size_of.values())}, "weight_map": mapping})
    return [folder / name for name in names]


def write_tensors(path: Path, entries: Sequence[Entry], dtype: torch.dtype) -> None:
    """Write a safetensors file, one tensor at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + torch.Size(entry.shape).numel() * dtype.itemsize
        header[entry.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            tensor = entry.make().detach().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
