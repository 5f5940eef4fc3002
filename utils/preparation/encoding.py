"""The second pass of a preparation: encode the documents, after the tokenizer has learned its vocabulary.

    tokens/00000.bin       token ids of some documents of a part, those for training first, or of a piece of a long one
    tokens/00000.lengths   number of tokens of each, uint64; written last, so it marks a complete part

Each document begins with the end-of-text token.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tokenizer import Tokenizer, TokenizerError, load_tokenizer
from utils.preparation.documents import Documents, TextPart
from utils.preparation.workers import Report

JOB_BYTES = 1 << 22  # bytes of text of a job
BATCH = 1 << 20  # bytes of text that are encoded together
CUT_WINDOW = 1 << 20  # bytes that are searched for a safe place to cut
SAMPLE_PIECES = 64


@dataclass(frozen=True)
class EncodeJob:
    """Documents of one part, or a piece of a long document, for a worker to encode.

    spans: (n, 2) bytes at which each document begins and ends; the bounds of a piece are moved on to safe cuts.
    origins: (n, 2) source and record of each. n_train: the first n_train of them are for training.
    begins, ends: False if the document continues before or after the piece.
    """

    number: int
    folder: Path
    text: Path
    tokenizer: Path
    dtype: str
    spans: np.ndarray
    origins: np.ndarray
    n_train: int
    begins: bool = True
    ends: bool = True

    @property
    def stem(self) -> Path:
        return self.folder / f"{self.number:05d}"

    @property
    def bytes(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def lengths(self) -> np.ndarray | None:
        """The number of tokens of each document, once the part is encoded; None if it is incomplete."""
        try:
            lengths = np.fromfile(f"{self.stem}.lengths", dtype="<u8")
            size = os.path.getsize(f"{self.stem}.bin")
        except OSError:
            return None
        whole = len(lengths) == len(self.spans) and size == int(lengths.sum()) * np.dtype(self.dtype).itemsize
        return lengths if whole else None

    def tokens(self) -> np.ndarray:
        return np.fromfile(f"{self.stem}.bin", dtype=self.dtype)


def encode_jobs(documents: Documents, folder: Path, tokenizer: Path, dtype: str, cuttable: bool) -> list[EncodeJob]:
    """Divide the documents into jobs, in order. The jobs do not depend on the number of workers.

    Args:
        cuttable: whether a long document may be encoded in pieces.
    """
    jobs: list[EncodeJob] = []
    for part in documents.parts:
        ends = part.documents["end"].astype(np.int64)
        begins = np.concatenate([[0], ends[:-1]])

        def add(
            numbers: np.ndarray, spans: np.ndarray, begins: bool = True, ends: bool = True, part: TextPart = part
        ) -> None:
            origins = np.stack([part.documents[name][numbers] for name in ("source", "record")], axis=1)
            n_train = int((~part.val[numbers]).sum())
            jobs.append(
                EncodeJob(len(jobs), folder, part.text, tokenizer, dtype, spans, origins, n_train, begins, ends)
            )

        for numbers in _together(np.flatnonzero(~part.removed), ends):
            start, end = int(begins[numbers[0]]), int(ends[numbers[-1]])
            if len(numbers) == 1 and cuttable and end - start > 2 * JOB_BYTES:
                cuts = np.array([*range(start, end - JOB_BYTES, JOB_BYTES), end])
                for span in np.stack([cuts[:-1], cuts[1:]], axis=1):
                    add(numbers, span[None], span[0] == start, span[1] == end)
            else:
                numbers = numbers[np.argsort(part.val[numbers], kind="stable")]
                add(numbers, np.stack([begins[numbers], ends[numbers]], axis=1))
    return jobs


def _together(numbers: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """Documents in groups of at most JOB_BYTES; a longer document is a group of its own."""
    first = 0
    while first < len(numbers):
        begin = ends[numbers[first] - 1] if numbers[first] else 0
        after = int(np.searchsorted(ends[numbers], begin + JOB_BYTES, side="right"))
        yield numbers[first : max(after, first + 1)]
        first = max(after, first + 1)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, _mtime: int) -> Tokenizer:
    return load_tokenizer(path)


def encode(job: EncodeJob, report: Report) -> None:
    """Encode the documents of a job, and write their tokens.

    Raises:
        TokenizerError: a text cannot be encoded.
        OSError: the part cannot be written.
    """
    tokenizer = _tokenizer(job.tokenizer, job.tokenizer.stat().st_mtime_ns)
    separator = np.array([tokenizer.end_of_text] if job.begins else [], dtype=job.dtype)
    lengths: list[int] = []
    Path(f"{job.stem}.lengths").unlink(missing_ok=True)
    with job.text.open("rb") as text, open(f"{job.stem}.bin", "wb") as file:
        for texts in _batches(job, text, tokenizer):
            parts = []
            for ids in tokenizer.encode_many(texts):
                parts += [separator, ids]
                lengths.append(len(separator) + len(ids))
            ids = np.concatenate(parts)
            if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
                raise TokenizerError(f"the tokenizer gives ids outside its vocabulary of {tokenizer.vocab_size:,}")
            file.write(ids.astype(job.dtype).data)
            report(sum(map(len, texts)))
    Path(f"{job.stem}.lengths").write_bytes(np.array(lengths, dtype="<u8").tobytes())


def _batches(job: EncodeJob, file: BinaryIO, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """The texts of the documents, in batches."""

    def read(start: int, end: int) -> str:
        file.seek(start)
        return str(file.read(end - start), "utf-8")

    if not (job.begins and job.ends):
        start, end = map(int, job.spans[0])
        start = start if job.begins else _safe_cut(file, start, tokenizer)
        yield [read(start, end if job.ends else _safe_cut(file, end, tokenizer))]
        return
    begin, after = int(job.spans[:, 0].min()), int(job.spans[:, 1].max())
    file.seek(begin)
    data = memoryview(file.read(after - begin))
    texts: list[str] = []
    size = 0
    for start, end in (job.spans - begin).tolist():
        texts.append(str(data[start:end], "utf-8"))
        size += end - start
        if size >= BATCH:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _safe_cut(file: BinaryIO, place: int, tokenizer: Tokenizer) -> int:
    """The first byte from `place` on at which cutting the text is safe; near `place` if CUT_WINDOW has no such byte."""
    file.seek(place)
    window: bytes = file.read(CUT_WINDOW)
    skipped = next((i for i, byte in enumerate(window[:4]) if not 0x80 <= byte < 0xC0), 0)
    text = window[skipped:].decode(errors="ignore")
    return place + skipped + len(text[: tokenizer.first_cut(text) or 0].encode())


def training_sample(documents: Documents, characters: int) -> list[str]:
    """The documents for training, or, if they have more than `characters` bytes, evenly spaced parts of them."""
    total = sum(end - start for _, start, end in _training_spans(documents))
    if total <= characters:
        return [_read(text, start, end) for text, start, end in _training_spans(documents)]
    length = characters // SAMPLE_PIECES
    begins = iter([total * i // SAMPLE_PIECES for i in range(SAMPLE_PIECES)])
    begin, place, found = next(begins), 0, []  # where the piece and the document begin in all the training text
    for text, start, end in _training_spans(documents):
        after = place + end - start
        while begin < after:
            found.append(_read(text, start + max(begin - place, 0), min(end, start + begin + length - place)))
            if begin + length > after:  # the piece continues in the next document
                break
            begin = next(begins, total)
        place = after
    return found


def _training_spans(documents: Documents) -> Iterator[tuple[Path, int, int]]:
    for part in documents.parts:
        text = part.text
        for index in np.flatnonzero(~part.removed & ~part.val):
            yield text, *part.span(int(index))


def _read(path: Path, start: int, end: int) -> str:
    """The complete characters between two bytes of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start).decode(errors="ignore")
