"""Sharded checkpoints: each rank writes its rows of every tensor, and any number of ranks can read them.

step_000500/model-00001-of-00002.safetensors        the rows of the weights that rank 0 of 2 has
            optimizer-00001-of-00002.safetensors    its rows of the optimizer's state
            index.json                              which rows of which tensor are in which file
            tokenizer.json, state.json, manifest.json, as in any checkpoint
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.folder import CheckpointError
from utils.checkpoints.index import KINDS, Kind, Piece, Sharded, index_json, locate, shard_name, sharded
from utils.checkpoints.tensors import DTYPE_NAMES, DTYPES, Outlines, map_tensors, write_tensors


class JoinedTensors(Mapping[str, torch.Tensor]):
    """The tensors of one kind in a sharded checkpoint. Their rows are mapped from the files and joined on access.

    shapes: the shapes of the whole tensors, by name.

    Raises:
        CheckpointError: the index or a file is damaged.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Sharded, tuple[Piece, ...]]] = locate(folder, kind)
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}
        self.shapes = {name: torch.Size(tensor.shape) for name, (tensor, _) in self._places.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor, _ = self._places[name]
        return self.rows(name, 0, tensor.shape[0] if tensor.shape else 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows of a tensor: a view of the file if one contains them all, otherwise a copy. No other rows are read."""
        tensor, pieces = self._places[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{self._folder}: {name}: dtype {tensor.dtype} is not supported")
        if not tensor.shape:
            return self._mapping(pieces[0].file)[name]
        parts = [
            self._mapping(piece.file)[name][max(first - piece.first, 0) : max(end - piece.first, 0)]
            for piece in pieces
            if piece.first < end and first < piece.end
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty((0, *tensor.shape[1:]), dtype=DTYPES[tensor.dtype])

    def _mapping(self, file: Path) -> dict[str, torch.Tensor]:
        if file not in self._mapped:
            self._mapped[file] = map_tensors(file)
        return self._mapped[file]


def rows_in(tensors: Mapping[str, torch.Tensor], name: str, first: int, end: int) -> torch.Tensor:
    """Rows of a tensor; those of a sharded checkpoint are read by `JoinedTensors.rows`."""
    return tensors.rows(name, first, end) if isinstance(tensors, JoinedTensors) else tensors[name][first:end]


def write_shards(
    folder: Path, rank: int, world_size: int, tensors: Mapping[Kind, Mapping[str, torch.Tensor]]
) -> dict[str, Any]:
    """Write and sync the shards of a rank; return the entries of its files for the manifest.

    Args:
        tensors: the rows of this rank, in host memory. Tensors without rows are left out and, on ranks other than 0,
            tensors without dimensions.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    return {
        (name := shard_name(kind, rank, world_size)): write_tensors(
            folder / name,
            {key: tensor for key, tensor in tensors[kind].items() if (len(tensor) if tensor.dim() else rank == 0)},
        )
        for kind in KINDS
    }


def index_of(world_size: int, tensors: Mapping[Kind, Outlines]) -> dict[str, Any]:
    """The index of a sharded checkpoint, from the types and shapes of the whole tensors."""
    return index_json(
        world_size,
        {
            kind: {
                name: sharded(kind, DTYPE_NAMES[dtype], tuple(shape), world_size)
                for name, (dtype, shape) in tensors[kind].items()
            }
            for kind in KINDS
        },
    )
