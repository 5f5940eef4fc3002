"""index.json of a sharded checkpoint: which rows of which tensor are in which file. Does not import torch.

    {"world_size": 2,
     "model": {"final_norm.weight": {"dtype": "F32", "shape": [33],
                                     "files": [["model-00001-of-00002.safetensors", 0, 17], [..., 17, 33]]}},
     "optimizer": {...}}

Rows are slices along the first dimension, from `first` up to but excluding `end`. A tensor without dimensions is in one
file, as rows 0 to 1. A file stores its rows under the name of the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from utils.checkpoints.folder import INDEX_FILE, MANIFEST_FILE, SHARD, CheckpointError, read_manifest, read_object
from utils.checkpoints.header import BITS, TensorEntry, is_shape, read_header
from utils.errors import SHOWN, cut

Kind = Literal["model", "optimizer"]
KINDS: tuple[Kind, ...] = ("model", "optimizer")
SHARD_PATTERN = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")


class Rows(NamedTuple):
    """The rows `first` up to `end` of a tensor, and the file that contains them."""

    file: str
    first: int
    end: int


@dataclass(frozen=True)
class Sharded:
    """A tensor whose rows are spread over several files, in order."""

    dtype: str  # the name in safetensors
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]

    def as_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "files": [list(part) for part in self.rows]}


def shard_name(kind: Kind, rank: int, world_size: int) -> str:
    return SHARD.format(kind=kind, number=rank + 1, count=world_size)


def rows_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end) of the rows of a rank, out of `count`; split as by torch.chunk, so the last ranks may have fewer."""
    size = -(-count // world_size)
    return min(rank * size, count), min((rank + 1) * size, count)


def sharded(kind: Kind, dtype: str, shape: tuple[int, ...], world_size: int) -> Sharded:
    """Where each rank writes its rows of a tensor; rank 0 writes tensors without dimensions."""
    if not shape:
        return Sharded(dtype, shape, (Rows(shard_name(kind, 0, world_size), 0, 1),))
    places = (
        Rows(shard_name(kind, rank, world_size), *rows_of(shape[0], rank, world_size)) for rank in range(world_size)
    )
    return Sharded(dtype, shape, tuple(place for place in places if place.end > place.first))


def index_json(world_size: int, tensors: dict[Kind, dict[str, Sharded]]) -> dict[str, Any]:
    """The content of INDEX_FILE."""
    found: dict[str, Any] = {"world_size": world_size}
    return found | {kind: {name: entry.as_json() for name, entry in tensors[kind].items()} for kind in KINDS}


def read_index(folder: Path, kind: Kind) -> dict[str, Sharded]:
    """Read the index entries of one kind in the checkpoint `folder`, by name of the tensor.

    Raises:
        CheckpointError: index or manifest is missing or damaged, or the index names a file that is not in the manifest.
    """
    place, index, manifest = folder / INDEX_FILE, read_object(folder / INDEX_FILE), read_manifest(folder)
    try:
        return {str(name): _sharded(entry, kind, manifest) for name, entry in index[kind].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: damaged ({type(error).__name__}: {cut(str(error), SHOWN)})") from None


def _sharded(entry: Any, kind: Kind, files: Container[str]) -> Sharded:
    """Parse one entry of the index.

    Args:
        files: the names of the files of the checkpoint.

    Raises:
        LookupError, TypeError, ValueError: the entry is malformed, or its rows do not follow each other without gaps.
    """
    if entry["dtype"] not in BITS or not is_shape(entry["shape"]):
        raise ValueError("expected a dtype and a shape")
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    rows = tuple(Rows(*part) for part in entry["files"])
    count, end = shape[0] if shape else 1, 0
    for part in rows:
        match = SHARD_PATTERN.fullmatch(part.file)
        if match is None or match[1] != kind:
            raise ValueError(f"{part.file} is not a file of {kind}")
        if part.file not in files:
            raise ValueError(f"{part.file} is not in {MANIFEST_FILE}")
        if type(part.first) is not int or type(part.end) is not int:
            raise ValueError(f"{part.file}: expected row numbers")
        if part.first != end or not part.first < part.end <= count:
            raise ValueError(f"rows {part.first} to {part.end} do not follow row {end}")
        end = part.end
    if end != count:
        raise ValueError(f"{end} of {count} rows")
    return Sharded(dtype, shape, rows)


class Piece(NamedTuple):
    """The rows `first` up to `end` of a tensor, and their entry in the header of a file."""

    file: Path
    first: int
    end: int
    entry: TensorEntry


def locate(folder: Path, kind: Kind) -> dict[str, tuple[Sharded, tuple[Piece, ...]]]:
    """Find each tensor of one kind in the checkpoint `folder`, and the places of its rows, by name.

    Raises:
        CheckpointError: as for `read_index`, or a file does not contain the rows that the index names.
    """
    index = read_index(folder, kind)
    names = sorted({part.file for entry in index.values() for part in entry.rows})
    headers = {name: read_header(folder / name).tensors for name in names}
    found = {}
    for name, tensor in index.items():
        pieces = []
        for part in tensor.rows:
            entry, shape = headers[part.file].get(name), (part.end - part.first, *tensor.shape[1:])
            if entry is None or entry.dtype != tensor.dtype or entry.shape != (shape if tensor.shape else ()):
                raise CheckpointError(
                    f"{folder / part.file}: rows {part.first:,} to {part.end:,} of {cut(name, SHOWN)} are missing"
                )
            pieces.append(Piece(folder / part.file, part.first, part.end, entry))
        found[name] = tensor, tuple(pieces)
    return found
