"""The files of a dataset's sources: paths, folders, globs, registered corpora, and Hugging Face datasets."""

from __future__ import annotations

import glob
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.corpora.blocks import COMPRESSED, named
from utils.corpora.sources import CORPORA, TEXT_SUFFIXES, CorpusError, Source, find_source, visible_files
from utils.errors import first_line, is_out_of_memory, nearest
from utils.files import expand_home, read_json
from utils.terminal.words import one_line

Kind = Literal["text", "json_lines", "parquet", "arrow", "corpus"]
KINDS: dict[str, Kind] = {".jsonl": "json_lines", ".ndjson": "json_lines", ".parquet": "parquet", ".arrow": "arrow"}
SAVED = "dataset_dict.json"  # marks a dataset with splits that the package datasets saved
SAVED_SPLIT = "state.json"  # marks one without splits
HUB_ID = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    path: the absolute path, or the name of a registered corpus.
    bytes, mtime_ns: size and modification time when the file was found.
    """

    path: str
    kind: Kind
    bytes: int
    mtime_ns: int = 0

    @property
    def compressed(self) -> bool:
        return self.kind != "corpus" and self.path.lower().endswith(COMPRESSED)

    def check(self) -> None:
        """Raises CorpusError if the file has changed since it was found."""
        try:
            now = state(Path(self.path)) if self.kind != "corpus" else (self.bytes, self.mtime_ns)
        except OSError as error:
            raise CorpusError(f"{named(self.path)}: cannot be read: {error.strerror}") from None
        if now != (self.bytes, self.mtime_ns):
            raise CorpusError(f"{named(self.path)}: changed while it was being prepared")


@dataclass(frozen=True)
class FoundFiles:
    """The files that the sources name. notes: lines for the user about how the sources were understood."""

    files: Sequence[SourceFile]
    notes: Sequence[str] = ()


def find_files(sources: Sequence[str], corpora_dir: Path, json_suffix: bool = False) -> FoundFiles:
    """The files of all sources, each once, in the order of the sources.

    Args:
        json_suffix: whether files whose name ends in .json have JSON lines as well.

    Raises:
        CorpusError: a source is missing or has no file that can be read.
    """
    kinds: dict[str, Kind] = {**KINDS, **({".json": "json_lines"} if json_suffix else {})}
    found: dict[str, SourceFile] = {}
    notes: list[str] = []
    for source in sources:
        for path in _paths(source, corpora_dir, kinds, notes):
            file = _registered(path) if isinstance(path, Source) else _source_file(path, kinds)
            found.setdefault(file.path, file)
    return FoundFiles(list(found.values()), notes)


def state(path: Path) -> tuple[int, int]:
    """Size and mtime of a file.

    Raises:
        OSError: the file cannot be accessed.
    """
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _registered(source: Source) -> SourceFile:
    return SourceFile(source.name, "corpus", sum(path.stat().st_size for path in source.files if path.is_file()))


def _source_file(path: Path, kinds: dict[str, Kind]) -> SourceFile:
    kind = _kind(path, kinds)
    if kind in ("parquet", "arrow") and path.suffix.lower() in COMPRESSED:
        raise CorpusError(f"{one_line(str(path))}: decompress it first: {kind} files need random access")
    try:
        return SourceFile(os.path.abspath(path), kind, *state(path))
    except OSError as error:
        raise CorpusError(f"{one_line(str(path))}: cannot be read: {error.strerror}") from None


def _suffix(path: Path) -> str:
    """The last suffix other than that of a compression, in lower case."""
    name = path.name.lower()
    return Path(name.removesuffix(path.suffix.lower()) if name.endswith(COMPRESSED) else name).suffix


def _kind(path: Path, kinds: dict[str, Kind]) -> Kind:
    return kinds.get(_suffix(path), "text")


def _paths(source: str, corpora_dir: Path, kinds: dict[str, Kind], notes: list[str]) -> Iterator[Path | Source]:
    """The files that one source names."""
    if source in CORPORA:
        yield find_source(source, corpora_dir)
        return
    path = Path(expand_home(source))
    if os.path.isdir(path):
        yield from _folder(path, kinds, notes)
    elif os.path.lexists(path):
        yield path
    elif glob.has_magic(source):
        paths = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not os.path.isdir(name)]
        if not paths:
            raise CorpusError(f"{one_line(source)}: no file matches")
        yield from paths
    elif found := HUB_ID.fullmatch(source):
        yield from _downloaded(source, found[1], found[2])
    else:
        raise CorpusError(
            f"{one_line(source)}: no such file or folder; expected a path, a glob, "
            f"{' or '.join(CORPORA)}{nearest(source, CORPORA)}"
        )


def _folder(folder: Path, kinds: dict[str, Kind], notes: list[str]) -> list[Path]:
    """The files below a folder that can be read; for a saved dataset with splits, those of its training split."""
    if (folder / SAVED).is_file() or (folder / SAVED_SPLIT).is_file():
        place = folder
        if (folder / SAVED).is_file() and (folder / "train").is_dir():
            place = folder / "train"
            notes.append(f"{folder}: a saved dataset with splits; only train is read")
        return _some([path for path in visible_files(place) if _suffix(path) == ".arrow" and _is_data(path)], folder)
    everything = visible_files(folder)
    chosen = [path for path in everything if _suffix(path) in kinds or _suffix(path) in TEXT_SUFFIXES]
    files = _some(chosen, folder)
    if len(everything) > len(files):
        notes.append(Source(str(folder), files, str, sorted({*everything} - {*files})).files_text())
    return files


def _is_data(path: Path) -> bool:
    """Whether an Arrow file is part of a saved dataset, and not a cache file of the package datasets."""
    try:
        listed = read_json(path.parent / SAVED_SPLIT)["_data_files"]
        return path.name in [entry["filename"] for entry in listed]
    except (OSError, ValueError, LookupError, TypeError):
        return True  # the files of the dataset are not listed


def _some(files: list[Path], folder: Path) -> list[Path]:
    if not files:
        raise CorpusError(f"{one_line(str(folder))}: no files in this folder that can be read")
    return files


def _downloaded(source: str, name: str, config: str | None) -> list[Path]:
    """The files of a dataset on the Hugging Face hub, which the package datasets downloads to its cache."""
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except (ImportError, AttributeError):  # AttributeError: the folder datasets/ was imported instead
        raise CorpusError(
            f"{source}: no such file or folder; to download the Hugging Face dataset of that name: "
            "pip install datasets (or download its files and name their folder)"
        ) from None
    try:
        loaded = load_dataset(name, config, split="train")
    except Exception as error:  # anything that the network, the hub and the package raise
        if is_out_of_memory(error):
            raise
        raise CorpusError(f"{source}: cannot be downloaded: {one_line(first_line(error))}") from None
    return [Path(entry["filename"]) for entry in loaded.cache_files]
