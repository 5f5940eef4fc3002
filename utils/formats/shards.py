"""Safetensors in one or several files, read and written one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from utils.checkpoints.folder import CheckpointError
from utils.checkpoints.header import read_header
from utils.checkpoints.tensors import map_tensors, write_stream
from utils.files import open_regular, write_json
from utils.formats.foreign_files import ForeignConfigError, boundary
from utils.formats.table import FormatError, Shape
from utils.formats.weight_index import INDEX, read_weight_index

WEIGHTS = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LOADABLE = {"F64", "F32", "F16", "BF16"}


class StoredTensor(NamedTuple):
    """The file, shape and type of a tensor."""

    file: Path
    shape: Shape
    dtype: str  # as safetensors names it


class Shards:
    """The tensors of a folder by name; each is read from its file when it is accessed.

    Args:
        folder: with model.safetensors, or with shards and their index.

    Raises:
        FormatError: there are no weights, a pickle instead, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}
        for path, names in self._files():
            self._add(path, names)

    def _files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Each file, and the tensors that the index expects in it. As in transformers, a single file has priority."""
        if (self.folder / WEIGHTS).is_file():
            yield self.folder / WEIGHTS, None
        elif (self.folder / INDEX).is_file():
            try:
                of_file = read_weight_index(self.folder / INDEX)
            except ForeignConfigError as error:
                raise FormatError(str(error)) from None
            for name, tensors in of_file.items():
                yield self.folder / name, tensors
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
            header = read_header(path, named=True)
        except CheckpointError as error:
            raise FormatError(str(error)) from None
        if missing := (expected or set()) - header.tensors.keys():
            raise FormatError(f"{path}: {min(missing)} is missing, which {INDEX} names")
        if twice := self.tensors.keys() & header.tensors.keys():
            raise FormatError(f"{path}: {min(twice)} is in {self.tensors[min(twice)].file.name}, too")
        self.tensors |= {name: StoredTensor(path, entry.shape, entry.dtype) for name, entry in header.tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file.

        Raises:
            FormatError: the file is damaged.
        """
        stored = self.tensors[name]
        if stored.file not in self._mapped:
            try:
                self._mapped[stored.file] = map_tensors(stored.file, named=True)
            except CheckpointError as error:
                raise FormatError(str(error)) from None
        return self._mapped[stored.file][name]

    @property
    def dtypes(self) -> set[str]:
        """The types of the tensors, as safetensors names them."""
        return {stored.dtype for stored in self.tensors.values()}

    @property
    def files(self) -> list[Path]:
        """The files that have tensors, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})


def check_regular(path: Path) -> None:
    """Raises FormatError unless the file can be opened without a link that leads out of the folder of the model."""
    try:
        open_regular(path, boundary(path.parent)).close()
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


class Entry(NamedTuple):
    """A tensor to write; `make` is called when its turn comes."""

    name: str
    shape: Shape
    make: Callable[[], torch.Tensor]


def write_shards(folder: Path, entries: Sequence[Entry], dtype: torch.dtype, shard_bytes: int) -> list[Path]:
    """Write tensors in their order, into one file, or into several with an index.

    Args:
        dtype: of all tensors in the files.
        shard_bytes: largest size of one file, unless a single tensor is larger.

    Returns:
        The files that have tensors.
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
        _write(folder / name, group, dtype)
    if len(groups) > 1:
        mapping = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(size_of.values())}, "weight_map": mapping})
    return [folder / name for name in names]


def _write(path: Path, entries: Sequence[Entry], dtype: torch.dtype) -> None:
    """Write a safetensors file, one tensor at a time."""
    entry_of = {entry.name: entry for entry in entries}

    def made(name: str) -> list[torch.Tensor]:
        tensor = entry_of[name].make().detach().to("cpu", dtype).contiguous()
        assert tuple(tensor.shape) == entry_of[name].shape
        return [tensor]

    outlines = {name: (dtype, torch.Size(entry.shape)) for name, entry in entry_of.items()}
    write_stream(path, outlines, made, {"format": "pt"})
