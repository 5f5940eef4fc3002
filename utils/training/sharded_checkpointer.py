"""Checkpoints of sharded models: each rank writes its own files; rank 0 completes the checkpoint when all are on disk.

The threads that write the files communicate through the store (utils/machine/board.py), so that training goes on: rank
0 announces the folder, and the others report which files they have written or why they could not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.checkpoints.files import write_folder, write_object
from utils.checkpoints.folder import INDEX_FILE
from utils.checkpoints.index import Kind
from utils.checkpoints.optimizer import flatten_optimizer
from utils.checkpoints.shards import index_of, write_shards
from utils.checkpoints.tensors import Outlines
from utils.errors import RankError
from utils.machine.ranks import Ranks, RanksOverError
from utils.training.checkpointer import Checkpointer, HostMemory, reason_of
from utils.training.state import TrainState

if TYPE_CHECKING:  # its torch modules take seconds to import
    from utils.training.sharding import Shards

Tensors = Mapping[str, torch.Tensor]


def make_checkpointer(state: TrainState, *args: Any, **kwargs: Any) -> Checkpointer:
    """The checkpointer for a state, sharded or not; the other arguments are those of `Checkpointer`."""
    if state.shards is None:
        return Checkpointer(*args, **kwargs)
    return ShardedCheckpointer(state.shards, *args, **kwargs)


class ShardedCheckpointer(Checkpointer):
    """The checkpointer of rank 0. At the same steps, the other ranks call `FollowerCheckpointer.save`."""

    def __init__(self, shards: Shards, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shards, self._ranks = shards, shards.ranks
        self._number = 0  # how many times save was called
        self._announced = True  # whether the other ranks have been told the folder of this checkpoint

    def save(self, state: TrainState) -> None:
        self.wait()
        self._number, self._announced = self._number + 1, False
        if state.step == self._written_step:
            self._announce("")
        super().save(state)

    def _announce(self, folder: str) -> None:
        """Tell the other ranks, once per checkpoint, the folder to write to; an empty text: write nothing."""
        if not self._announced:
            self._announced = True
            self._ranks.share(f"checkpoint/{self._number}", folder)

    def _write(self, *arguments: Any) -> None:
        super()._write(*arguments)
        self._announce("")  # if writing failed before there was a folder

    def _write_files(
        self, path: Path, weights: Tensors, optimizer: Tensors, tokenizer: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        def write(folder: Path) -> dict[str, Any]:
            self._announce(str(folder))
            note = write_own_shards(folder, self._ranks, weights, optimizer)
            files: dict[str, Any] = {}
            for rank, of_rank in enumerate(self._ranks.collect(f"shards/{self._number}", note)):
                if "error" in of_rank:
                    raise OSError(0, f"{f'rank {rank}: ' if self._ranks.several else ''}{of_rank['error']}")
                files |= of_rank["files"]
            outlines: dict[Kind, Outlines] = {"model": self._outlines(weights), "optimizer": self._outlines(optimizer)}
            files[INDEX_FILE] = write_object(folder / INDEX_FILE, index_of(self._ranks.world_size, outlines))
            return files

        write_folder(path, write, tokenizer, facts, self._complete)

    def _outlines(self, tensors: Tensors) -> Outlines:
        return {name: (tensor.dtype, self._shards.shape_of(name, tensor)) for name, tensor in tensors.items()}


def write_own_shards(folder: Path, ranks: Ranks, weights: Tensors, optimizer: Tensors) -> dict[str, Any]:
    """Write this rank's shards; return `files`, their entries in the manifest, or `error`, why writing failed."""
    try:
        return {"files": write_shards(folder, ranks.rank, ranks.world_size, {"model": weights, "optimizer": optimizer})}
    except Exception as error:  # reported to rank 0, which then completes no checkpoint
        return {"error": reason_of(error)}


class FollowerCheckpointer:
    """Writes the files of a rank other than 0 for each checkpoint."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._number = ranks, 0
        self._weights, self._optimizer = HostMemory(), HostMemory()
        self._thread: threading.Thread | None = None

    def save(self, state: TrainState) -> None:
        """Wait for the previous write, then copy the state and start to write it; called when rank 0 saves."""
        assert state.shards is not None
        self.wait()
        self._number += 1
        tensors, _ = flatten_optimizer(state.shards, state.optimizer)
        copies = self._weights.copy(state.shards.own), self._optimizer.copy(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(self._number, *copies), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, number: int, weights: Tensors, optimizer: Tensors) -> None:
        try:
            if folder := self._ranks.share(f"checkpoint/{number}", None):
                self._ranks.collect(f"shards/{number}", write_own_shards(Path(folder), self._ranks, weights, optimizer))
        except (RankError, RanksOverError):  # the training loop notices it as well
            pass
