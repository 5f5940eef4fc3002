"""Checkpoints: everything that a resume needs, as safetensors and JSON; complete or absent, never partly written.

    step_000500/model.safetensors       the weights; tied ones are stored once
                optimizer.safetensors   the tensors of the optimizer's state, named `parameter/key`
                tokenizer.json          the tokenizer, without which the weights mean nothing
                state.json              the rest: step, random states, best loss, offsets of the logs, ...
                manifest.json           size and CRC-32 of each of these files, written last
    base.safetensors                    with adapters: the frozen weights, which the checkpoints do not repeat

A checkpoint is written under a temporary name, synced, and renamed. Reading verifies the manifest, so a flipped bit or
a lost page is found before training continues from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.folder import (
    BASE_FILE,
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
    write_parts,
)
from utils.checkpoints.header import TensorEntry
from utils.checkpoints.shards import JoinedTensors
from utils.checkpoints.tensors import map_tensors, write_tensors
from utils.files import JSON_BYTES
from utils.folders import remove, sync_folder


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint. The tensors are in host memory, mapped from the files."""

    path: Path
    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer_tensors: Mapping[str, torch.Tensor]
    tokenizer: dict[str, Any]  # in its JSON form
    state: dict[str, Any]
    base: Mapping[str, Any] | None = None  # the manifest's entry of BASE_FILE, if there is one


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
        path: the folder of the checkpoint.
        weights, optimizer_tensors: contiguous tensors in host memory.
        before_manifest: called when everything but the manifest is on disk, to sync the logs.
        base: the result of `write_base`, if `weights` does not contain the frozen ones.

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
    """Like `write_checkpoint`, but `write(folder)` writes and syncs the tensor files, and returns their entries."""
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
    """Write the frozen weights that the checkpoints in `folder` share; return their entry for the manifests.

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
    """Write and sync a JSON file; return its entry for the manifest.

    Raises:
        ValueError: the file would be too large to be read again.
    """
    content = memoryview((json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    if len(content) > JSON_BYTES:
        raise ValueError(
            f"{path.name} has {len(content) >> 20:,} MiB, and at most {JSON_BYTES >> 20} can be read: "
            "does a callback's state_dict return whole tensors?"
        )
    return write_parts(path, [content])


def read_checkpoint(path: Path, *, checked: bool = False) -> Checkpoint:
    """Read a checkpoint and verify every byte of it against its manifest.

    Args:
        checked: skip the verification, because another rank has just done it.

    Raises:
        CheckpointError: a part of the checkpoint is missing or damaged.
    """
    manifest = read_manifest(path)
    if not checked:
        with ThreadPoolExecutor(max_workers=2) as pool:
            for _ in pool.map(lambda name: check_file(path / name, *manifest[name]), manifest):
                pass
    state = read_object(path / STATE_FILE)
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path / STATE_FILE}: has no step")
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
        return JoinedTensors(path, "model"), JoinedTensors(path, "optimizer")
    base = map_tensors(path / BASE_FILE) if BASE_FILE in manifest else {}
    return {**base, **map_tensors(path / WEIGHTS_FILE)}, map_tensors(path / OPTIMIZER_FILE)


def weight_differences(weights: Mapping[str, torch.Tensor | TensorEntry], model: torch.nn.Module) -> str:
    """Describe how the names and shapes of weights differ from those of the model; empty if they do not."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes = getattr(weights, "shapes", None)  # JoinedTensors: accessing the tensors themselves would read the shards
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
