"""Find the files that WEIGHTS on a command line means, and the tensors in them, from the headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.checkpoints.folder import (
    INDEX_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    best_path,
    folder_name,
    list_checkpoints,
)
from utils.checkpoints.header import TensorEntry, read_header
from utils.checkpoints.index import SHARD_PATTERN, locate, read_index
from utils.errors import UserError, nearest
from utils.files import expand_home
from utils.formats.c_files import read_layout
from utils.formats.weight_index import INDEX, read_weight_index
from utils.runs.layout import BASE_WEIGHTS, CHECKPOINTS, EXPORT, RECORD

HUB = "hf:"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
PICKLES = (".pt", ".pth", ".ckpt", ".bin")


class Location(NamedTuple):
    """Where a tensor is stored. `entry` has its type, its shape and the range of its bytes in `file`.

    pieces: files and ranges of bytes, if the rows are in several files; `entry` then counts bytes from 0.
    """

    file: Path
    entry: TensorEntry
    pieces: tuple[tuple[Path, int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[Path, int, int], ...]:
        """(file, begin, end) of its bytes, in their order."""
        return self.pieces or ((self.file, self.entry.begin, self.entry.end),)


@dataclass(frozen=True)
class Stored:
    """The tensors of some weights.

    name: what was asked for. files: their sizes in bytes.
    """

    name: str
    files: dict[Path, int]
    tensors: dict[str, Location]


def find_weights(text: str, runs_dir: Callable[[], Path]) -> list[Path]:
    """The files of the weights that WEIGHTS on a command line names.

    It may be a file; a folder of safetensors, in the format of this project or of Hugging Face; RUN, for its export or
    else its newest checkpoint; RUN:latest, RUN:best or RUN:STEP; or hf:NAME, a folder or a model in the hub's cache.

    Args:
        runs_dir: returns the folder of the runs.

    Raises:
        UserError: there is nothing of this name, or it has only pickles.
    """
    if text.startswith(HUB):
        return _of_folder(_of_hub(text.removeprefix(HUB)))
    path = Path(expand_home(text))
    if path.is_dir() and not (path / RECORD).is_file():
        return _of_folder(path)
    if os.path.lexists(path) and not path.is_dir():
        return [path]
    from utils.runs.find import resolve_run  # the import takes a tenth of a second, which a file does not need
    from utils.runs.origin import split_choice

    name, which = split_choice(text)
    run = resolve_run(name, runs_dir())
    if which == "latest" and not text.endswith(":latest") and (run / EXPORT / WEIGHTS_FILE).is_file():
        return [run / EXPORT / WEIGHTS_FILE]
    shared = [run / BASE_WEIGHTS] if (run / BASE_WEIGHTS).is_file() else []  # beside adapters
    checkpoint = _checkpoint(run, which)
    return _of_folder(checkpoint) if _is_sharded(checkpoint) else [checkpoint / WEIGHTS_FILE, *shared]


def _checkpoint(run: Path, which: str) -> Path:
    """The checkpoint of a run that `which` names: latest, best or a step.

    Raises:
        UserError: there is no such checkpoint.
    """
    found = list_checkpoints(run / CHECKPOINTS)
    if not found:
        raise UserError(f"{run.name} has no weights yet: neither an export nor a checkpoint")
    if which == "latest":
        return found[0][1]
    path = best_path(run / CHECKPOINTS) if which == "best" else run / CHECKPOINTS / folder_name(int(which))
    if path is None or not path.is_dir():
        steps = ", ".join(str(step) for step, _ in reversed(found))
        missing = "best checkpoint" if which == "best" else f"checkpoint of step {which}"
        raise UserError(f"{run.name} has no {missing}; there are: {steps}")
    return path


def _of_hub(name: str) -> Path:
    """The folder of hf:NAME: a local folder of this name, or else the snapshot in the cache of the hub.

    Raises:
        UserError: there is neither.
    """
    if os.path.isdir(path := expand_home(name)):
        return Path(path)
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{HUB}{name}: expected a folder, or OWNER/NAME as on the hub")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        revision = ""
    if not re.fullmatch(r"[0-9a-f]{1,64}", revision) or not (model / "snapshots" / revision).is_dir():
        raise UserError(
            f"{HUB}{name} is not on this machine: it is not a folder, and not in {cache}; "
            f"to download it: python weights.py download {name}"
        )
    return model / "snapshots" / revision


def _of_folder(folder: Path) -> list[Path]:
    """The safetensors in a folder: model.safetensors, or else those that the index names, or else all.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if _is_sharded(folder):
        tensors = read_index(folder, "model").values()
        return [folder / name for name in sorted({rows.file for tensor in tensors for rows in tensor.rows})]
    if (folder / INDEX).is_file():
        return [folder / name for name in read_weight_index(folder / INDEX)]
    names = sorted(os.listdir(folder))
    if found := [folder / name for name in names if name.endswith(".safetensors")]:
        return found
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UserError(
            f"{folder}: no safetensors, but {', '.join(pickles[:3])}: a pickle can run code, so weights of other "
            "programs are read from safetensors only (python weights.py convert turns some of them into runs)"
        )
    raise UserError(f"{folder}: no weights: expected {WEIGHTS_FILE} or {INDEX}{nearest(WEIGHTS_FILE, names)}")


def _is_sharded(folder: Path) -> bool:
    """Whether a folder is a checkpoint of several ranks. Its state file tells it from a model of the hub in shards."""
    return (folder / INDEX_FILE).is_file() and (folder / STATE_FILE).is_file()


def read_stored(name: str, files: Iterable[Path]) -> Stored:
    """The tensors in files of weights, from their headers. If all shards of a checkpoint are given, tensors are whole.

    Raises:
        UserError: a file is damaged, a pickle or of an unknown kind, or two files have a tensor of the same name.
    """
    tensors: dict[str, Location] = {}
    sizes: dict[Path, int] = {}
    files = list(files)
    if len(files) > 1 and _is_sharded(files[0].parent) and all(SHARD_PATTERN.fullmatch(path.name) for path in files):
        return Stored(name, {path: path.stat().st_size for path in files}, dict(_joined(files[0].parent)))
    for path in files:
        for tensor, entry in _entries(path):
            if tensor in tensors:
                raise UserError(f"{path}: {tensor} is in {tensors[tensor].file.name}, too")
            tensors[tensor] = Location(path, entry)
        sizes[path] = path.stat().st_size
    return Stored(name, sizes, tensors)


def _joined(folder: Path) -> Iterator[tuple[str, Location]]:
    """The tensors of a checkpoint in shards, put together from their pieces."""
    for name, (tensor, pieces) in locate(folder, "model").items():
        ranges = tuple((piece.file, piece.entry.begin, piece.entry.end) for piece in pieces)
        bytes = sum(piece.entry.bytes for piece in pieces)
        first = pieces[0].file if pieces else folder / INDEX_FILE
        yield name, Location(first, TensorEntry(tensor.dtype, tensor.shape, 0, bytes), ranges)


def _entries(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    if path.suffix == ".safetensors":
        yield from read_header(path, named=True).tensors.items()
    elif (layout := read_layout(path)) is not None:
        yield from layout.tensors.items()
    else:
        raise UserError(
            f"{path}: expected safetensors, or a model of llm.c or llama2.c; python weights.py convert reads ckpt.pt "
            "and model.pt, too"
        )
