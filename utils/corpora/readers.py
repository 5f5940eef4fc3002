"""The documents of source files: how the files are divided into units of work, and the text of each document.

A document is a text file, a part of one between separators, a field of a JSON line, or a cell of a table column.
"""

from __future__ import annotations

import codecs
import itertools
import mmap
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from utils.corpora import tables
from utils.corpora.blocks import BLOCK, blocks, named
from utils.corpora.json_lines import RecordError, long_text_of, text_of
from utils.corpora.source_files import SourceFile
from utils.corpora.sources import find_source
from utils.terminal.words import one_line

UNIT_BYTES = 1 << 25  # bytes of a unit of work
UNIT_FILES = 10_000
LONG_RECORD_BYTES = 1 << 24  # a longer one is read in pieces
SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"

Errors = Literal["strict", "replace", "skip"]
Data = str | Iterator[str] | Iterator[bytes]


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    field: the field of a JSON line, or the column of a table, that has the text.
    separator: the text between the documents of a text file; empty if the whole file is one document.
    errors: for bytes that are not text: raise an error, replace them by U+FFFD, or skip the document.
    json: whether files whose name ends in .json have JSON lines as well.
    corpora_dir: folder of the registered corpora.
    """

    field: str = "text"
    separator: str = ""
    errors: Errors = "strict"
    json: bool = False
    corpora_dir: str = "corpora"


@dataclass(frozen=True)
class Unit:
    """A unit of work, which one worker reads: whole files, or a range of one file.

    files: the files, each with its index among all files.
    bytes: size of the files or of the range; for part of a table, the share of the file that its text takes.
    start, end: the range, in bytes of a file of records or row groups of a table; an end of None is that of the file.
    """

    files: Sequence[tuple[int, SourceFile]]
    bytes: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Document:
    """A document that was read.

    source: index of its file among all files.
    record: its line, row or number, counted from 1 at the start of its unit; 1 for a whole file.
    data: its text; for a whole file or a long record, an iterator over pieces, which must be exhausted before the next
        document is read; a RecordError if the record has no text.
    """

    source: int
    record: int
    data: Data | RecordError


class NotTextError(ValueError):
    """A document is not text. The message says what was found, and where in the document.

    lines: number of line breaks before that place.
    """

    def __init__(self, message: str, lines: int = 0) -> None:
        super().__init__(message)
        self.lines = lines


# ------------------------------------------------------------------------------------------------------ units of work


def units(files: Sequence[SourceFile], reading: Reading) -> list[Unit]:
    """Divide the files into units of work, in order. The units depend only on the files and on how they are read.

    Raises:
        CorpusError: a table cannot be read or has no such column.
    """
    found: list[Unit] = []
    whole: list[tuple[int, SourceFile]] = []
    size = 0
    for index, file in enumerate(files):
        limits = _ranges(file, reading)
        if whole and (size + file.bytes > UNIT_BYTES or len(whole) >= UNIT_FILES or len(limits) > 1):
            found.append(Unit(tuple(whole), size))
            whole, size = [], 0
        if len(limits) > 1:
            found += [Unit(((index, file),), part, start, end) for start, end, part in limits]
        else:
            whole.append((index, file))
            size += file.bytes
    return found + ([Unit(tuple(whole), size)] if whole else [])


def _ranges(file: SourceFile, reading: Reading) -> list[tuple[int, int | None, int]]:
    """The ranges of a file that can be read independently: start, end and size in bytes of each."""
    if file.kind == "arrow":
        tables.check_arrow(Path(file.path), reading.field)
    if file.kind == "parquet":
        limits: list[tuple[int, int | None, int]] = []
        groups = [count for count, _ in tables.row_groups(Path(file.path), reading.field)]
        of_text = file.bytes / max(sum(groups), 1)
        start, size = 0, 0
        for number, count in enumerate(groups):
            if size and size + count > UNIT_BYTES:
                limits.append((start, number, round(size * of_text)))
                start, size = number, 0
            size += count
        return [*limits, (start, None, round(size * of_text))]
    separator = separator_of(file, reading)
    if not separator or file.compressed or _overlaps_itself(separator):
        return [(0, None, file.bytes)]
    starts = [*range(0, max(file.bytes, 1), UNIT_BYTES)]
    ends = [*starts[1:], file.bytes]
    last = starts[-1]
    return [(start, None if start == last else end, end - start) for start, end in zip(starts, ends, strict=True)]


def separator_of(file: SourceFile, reading: Reading) -> bytes:
    """The bytes between the records of a file; empty if the file is one document or a table."""
    if file.kind == "json_lines":
        return b"\n"
    return reading.separator.encode() if file.kind == "text" else b""


def _overlaps_itself(separator: bytes) -> bool:
    """Whether two occurrences can overlap; records can then be found only by reading from the start of the file."""
    return any(separator.startswith(separator[place:]) for place in range(1, len(separator)))


# ----------------------------------------------------------------------------------------------------------- documents


class UnitReader:
    """Iterates over the documents of a unit.

    Args:
        folder: folder for the temporary file of a record that is too long for memory.
        report: called with the number of bytes read since the last call.

    records: number of records read so far, including those without text.

    Raises (while iterating):
        CorpusError: a file cannot be read, or has changed.
    """

    def __init__(self, unit: Unit, reading: Reading, folder: Path, report: Callable[[int], None]) -> None:
        self.unit, self.reading, self.folder, self.report = unit, reading, folder, report
        self.records = 0

    def __iter__(self) -> Iterator[Document]:
        for index, file in self.unit.files:
            file.check()
            for number, data in enumerate(self._records(file), start=1):
                self.records = number
                if data is not None:
                    yield Document(index, number, data)
            file.check()

    def _records(self, file: SourceFile) -> Iterator[Data | RecordError | None]:
        """The text of each record; None for a blank line."""
        path, field = Path(file.path), self.reading.field
        start, end = self.unit.start, self.unit.end
        if file.kind == "corpus":
            yield find_source(file.path, Path(self.reading.corpora_dir)).read()
            self.report(file.bytes)
        elif file.kind == "parquet":
            yield from tables.parquet_cells(path, field, start, end, self.report)
        elif file.kind == "arrow":
            yield from tables.arrow_cells(path, field, self.report)
        elif separator := separator_of(file, self.reading):
            for line in records(path, separator, start, end, self.folder, self.report):
                yield self._json(line) if file.kind == "json_lines" else _separated(line)
        else:
            yield blocks(path, report=self.report)

    def _json(self, line: bytes | mmap.mmap) -> Data | RecordError | None:
        if isinstance(line, mmap.mmap):
            return self._long_json(line)
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            return None
        try:
            return text_of(line, self.reading.field)
        except RecordError as error:
            return error
        except UnicodeDecodeError as error:
            if self.reading.errors == "replace":
                try:
                    return text_of(line.decode(errors="replace").encode(), self.reading.field)
                except RecordError as other:
                    return other
            return _raising(NotTextError(f"not UTF-8 text (byte {error.start} is 0x{line[error.start]:02x})"))

    def _long_json(self, line: mmap.mmap) -> Iterator[str]:
        try:
            yield from long_text_of(line, self.reading.field, self.reading.errors == "replace")
        except UnicodeDecodeError as error:
            raise NotTextError(f"not UTF-8 text (0x{error.object[error.start]:02x})") from None


def _raising(error: Exception) -> Iterator[str]:
    raise error
    yield ""


def _separated(record: bytes | mmap.mmap) -> Iterator[bytes] | None:
    """A document between separators, without the line breaks next to them."""
    if isinstance(record, mmap.mmap):
        return (record[place : place + BLOCK] for place in range(0, len(record), BLOCK))
    record = record.strip(b"\r\n")
    return iter([record]) if record else None


def records(
    path: Path, separator: bytes, start: int, end: int | None, folder: Path, report: Callable[[int], None]
) -> Iterator[bytes | mmap.mmap]:
    """The records of a file that begin in a range of bytes; a long record is a memory map of a temporary file."""
    width = len(separator)
    place = max(start - width, 0)  # offset of `rest` in the file
    rest, skipping = b"", start > 0  # skip the end of a record that belongs to the previous range
    spilled: Any = None
    for block in blocks(path, place, report):
        if spilled is not None:
            if (length := _end_of_spilled(spilled, block, separator)) is None:
                continue
            begun = spilled.tell() - len(block)
            yield _mapped(spilled, length)
            place += length + width
            block, spilled = block[length + width - begun :], None
        parts = (rest + block).split(separator)
        rest = parts.pop()
        if skipping and parts:
            place += len(parts.pop(0)) + width
            skipping = False
        for part in parts:
            if end is not None and place >= end:
                return
            yield part
            place += len(part) + width
        if end is not None and place >= end and not skipping:
            return
        if skipping:
            kept = rest[-width + 1 :] if width > 1 else b""
            place += len(rest) - len(kept)
            rest = kept
            if end is not None and place >= end:  # the next record begins in a later range
                return
        elif len(rest) > LONG_RECORD_BYTES:
            spilled = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when its map is)
            spilled.write(rest)
            rest = b""
    if skipping:
        return
    if spilled is not None:
        yield _mapped(spilled, spilled.tell())
    elif rest:
        yield rest


def _end_of_spilled(file: Any, block: bytes, separator: bytes) -> int | None:
    """Append a block to the file of a record; returns the length of the record if it ends in this block, else None."""
    overlap = min(len(separator) - 1, file.tell())
    file.seek(-overlap, 2)
    before = file.read(overlap)
    found = (before + block).find(separator)
    begun: int = file.tell()
    file.write(block)
    return None if found < 0 else begun - overlap + found


def _mapped(file: Any, length: int) -> mmap.mmap:
    file.flush()
    file.truncate(length)
    with file:
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


# ---------------------------------------------------------------------------------------------------------------- text


def pieces(data: Data, errors: Errors) -> Iterator[str]:
    """The text of a document, in pieces.

    Raises:
        NotTextError: it has bytes that are not UTF-8, NUL, or half a surrogate pair, and `errors` is not replace.
        RecordError: its record has no text.
    """
    if isinstance(data, str):
        yield checked(data, errors)
        return
    first = next(data, None)
    if isinstance(first, str):
        yield checked(first, errors)
        for piece in data:
            assert isinstance(piece, str)
            yield checked(piece, errors)
    elif first is not None:
        yield from _decoded(itertools.chain([first], cast(Iterator[bytes], data)), errors)


def checked(text: str, errors: Errors) -> str:
    """A text that was already decoded, checked as by `pieces`."""
    if "\0" not in text and _is_unicode(text):
        return text
    if errors == "replace":
        return SURROGATE.sub(REPLACEMENT, text.replace("\0", REPLACEMENT))
    if (place := text.find("\0")) >= 0:
        raise NotTextError(f"binary data (NUL at character {place} of the text)")
    found = SURROGATE.search(text)
    assert found is not None
    raise NotTextError(f"half a surrogate pair, {found[0]!r}, at character {found.start()} of the text")


def _is_unicode(text: str) -> bool:
    try:  # ten times as fast as a search for surrogates
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _decoded(parts: Iterable[bytes], errors: Errors) -> Iterator[str]:
    """The text of UTF-8 bytes, without a byte order mark."""
    place = lines = 0  # offset of `rest`, and line breaks before it
    rest = b""
    for part in itertools.chain(parts, [None]):
        data = rest + (part or b"")
        if errors == "replace":
            text, used = codecs.utf_8_decode(data, "replace", part is None)
        else:
            if (nul := data.find(b"\0")) >= 0:
                raise NotTextError(f"a binary file (NUL at byte {place + nul})", lines + data.count(b"\n", 0, nul))
            try:
                text, used = codecs.utf_8_decode(data, "strict", part is None)
            except UnicodeDecodeError as error:
                raise NotTextError(
                    f"not UTF-8 text (byte {place + error.start} is 0x{data[error.start]:02x})",
                    lines + data.count(b"\n", 0, error.start),
                ) from None
        if not place:
            text = text.removeprefix("\ufeff")
        place, lines, rest = place + used, lines + data.count(b"\n", 0, used), data[used:]
        if text:
            yield text.replace("\0", REPLACEMENT)


def where(file: SourceFile, reading: Reading, record: int, lines: int = 0, short: bool = False) -> str:
    """The place of a document, in words.

    Args:
        lines: number of line breaks before the place, if the document is a whole file.
        short: name the file relative to the current folder, for an error message.
    """
    path = named(file.path) if short else one_line(file.path)
    if file.kind == "json_lines":
        return f"{path}:{record}"
    if file.kind in ("parquet", "arrow"):
        return f"{path}: row {record}"
    if separator_of(file, reading):
        return f"{path}: document {record}"
    return f"{path}:{lines + 1}"
