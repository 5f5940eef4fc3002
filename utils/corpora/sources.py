"""The sources of a text: a registered corpus, a UTF-8 file, or a folder of such files."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import http.client
import importlib.util
import itertools
import json
import os
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.errors import UserError, nearest
from utils.files import expand_home, open_named, write_output
from utils.terminal.words import counted, one_line

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SUFFIXES = frozenset(
    (".txt", ".md", ".rst", ".py", ".csv", ".html", ".json", ".jsonl", ".tex", ".xml", ".log", "")
)
JSON_LINES = (".jsonl", ".ndjson")  # whose documents prepare.py reads
ARITHMETIC = "arithmetic"  # a dataset that is generated (utils/preparation/arithmetic.py)
KINDS_SHOWN = 6  # suffixes in a message
SETTLED_NS = 2_000_000_000  # a younger file may change again without a new mtime (FAT has a resolution of 2 s)


class CorpusError(UserError):
    """A corpus cannot be read or encoded, or is too short."""


@dataclass(frozen=True)
class Source:
    """The files of a text, and how it is read.

    name: a registered name or an absolute path.
    read: returns the whole text; raises CorpusError if it is unreadable, binary, not UTF-8 or empty.
    skipped: files of a folder that are not read because of their suffix.
    """

    name: str
    files: Sequence[Path]
    read: Callable[[], str]
    skipped: Sequence[Path] = ()

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.name)

    def files_text(self) -> str:
        """How many files of a folder are read and skipped, in words."""
        words = f"{counted(len(self.files), 'file')} read ({_kinds_text(self.files)})"
        if self.skipped:
            words += f", {counted(len(self.skipped), 'file')} of other kinds skipped ({_kinds_text(self.skipped)})"
        return words

    def split_files(self, val_fraction: float) -> tuple[Sequence[Path], Sequence[Path]]:
        """The files of the training and of the validation split, estimated by size; the file at the cut is in both.

        Raises:
            OSError: a file no longer exists.
        """
        sizes = [path.stat().st_size + 1 for path in self.files]  # plus the line break that follows each file
        ends = list(itertools.accumulate(sizes))
        cut = min(bisect.bisect_right(ends, ends[-1] * (1 - val_fraction)), len(ends) - 1)
        return self.files[: cut + 1], self.files[cut:]

    def notes(self, val_fraction: float) -> Iterator[str]:
        """Lines for the user: the files of a folder that are read, and where its validation split begins.

        Also, that a file of JSON lines is read as plain text.
        """
        if not self.is_folder:
            if self.name.lower().endswith(JSON_LINES):
                yield (
                    f"{self.name}: learned as a text, with its braces and names of fields: python prepare.py "
                    f"{self.name} --out NAME makes a dataset of the documents in it"
                )
            return
        yield f"{self.name}: {self.files_text()}"
        with contextlib.suppress(OSError):
            training, validation = self.split_files(val_fraction)
            first = os.path.relpath(validation[0], self.name)
            yield (
                f"the validation split is the last {val_fraction:.0%} of this text, whose files are sorted by path; it "
                f"begins near {first} ({_kinds_text(validation)})"
            )
            alone = [kind for kind in kinds(validation) if kind not in kinds(training)]
            if alone:
                words = [f"{kind} files" if kind.startswith(".") else f"files {kind}" for kind in alone]
                yield f"only the validation split has {' and '.join(words)}: val/loss is about another kind of text"

    def stamp(self) -> str | None:
        """A digest of the path, inode, size, mtime and ctime of each file, which changes when a file does.

        None if a file is missing, or so young that a later change might go unnoticed.
        """
        try:
            facts = [(str(path), path.stat()) for path in self.files]
        except OSError:
            return None
        if max(fact.st_mtime_ns for _, fact in facts) > time.time_ns() - SETTLED_NS:
            return None
        text = json.dumps([(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in facts])
        return hashlib.sha256(text.encode()).hexdigest()


def find_source(dataset: str, corpora_dir: Path, prepared: Sequence[str] = ()) -> Source:
    """The source for a registered corpus, a UTF-8 file, or a folder of such files (in path order).

    Args:
        prepared: names of prepared datasets, for the error message.

    Raises:
        CorpusError: there is no such dataset, it cannot be accessed, or the folder has no text files.
    """
    if dataset in CORPORA:
        return CORPORA[dataset](corpora_dir)
    if dataset == ARITHMETIC:
        raise CorpusError(f"{ARITHMETIC} is not a text: training generates its problems (section {ARITHMETIC})")
    path = Path(dataset)
    try:
        path.stat()
    except PermissionError as error:
        raise CorpusError(f"{dataset}: cannot be read: {error.strerror}") from None
    except (OSError, ValueError):  # ValueError: the path contains NUL
        raise CorpusError(
            f"unknown dataset {dataset}: no such file or folder; expected {', '.join([*NAMES, *prepared])}, another "
            f"dataset made by prepare.py, or the path of a text file or folder{nearest(dataset, [*NAMES, *prepared])}"
        ) from None
    files, skipped = [path], []
    if os.path.isdir(path):
        found = visible_files(path)
        files = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES]
        skipped = [file for file in found if file.suffix.lower() not in TEXT_SUFFIXES]
        if not files:
            others = f", only {_kinds_text(skipped)}" if skipped else ""
            raise CorpusError(f"{dataset}: no text files in this folder{others}")
    return Source(os.path.abspath(path), files, partial(_read_files, dataset, files), skipped)


def _pydocs(corpora_dir: Path) -> Source:
    """The Python language reference, which is part of CPython: needs no download, but differs between releases."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None
    return Source("pydocs", [Path(spec.origin or "")], _read_pydocs)


