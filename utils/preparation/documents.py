"""Between the two passes of a preparation: which documents are kept, and which are for validation."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.preparation.duplicates import find_duplicates, find_leaks
from utils.preparation.reading import COMPARED_CHARACTERS, DOCUMENT, compared_text

CUT_WINDOW = 1 << 12  # bytes before a cut that are searched for the end of a line or a word
KEYS = 1 << 64  # the keys of documents are below this


@dataclass
class TextPart:
    """The documents of one part of the first pass.

    documents: (n,) of dtype `DOCUMENT`, but with records counted from the start of their file.
    removed, val: (n,) bool: the documents that are left out, and those for validation.
    """

    stem: Path
    documents: np.ndarray
    removed: np.ndarray
    val: np.ndarray

    @property
    def text(self) -> Path:
        return Path(f"{self.stem}.text")

    def span(self, number: int) -> tuple[int, int]:
        """The bytes at which a document begins and ends."""
        ends = self.documents["end"]
        return int(ends[number - 1]) if number else 0, int(ends[number])


@dataclass
class Documents:
    """All documents of a preparation, numbered through the parts that contain them.

    leaks: number among the validation documents -> number, among the training documents, of one that it nearly equals.
    """

    parts: Sequence[TextPart]
    leaks: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def _firsts(self) -> list[int]:
        return list(itertools.accumulate((len(part.documents) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def place(self, number: int) -> tuple[TextPart, int]:
        """The part that contains a document, and the number of the document in that part."""
        index = bisect.bisect_right(self._firsts, number) - 1
        return self.parts[index], number - self._firsts[index]

    def compared_text(self, number: int) -> str:
        """The text that represents a document in comparisons."""
        part, index = self.place(number)
        start, end = part.span(index)
        with part.text.open("rb") as file:
            file.seek(start)
            text = file.read(min(end - start, 4 * COMPARED_CHARACTERS)).decode(errors="ignore")
        beginning, length = text[:COMPARED_CHARACTERS], len(text) + (end - start > 4 * COMPARED_CHARACTERS)
        return compared_text(beginning, length, int(part.documents["key"][index]).to_bytes(8, "little"))

    def kept(self, val: bool | None = None) -> np.ndarray:
        """The numbers of the documents that are kept, ascending: of all, or of those for validation or training."""
        chosen = [np.zeros(0, dtype=np.int64)]
        for first, part in zip(self._firsts, self.parts, strict=False):
            stays = ~part.removed if val is None else ~part.removed & (part.val == val)
            chosen.append(first + np.flatnonzero(stays))
        return np.concatenate(chosen)

    def fingerprints(self) -> Iterator[bytes]:
        """The fingerprints of all documents, in order."""
        for part in self.parts:
            if count := len(part.documents):
                content = Path(f"{part.stem}.fingerprints").read_bytes()
                width = len(content) // count
                yield from (content[place : place + width] for place in range(0, len(content), width))

    def remove(self, numbers: Mapping[int, int]) -> None:
        for number in numbers:
            part, index = self.place(number)
            part.removed[index] = True

    def find_duplicates(self, threshold: float | None) -> dict[int, int]:
        """Document -> the earlier document that it repeats."""
        return find_duplicates(self.fingerprints(), self.compared_text, threshold)

    def copies(self) -> np.ndarray:
        """(n,) bool: the documents whose text an earlier one has, which may itself be a near-duplicate."""
        keys = np.concatenate([part.documents["key"] for part in self.parts])
        is_copy = np.ones(len(keys), dtype=bool)
        is_copy[np.unique(keys, return_index=True)[1]] = False
        return is_copy

    def split(self, val_fraction: float) -> None:
        """Choose the documents for validation by the hash of their text, so that adding documents moves no others.

        With two or more documents, each split gets at least one. Equal documents go into the same split, unless all are
        equal.
        """
        limit = min(int(val_fraction * KEYS), KEYS - 1)
        counts = {False: 0, True: 0}
        for part in self.parts:
            part.val = part.documents["key"] < np.uint64(limit)
            counts[True] += int((part.val & ~part.removed).sum())
            counts[False] += int((~part.val & ~part.removed).sum())
        if 0 in counts.values() and sum(counts.values()) >= 2:
            places = [self.place(int(number)) for number in self.kept()]
            keys = [int(part.documents["key"][index]) for part, index in places]
            nearest = min(keys) if counts[True] == 0 else max(keys)
            equal = [place for place, key in zip(places, keys, strict=True) if key == nearest]
            for part, index in equal[:1] if len(equal) == len(places) else equal:
                part.val[index] = counts[True] == 0

    def find_leaks(self) -> None:
        """Find the documents for validation that nearly equal one for training."""
        train, val = self.kept(False), self.kept(True)

        def of(numbers: np.ndarray) -> Iterator[bytes]:
            chosen = np.zeros(len(self), dtype=bool)
            chosen[numbers] = True
            return itertools.compress(self.fingerprints(), chosen)

        self.leaks = find_leaks(
            of(train),
            of(val),
            lambda number: self.compared_text(int(train[number])),
            lambda number: self.compared_text(int(val[number])),
        )


def load_documents(stems: Sequence[Path], bases: Sequence[int]) -> Documents:
    """Load the documents of all parts.

    Args:
        stems: path of each part, without the suffix.
        bases: for each part, the number of records before it in the same file.
    """
    parts = []
    for stem, base in zip(stems, bases, strict=True):
        documents = np.fromfile(f"{stem}.documents", dtype=DOCUMENT)
        documents["record"] += np.uint32(base)
        parts.append(TextPart(stem, documents, *np.zeros((2, len(documents)), dtype=bool)))
    return Documents(parts)


def cut_single(documents: Documents, val_fraction: float) -> None:
    """Split the only document by position: its beginning is for training, its end for validation.

    If there is the end of a line or a word shortly before the exact position, the cut is there.
    """
    part, index = documents.place(documents.kept()[0])
    start, end = part.span(index)
    place = start + int((end - start) * (1 - val_fraction))
    begin = max(start, place - CUT_WINDOW)
    with part.text.open("rb") as file:
        file.seek(begin)
        window = file.read(place - begin)
        following = file.read(4)
    cut = max(window.rfind(b"\n"), window.rfind(b" ") if b"\n" not in window else -1) + 1
    if not cut:  # between two characters
        cut = len(window) + next((i for i, byte in enumerate(following) if not 0x80 <= byte < 0xC0), 0)
    first, second = part.documents[index : index + 1].copy(), part.documents[index : index + 1].copy()
    first["end"] = begin + cut
    rows = np.concatenate([part.documents[:index], first, second, part.documents[index + 1 :]])
    part.removed = np.concatenate([part.removed[:index], [False, False], part.removed[index + 1 :]])
    part.val = np.concatenate([part.val[:index], [False, True], part.val[index + 1 :]])
    part.documents = rows
    documents.__dict__.pop("_firsts", None)
