"""The folders of a run's checkpoints: their names, files, and the checksums that show whether they are intact."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.crc32 import crc32, file_crc32
from utils.errors import UserError
from utils.files import read_json, read_json_or_empty, regular_fd

FORMAT_VERSION = 1
WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
TOKENIZER_FILE, STATE_FILE, MANIFEST_FILE = "tokenizer.json", "state.json", "manifest.json"
EXPORT_CONFIG_FILE = "config.json"  # in an export, beside weights and tokenizer with the names of a checkpoint
INDEX_FILE = "index.json"  # in a sharded checkpoint (utils/checkpoints/index.py)
BASE_FILE = "../base.safetensors"  # frozen weights that all checkpoints of a run share, if their manifests name it
FILES = (OPTIMIZER_FILE, WEIGHTS_FILE, TOKENIZER_FILE, STATE_FILE)  # largest first
FILES_OF_SHARDS = (TOKENIZER_FILE, STATE_FILE, INDEX_FILE)  # in a sharded checkpoint, besides the shards
SHARD = "{kind}-{number:05d}-of-{count:05d}.safetensors"
CHUNK_BYTES = 1 << 24  # size of one write, so that other threads can run in between
FOLDER_PATTERN = re.compile(r"step_(\d{6,})")
CHOICES = ("latest", "best")  # names of checkpoints, besides a step
LATEST_FILE, BEST_FILE = "latest.json", "best.json"  # pointers beside the checkpoints


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another experiment."""


def is_choice(which: str) -> bool:
    """Whether `which` has the form of a checkpoint's name: `latest`, `best` or a step."""
    return which in CHOICES or (which.isascii() and which.isdigit() and len(which) < 19)


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List (step, path) for the checkpoints in `folder`, newest first; their contents are not checked."""
    found = [(FOLDER_PATTERN.fullmatch(path.name), path) for path in folder.glob("step_*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def best_path(folder: Path) -> Path | None:
    """The checkpoint with the best val/loss; None if there is none."""
    step = read_pointer(folder / BEST_FILE).get("step")
    path = folder / folder_name(step) if isinstance(step, int) else None
    return path if path is not None and path.is_dir() else None


def read_pointer(path: Path) -> dict[str, Any]:
    """Read a pointer file; empty if it is missing or damaged."""
    return read_json_or_empty(path)


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Read the manifest of the checkpoint `path`: (size, CRC-32) of each of its files, by name.

    Raises:
        CheckpointError: the checkpoint or its manifest is missing, or the manifest is damaged.
    """
    place = path / MANIFEST_FILE
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        manifest = read_json(place)
        names = _names(manifest["files"])
        files = {name: (manifest["files"][name]["size"], manifest["files"][name]["crc32"]) for name in names}
        version = manifest["format_version"]
        if not all(isinstance(size, int) and size >= 0 for size, _ in files.values()):
            raise ValueError("a size is not a number")
    except FileNotFoundError:
        raise CheckpointError(f"{place}: missing: the checkpoint is not complete") from None
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{place}: damaged") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{place}: format version {version!r}, this workbench reads {FORMAT_VERSION}")
    return files


def _names(files: dict[str, Any]) -> tuple[str, ...]:
    """The files that a checkpoint must have, given the files in its manifest."""
    base = (BASE_FILE,) if BASE_FILE in files else ()
    if INDEX_FILE not in files:
        return (*base, *FILES)
    count = sum(name.startswith("model-") for name in files)
    numbers = range(1, count + 1)
    shards = [SHARD.format(kind=kind, number=n, count=count) for kind in ("optimizer", "model") for n in numbers]
    return (*base, *shards, *FILES_OF_SHARDS)


def write_parts(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Write and sync a file; return its entry for the manifest."""
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


def check_file(path: Path, size: int, expected: str) -> None:
    """Compare a whole file with its entry in the manifest, which also brings it into the page cache.

    Raises:
        CheckpointError: the file is missing, cannot be read, or has another size or checksum.
    """
    try:
        with os.fdopen(regular_fd(path), "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CheckpointError(f"{path}: damaged: {found:,} bytes, the manifest says {size:,}")
            checksum = file_crc32(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if f"{checksum:08x}" != expected:
        raise CheckpointError(f"{path}: damaged: its CRC-32 is {checksum:08x}, the manifest says {expected}")


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or does not contain an object.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, got a {type(value).__name__}")
    return value