def _read_pydocs() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _shakespeare(corpora_dir: Path) -> Source:
    """Tiny Shakespeare, from $WORKBENCH_DATA or corpora/, or downloaded once; its sha256 is checked."""
    folders = [Path(expand_home(folder)) for folder in (os.environ.get("WORKBENCH_DATA"),) if folder] + [corpora_dir]
    paths = [folder / "tinyshakespeare.txt" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[-1])
    return Source("shakespeare", [path], partial(_read_shakespeare, path))


def _read_shakespeare(path: Path) -> str:
    if path.is_file():
        return _checked_shakespeare(_read_bytes(path), str(path)).decode()
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            data = _checked_shakespeare(response.read(), SHAKESPEARE_URL)
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(
            f"shakespeare: cannot be downloaded ({getattr(error, 'reason', error)}); put tinyshakespeare.txt "
            f"into {path.parent} or name its folder in WORKBENCH_DATA"
        ) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, data)
    except OSError as error:
        raise CorpusError(f"{path.parent}: the download cannot be kept: {error.strerror}") from None
    return data.decode()


def _checked_shakespeare(data: bytes, place: str) -> bytes:
    """`data`; raises CorpusError unless its hash is that of Tiny Shakespeare."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise CorpusError(f"{place}: not Tiny Shakespeare: sha256 {digest[:12]}..., not {SHAKESPEARE_SHA256[:12]}...")
    return data


CORPORA: dict[str, Callable[[Path], Source]] = {"pydocs": _pydocs, "shakespeare": _shakespeare}
NAMES = (*CORPORA, ARITHMETIC)


def kinds(files: Iterable[Path]) -> Counter[str]:
    """The number of files with each suffix, the most frequent first."""
    return Counter(dict(Counter(path.suffix.lower() or "without a suffix" for path in files).most_common()))


def _kinds_text(files: Iterable[Path]) -> str:
    found = kinds(files)
    shown = [f"{count:,} {kind}" for kind, count in list(found.items())[:KINDS_SHOWN]]
    more = len(found) - KINDS_SHOWN
    return ", ".join([*shown, *([f"{more} more kinds"] if more > 0 else [])])


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path. Follows links, visits each folder once, and skips hidden names."""

    def fail(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]  # links are followed last, because their targets may lie in `folder` itself
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=fail):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if (path := Path(place, name)).is_symlink()]
            found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _read_files(dataset: str, files: Sequence[Path]) -> str:
    text = "\n".join(map(_read_text, files))
    if not text.strip():
        raise CorpusError(f"{dataset}: the corpus is empty")
    return text


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    if (position := data.find(b"\0")) >= 0:
        raise CorpusError(f"{one_line(str(path))}: a binary file (NUL at byte {position}), expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{one_line(str(path))}:{line}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})"
        ) from None


def _read_bytes(path: Path) -> bytes:
    try:
        with open_named(path) as file:
            return file.read()
    except OSError as error:
        raise CorpusError(f"{one_line(str(path))}: cannot be read: {error.strerror}") from None
