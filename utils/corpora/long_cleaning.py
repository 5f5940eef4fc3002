"""Cleaning of a document that is too long for memory: it is changed piece by piece, and kept or removed as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from utils.corpora.cleaning import Cleaned, Pipeline
from utils.corpora.steps import (
    COMPARING,
    WINDOW,
    DocumentLength,
    Language,
    ParagraphLength,
    Repetition,
    Result,
    Step,
    example_text,
)

JUDGED = 1 << 22  # characters at the beginning of a long document that `language` and `repetition` judge it by


class LongCleaning:
    """A pipeline that is applied to one document in pieces; wherever possible, a piece ends at a line break."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._steps = [(step.name, _in_pieces(step)) for step in pipeline.steps if not isinstance(step, COMPARING)]

    def add(self, piece: str) -> str:
        """Clean the next piece."""
        for _, step in self._steps:
            piece = step.add(piece)
        return piece

    def finish(self) -> Cleaned:
        """The result for the whole document; the text of a document that is kept is left empty."""
        counts: dict[str, int] = {}
        examples: dict[str, str] = {}
        for name, step in self._steps:
            result = step.finish()
            if result.changes:
                counts[name], examples[name] = result.changes, example_text(result.example)
            if result.text is None:
                return Cleaned(None, name, counts, examples)
        return Cleaned("", None, counts, examples)


class _InPieces(Protocol):
    """A step that is given a document in pieces: `add` returns each for the next step, `finish` the `Result`."""

    def add(self, piece: str) -> str: ...
    def finish(self) -> Result: ...


def _in_pieces(step: Step) -> _InPieces:
    if isinstance(step, DocumentLength):
        return _Length(step)
    if isinstance(step, ParagraphLength):
        return _Paragraphs(step)
    return _Beginning(step) if isinstance(step, Language | Repetition) else _Change(step)


@dataclass
class _Change:
    """A step that changes the text, applied to each piece."""

    step: Step
    changes: int = 0
    example: str = ""
    has_text: bool = False

    def add(self, piece: str) -> str:
        text, changes, example = self.step.apply(piece)
        assert text is not None
        self.changes += changes
        self.example = self.example or example
        self.has_text = self.has_text or bool(text and not text.isspace())
        return text

    def finish(self) -> Result:
        return Result(None if self.changes and not self.has_text else "", self.changes, self.example)


@dataclass
class _Beginning:
    """A step that judges a document, applied to its beginning."""

    step: Step
    beginning: list[str] = field(default_factory=list)
    left: int = JUDGED

    def add(self, piece: str) -> str:
        if self.left > 0:
            self.beginning.append(piece[: self.left])
            self.left -= len(piece)
        return piece

    def finish(self) -> Result:
        return self.step.apply("".join(self.beginning))


@dataclass
class _StrippedLength:
    """The length of a text that comes in pieces, without the white space around it."""

    length: int = 0
    blank: int = 0  # characters of white space after them

    def add(self, piece: str) -> None:
        text = piece if self.length else piece.lstrip()
        stripped = text.rstrip()
        if stripped:
            self.length += self.blank + len(stripped)
            self.blank = 0
        self.blank += len(text) - len(stripped)


@dataclass
class _Length:
    """`document_length` with a running total."""

    step: DocumentLength
    stripped: _StrippedLength = field(default_factory=_StrippedLength)
    beginning: str = ""

    def add(self, piece: str) -> str:
        self.stripped.add(piece)
        self.beginning += piece[: WINDOW - len(self.beginning)]
        return piece

    def finish(self) -> Result:
        return self.step.judge(self.stripped.length, self.beginning)


@dataclass
class _Paragraphs:
    """`paragraph_length` with a running count; the last line of a piece may continue in the next."""

    step: ParagraphLength
    count: int = 0
    line: _StrippedLength = field(default_factory=_StrippedLength)
    beginning: str = ""

    def add(self, piece: str) -> str:
        self.beginning += piece[: WINDOW - len(self.beginning)]
        if self.count < self.step.min_paragraphs:
            first, *lines = piece.split("\n")
            self.line.add(first)
            for line in lines:
                self.count += self.line.length >= self.step.min_characters
                self.line = _StrippedLength()
                self.line.add(line)
        return piece

    def finish(self) -> Result:
        count = self.count + (self.line.length >= self.step.min_characters)
        return self.step.judge(count >= self.step.min_paragraphs, self.beginning)
