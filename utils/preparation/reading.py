"""The first pass of a preparation: documents are read, cleaned and written as UTF-8 into the parts of the work folder.

texts/00000.text           the documents of a unit of work, one after the other
texts/00000.documents      end and origin of each document (`DOCUMENT`)
texts/00000.fingerprints   fingerprint of each document, for finding duplicates
texts/00000.cleaned        effects of the cleaning, a line for each document that it changed or removed
texts/00000.json           the report of the part (`Part`); written last, so it marks a complete part
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.corpora.cleaning import Cleaned, Pipeline
from utils.corpora.json_lines import RecordError
from utils.corpora.long_cleaning import LongCleaning
from utils.corpora.readers import Document, NotTextError, Reading, Unit, UnitReader, checked, pieces
from utils.files import read_json, write_json
from utils.preparation.duplicates import fingerprint
from utils.preparation.workers import Report

# end: bytes from the start of the part. key: hash of the text, for the split. record: its line or row, from 1.
DOCUMENT = np.dtype([("end", "<u8"), ("key", "<u8"), ("record", "<u4"), ("source", "<u4")])
LONG_CHARACTERS = 1 << 23  # a document with more characters is read, cleaned and encoded in pieces
COMPARED_CHARACTERS = 1 << 20  # characters of a document that are compared with other documents
CLEANED_TOGETHER = 1 << 22  # characters of a long document that are cleaned at a time
EXAMPLES = 3  # examples of each thing that is reported
LOOKED_UP_CHARACTERS = 1 << 16  # characters of a text that are looked up at a time in `_occurs`


@dataclass(frozen=True)
class ReadJob:
    """A unit of work, and how its documents are processed.

    number: number of the part. tolerated: how many records without a text may be left out.
    characters: whether to note which characters occur. fingerprints: whether to compute fingerprints.
    """

    number: int
    folder: Path
    unit: Unit
    reading: Reading
    tolerated: int = 0
    pipeline: Pipeline | None = None
    characters: bool = False
    fingerprints: bool = False

    @property
    def stem(self) -> Path:
        return self.folder / f"{self.number:05d}"


@dataclass
class Part:
    """The report of a part.

    records: number of lines or rows that were read, including those without a document.
    removed: number of documents that the cleaning removed.
    sizes: sizes of the part's files in bytes, by suffix.
    bad, not_text: the first records that have no text, and documents that cannot be decoded: source, record, line
        breaks, reason. `bad` also has the record that exceeds the tolerated number.
    mistake: likewise, the document that makes the preparation fail.
    """

    documents: int = 0
    bytes: int = 0
    records: int = 0
    empty: int = 0
    removed: int = 0
    n_bad: int = 0
    n_not_text: int = 0
    bad: list[tuple[int, int, int, str]] = field(default_factory=list)
    not_text: list[tuple[int, int, int, str]] = field(default_factory=list)
    mistake: tuple[int, int, int, str] | None = None
    characters: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """Number of documents before any were left out."""
        return self.documents + self.empty + self.removed + self.n_bad + self.n_not_text


def finished_part(stem: Path) -> Part | None:
    """The report of a part; None if the part is incomplete."""
    try:
        part = Part(**read_json(stem.with_suffix(".json")))
        whole = all(os.path.getsize(f"{stem}{suffix}") == size for suffix, size in part.sizes.items())
    except (OSError, ValueError, TypeError):
        return None
    return part if whole else None


def read_unit(job: ReadJob, report: Report) -> Part:
    """Read a unit of work, and write its part.

    Raises:
        UserError: a file cannot be read.
        OSError: the part cannot be written.
    """
    job.stem.with_suffix(".json").unlink(missing_ok=True)
    part = Part()
    with _PartWriter(job) as writer:
        reader = UnitReader(job.unit, job.reading, job.folder, report)
        for document in reader:
            try:
                _take(document, job, writer, part)
            except NotTextError as error:
                writer.drop()
                place = (document.source, document.record, error.lines, str(error))
                if job.reading.errors != "skip":
                    part.mistake = place
                    return part
                part.n_not_text += 1
                part.not_text = [*part.not_text, place][:EXAMPLES]
            except RecordError as error:
                writer.drop()
                part.n_bad += 1
                if len(part.bad) < EXAMPLES or part.n_bad > job.tolerated:
                    part.bad.append((document.source, document.record, 0, str(error)))
                if part.n_bad > job.tolerated:
                    return part
        part.records = reader.records
        part.sizes = writer.finish()
    part.documents, part.bytes = writer.documents, writer.bytes
    part.characters = writer.characters()
    write_json(job.stem.with_suffix(".json"), asdict(part))
    return part


def _take(document: Document, job: ReadJob, writer: _PartWriter, part: Part) -> None:
    """Clean and write one document, or count why it is left out."""
    if isinstance(document.data, RecordError):
        raise document.data
    if isinstance(document.data, str) and len(document.data) <= LONG_CHARACTERS:
        text = checked(document.data, job.reading.errors)
        found: Iterator[str] = iter(())
    else:
        found = pieces(document.data, job.reading.errors)
        text = "".join(_at_most(found, LONG_CHARACTERS))
    if len(text) > LONG_CHARACTERS:
        _take_long(itertools.chain([text], found), document, job, writer, part)
        return
    if job.pipeline is not None and text and not text.isspace():
        cleaned = job.pipeline.apply(text)
        writer.note(cleaned)
        if cleaned.text is None:
            part.removed += 1
            return
        text = cleaned.text
    if not text or text.isspace():
        part.empty += 1
        return
    writer.write(text)
    writer.end(document)


def _at_most(found: Iterator[str], length: int) -> Iterator[str]:
    """The first pieces, until they have more than `length` characters together."""
    for piece in found:
        yield piece
        length -= len(piece)
        if length < 0:
            return


def _take_long(found: Iterator[str], document: Document, job: ReadJob, writer: _PartWriter, part: Part) -> None:
    """Clean and write a document piece by piece, so that it is never in memory as a whole."""
    has_text = stays = False
    cleaning = LongCleaning(job.pipeline) if job.pipeline is not None else None
    for piece in found if cleaning is None else _ending_with_lines(found):
        has_text = has_text or not piece.isspace()
        text = piece if cleaning is None else cleaning.add(piece)
        writer.write(text)
        stays = stays or bool(text and not text.isspace())
    if cleaning is not None and has_text:
        cleaned = cleaning.finish()
        writer.note(cleaned)
        if cleaned.text is None:
            writer.drop()
            part.removed += 1
            return
    if stays:
        writer.end(document)
    else:
        writer.drop()
        part.empty += 1


def _ending_with_lines(found: Iterator[str]) -> Iterator[str]:
    """The same text in pieces that end with a paragraph or a line wherever possible."""
    rest = ""
    for piece in found:
        rest += piece
        if len(rest) >= CLEANED_TOGETHER:
            end = rest.rfind("\n\n") + 2 if "\n\n" in rest else rest.rfind("\n") + 1 or len(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


class _PartWriter:
    """Writes the files of a part. A document is written piece by piece, then kept (`end`) or dropped."""

    def __init__(self, job: ReadJob) -> None:
        self.job = job
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(open(f"{job.stem}.text", "wb"))  # noqa: SIM115 (closed with the stack)
        self._documents: list[tuple[int, int, int, int]] = []
        self._fingerprints: list[bytes] = []
        self._effects: list[str] = []
        self._occurs = np.zeros(0x110000, dtype=bool)
        self.bytes = 0
        self._begin()

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _begin(self) -> None:
        self.length = 0  # bytes of the document so far
        self._hash = hashlib.blake2b(digest_size=8)
        self._beginning: list[str] = []
        self._n_beginning = 0
        self._new: list[np.ndarray] = []  # characters that first occur in this document

    @property
    def documents(self) -> int:
        return len(self._documents)

    def write(self, text: str) -> None:
        """Append text to the current document."""
        data = text.encode()
        self._file.write(data)
        self._hash.update(data)
        self.length += len(data)
        if self.job.fingerprints and self._n_beginning < COMPARED_CHARACTERS:
            self._beginning.append(text[: COMPARED_CHARACTERS - self._n_beginning])
            self._n_beginning += len(text)
        if self.job.characters:
            for start in range(0, len(text), LOOKED_UP_CHARACTERS):
                points = text[start : start + LOOKED_UP_CHARACTERS].encode("utf-32-le")
                found = np.frombuffer(points, dtype="<u4")
                new = np.unique(found[~self._occurs[found]])
                self._occurs[new] = True
                self._new.append(new)

    def drop(self) -> None:
        """Discard the current document."""
        if self.length:
            self._file.seek(self.bytes)
            self._file.truncate()
        for new in self._new:
            self._occurs[new] = False
        self._begin()

    def end(self, document: Document) -> None:
        """Keep the current document."""
        self.bytes += self.length
        key = self._hash.digest()
        self._documents.append((self.bytes, int.from_bytes(key, "little"), document.record, document.source))
        if self.job.fingerprints:
            self._fingerprints.append(fingerprint(compared_text("".join(self._beginning), self._n_beginning, key)))
        self._begin()

    def note(self, cleaned: Cleaned) -> None:
        """Record the effect of the cleaning on a text, if any."""
        if cleaned.removed_by or cleaned.counts:
            effect = {"removed_by": cleaned.removed_by, "counts": cleaned.counts, "examples": cleaned.examples}
            self._effects.append(json.dumps(effect))

    def characters(self) -> str:
        """The characters that occur, in code-point order."""
        return "".join(map(chr, np.flatnonzero(self._occurs)))

    def finish(self) -> dict[str, int]:
        """Write all files; returns the size of each by its suffix."""
        self._stack.close()
        contents = {
            ".documents": np.array(self._documents, dtype=DOCUMENT).tobytes(),
            ".fingerprints": b"".join(self._fingerprints),
            ".cleaned": "".join(f"{effect}\n" for effect in self._effects).encode(),
        }
        for suffix, content in contents.items():
            if content or suffix == ".documents":
                Path(f"{self.job.stem}{suffix}").write_bytes(content)
        return {".text": self.bytes, **{suffix: len(content) for suffix, content in contents.items() if content}}


def compared_text(beginning: str, length: int, key: bytes) -> str:
    """The text that represents a document in comparisons: if it is long, its beginning and a hash of all of it."""
    return beginning if length <= COMPARED_CHARACTERS else beginning + key.hex()


def effects(stem: Path) -> Iterator[Any]:
    """The effect of the cleaning on each document of a part that it changed or removed."""
    with contextlib.suppress(FileNotFoundError), open(f"{stem}.cleaned", encoding="utf-8") as file:
        yield from map(json.loads, file)
