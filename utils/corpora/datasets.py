"""Prepared datasets: folders of token shards, made by prepare.py and memory-mapped by training.

    datasets/NAME/
        dataset.json           the contents of the folder; written last, so a folder without it is not a dataset
        tokenizer.json
        train_00000.bin ...    token ids, uint16 or uint32, little-endian; val_00000.bin ...
        train_00000.ends       where each document of the shard ends, in tokens from the shard's start, uint64
        train_00000.origins    origin of each document: index in `sources` and line or row, two uint32
        verified.json          state of each shard when its checksum was last verified; may be missing
        report.json, CARD.md   what was removed, with examples; for people

Each document begins with the end-of-text token and lies in one shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.corpora.records import file_state
from utils.crc32 import crc32, file_crc32
from utils.errors import UserError
from utils.files import open_regular, read_json, read_json_or_empty, write_json

SCHEMA_VERSION = 1
DATASET_JSON, TOKENIZER_JSON, VERIFIED_JSON = "dataset.json", "tokenizer.json", "verified.json"
TYPES = {"uint16": 2, "uint32": 4}  # dtype of token ids -> bytes per id
CHUNK = 1 << 20  # bytes that are written at a time


class DatasetError(UserError):
    """A folder is not a complete prepared dataset."""


@dataclass(frozen=True)
class Shard:
    """One token file of a split.

    crc32, sha256: checksums of the token file. ends_crc32, origins_crc32: those of the files beside it.
    """

    name: str
    tokens: int
    documents: int
    crc32: int
    sha256: str
    ends_crc32: int
    origins_crc32: int


@dataclass(frozen=True)
class Split:
    """The shards of `train` or `val`. bytes: size of the documents' text in UTF-8."""

    shards: Sequence[Shard]
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, as its dataset.json describes it.

    end_of_text: the token that each document begins with.
    dtype: dtype of the token ids: uint16 or uint32.
    sources: one entry for each file that was read; has at least its `path`.
    leaks: numbers, in the order of the shards, of the documents of `val` that nearly equal one of `train`.
    facts: everything else in dataset.json, which tells how the dataset was made.
    """

    folder: Path
    tokenizer_hash: str
    end_of_text: int
    dtype: str
    splits: Mapping[str, Split]
    sources: Sequence[Mapping[str, Any]] = ()
    leaks: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER_JSON

    @property
    def hash(self) -> str:
        """sha256 of everything that training reads; the name of the folder does not matter."""
        content = {
            name: [(shard.sha256, shard.ends_crc32) for shard in split.shards] for name, split in self.splits.items()
        }
        text = json.dumps([self.tokenizer_hash, self.dtype, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, shard: Shard, suffix: str = "bin") -> Path:
        """The `bin`, `ends` or `origins` file of a shard."""
        return self.folder / f"{shard.name}.{suffix}"

    def files(self) -> Iterator[tuple[Path, int, int]]:
        """Path, size in bytes and CRC-32 of each shard file."""
        for split in self.splits.values():
            for shard in split.shards:
                yield self.path(shard), shard.tokens * TYPES[self.dtype], shard.crc32
                yield self.path(shard, "ends"), shard.documents * 8, shard.ends_crc32
                yield self.path(shard, "origins"), shard.documents * 8, shard.origins_crc32

    def save(self) -> None:
        """Write dataset.json, which makes the folder a dataset.

        Raises:
            OSError: the file cannot be written.
        """
        content = {key: value for key, value in asdict(self).items() if key not in ("folder", "facts")}
        write_json(self.folder / DATASET_JSON, {"schema_version": SCHEMA_VERSION, **content, **self.facts})

    def verify(self, thorough: bool = False, look: Callable[[Path], None] = lambda path: None) -> None:
        """Compare shards with their checksums.

        Args:
            thorough: compare all shards; by default only those that were modified since they were last verified.
            look: called with each file whose checksum was compared and is right.

        Raises:
            DatasetError: a shard is missing or was edited; the message names it.
        """
        known = {} if thorough else self._verified()
        found = {}
        for path, size, expected in self.files():
            try:
                state = file_state(path)
                if known.get(path.name) != state:
                    if path.stat().st_size != size:
                        raise DatasetError(
                            f"{path}: {path.stat().st_size:,} bytes, not the {size:,} that were prepared"
                        )
                    if checksum(path) != expected:
                        raise DatasetError(f"{path}: edited or damaged since it was prepared: its CRC-32 differs")
                    look(path)
            except OSError as error:
                raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
            found[path.name] = state
        if found != known:
            with contextlib.suppress(OSError):  # if the folder is read-only, each start compares all shards
                write_json(self.folder / VERIFIED_JSON, found)

    def _verified(self) -> dict[str, str]:
        return read_json_or_empty(self.folder / VERIFIED_JSON)


def is_dataset(folder: Path) -> bool:
    return os.path.isfile(folder / DATASET_JSON)


def find_dataset(name: str, datasets_dir: Path) -> Path | None:
    """The folder of a prepared dataset: `name` in datasets_dir, or the path `name`; None if neither is a dataset.

    Raises:
        DatasetError: the only thing with this name is a folder in datasets_dir that is not a dataset.
    """
    folder = datasets_dir / name
    if found := next((place for place in (folder, Path(name)) if is_dataset(place)), None):
        return found
    if os.path.isdir(folder) and not os.path.lexists(name):
        raise DatasetError(f"{folder}: not a dataset: it has no {DATASET_JSON}")
    return None


def dataset_names(datasets_dir: Path) -> list[str]:
    """The names of the datasets in a folder, sorted."""
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in os.scandir(datasets_dir) if is_dataset(Path(entry)))
    return []


def read_dataset(folder: Path) -> Dataset:
    """Read the dataset.json of `folder`. `Dataset.verify` checks the shards.

    Raises:
        DatasetError: the folder is not a dataset, is damaged, or was made by a newer version of the workbench.
    """
    path = folder / DATASET_JSON
    try:
        content = read_json(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: damaged: {error}") from None
    try:
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise DatasetError(f"{path}: schema_version {version}, expected {SCHEMA_VERSION}")
        splits = {
            name: Split([Shard(**shard) for shard in split["shards"]], split["bytes"])
            for name, split in content.pop("splits").items()
        }
        if content["dtype"] not in TYPES or not {"train", "val"} <= set(splits):
            raise ValueError("its dtype or its splits are unknown")
        if not _is_count(content["end_of_text"]):
            raise ValueError("its end_of_text is not a token id")
        if not all(_is_count(leak) and leak < splits["val"].documents for leak in content["leaks"]):
            raise ValueError("its leaks are not among the documents of val")
        if not all(isinstance(source, dict) for source in content["sources"]):
            raise ValueError("its sources have no paths")
        keys = ("tokenizer_hash", "end_of_text", "dtype", "sources", "leaks")
        return Dataset(folder, splits=splits, **{key: content.pop(key) for key in keys}, facts=content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path}: damaged: {error!r}") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


class ShardWriter:
    """Writes one shard document by document. The folder becomes a dataset only when `Dataset.save` has run."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.name = f"{split}_{number:05d}"
        self._folder = folder
        self._file = open(folder / f"{self.name}.bin", "wb", CHUNK)  # noqa: SIM115 (closed by `close`)
        self.tokens = 0
        self._crc32, self._sha256 = 0, hashlib.sha256()
        self._ends, self._origins = array("Q"), array("I")

    def add(self, ids: memoryview, source: int, record: int) -> None:
        """Append one document, or the last part of one.

        Args:
            ids: its tokens, in the dtype of the dataset; a document begins with the end-of-text token.
            source: index of its file in `Dataset.sources`.
            record: its line or row in that file, from 1.

        Raises:
            OSError: the shard cannot be written.
        """
        self.add_part(ids)
        self._ends.append(self.tokens)
        self._origins.extend((source, record))

    def add_all(self, ids: memoryview, lengths: Iterable[int], origins: Iterable[int]) -> None:
        """Append many documents.

        Args:
            ids: the tokens of all documents.
            lengths: the number of tokens of each document.
            origins: source and record of each document, alternating.

        Raises:
            OSError: the shard cannot be written.
        """
        ends = itertools.accumulate(lengths, initial=self.tokens)
        next(ends)
        self._ends.extend(ends)
        self._origins.extend(origins)
        self.add_part(ids)

    def add_part(self, ids: memoryview) -> None:
        """Append tokens of a document whose last part `add` will append.

        Raises:
            OSError: the shard cannot be written.
        """
        self._file.write(ids)
        self._crc32 = crc32(ids, self._crc32)
        self._sha256.update(ids)
        self.tokens += len(ids)

    def close(self) -> Shard:
        """Write the remaining files, and sync all of them to disk.

        Raises:
            OSError: a file cannot be written.
        """
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        checksums = []
        for suffix, values in (("ends", self._ends), ("origins", self._origins)):
            with open(self._folder / f"{self.name}.{suffix}", "wb") as file:
                values.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            checksums.append(crc32(values))
        return Shard(self.name, self.tokens, len(self._ends), self._crc32, self._sha256.hexdigest(), *checksums)


def checksum(path: Path) -> int:
    """CRC-32 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return file_crc32(file)
