"""The steps of a cleaning pipeline: what each looks for, and its thresholds.

A step is a pure function of one text; it is idempotent, and takes time linear in the length of the text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
)

from utils.corpora.filters import paragraph_length_filter, repetition
from utils.corpora.language import check_languages, language_of
from utils.runs.secrets import PRIVATE_KEY, secrets_in
from utils.terminal.words import counted, one_line

WINDOW = 400  # characters around a place that are searched for secrets and e-mail addresses before they are shown
SHOWN = 120  # characters of an example
BEFORE = 30  # characters of an example before the place that it shows
MASK = r"^<\w{1,30}>$"  # no step takes such a text for an address, a secret or a word

Share = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)]
Count = Annotated[StrictInt, Field(ge=0)]


class Result(NamedTuple):
    """The result of a step for one text.

    text: the new text; None if the document is removed.
    changes: number of things removed or changed; 1 if the document is removed for its length, language and the like.
    example: one of these things.
    """

    text: str | None
    changes: int = 0
    example: str = ""


class Step(BaseModel):
    """A step with its thresholds.

    unit: the thing that `Result.changes` counts.
    expects: threshold -> description of its valid values, for error messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    unit: ClassVar[str] = "document"
    expects: ClassVar[dict[str, str]] = {}

    def apply(self, text: str) -> Result:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ masks

ADDRESS = re.compile(  # ASCII, because Chinese text may directly touch an address
    r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)


def email_spans(text: str) -> list[tuple[int, int]]:
    """The spans of the e-mail addresses in a text."""
    return [match.span() for match in ADDRESS.finditer(text)] if "@" in text else []


def secret_spans(text: str, mask: str = "<SECRET>") -> list[tuple[int, int]]:
    """The spans of the secrets in a text; masks are not secrets."""
    spans = sorted((secret.start, secret.end) for secret in secrets_in(text))
    return [span for span in spans if not text.startswith(mask, span[0])]


def masked(text: str, spans: Iterable[tuple[int, int]], mask: str) -> tuple[str, int, int]:
    """The text with a mask for each span (overlapping spans count as one), the number of masks, the first position."""
    parts: list[str] = []
    done = count = first = 0
    for start, end in spans:
        if start >= done:
            first = first if count else start
            parts += [text[done:start], mask]
            count += 1
        done = max(done, end)
    return "".join((*parts, text[done:])), count, first


def example_text(text: str) -> str:
    """An example as a report shows it: one line of limited length, without e-mail addresses and secrets."""
    line = one_line(_without_secrets(text[: WINDOW + SHOWN]).strip(" \n\t"))
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


def _without_secrets(text: str) -> str:
    text, *_ = masked(text, secret_spans(text), "<SECRET>")
    text, *_ = masked(text, email_spans(text), "<EMAIL>")
    return text


def _after_secret(text: str, place: int) -> int:
    """The end of the secret that a place lies in; the place itself if it lies in none."""
    first = max(place - WINDOW, 0)
    spans = [(first + start, first + end) for start, end in secret_spans(text[first : place + WINDOW])]
    if "PRIVATE KEY" in text:
        spans += [match.span() for match in PRIVATE_KEY.finditer(text)]
    return max((end for start, end in spans if start < place < end), default=place)


def _around(text: str, place: int) -> str:
    """The text around a place or, if the place lies in a secret, around the end of the secret."""
    place = _after_secret(text, place)
    before = text[:place] if "PRIVATE KEY" in text else text[max(place - WINDOW, 0) : place]
    before = _without_secrets(PRIVATE_KEY.sub("<SECRET>", before)[-WINDOW:])
    return f"{'...' if len(before) > BEFORE else ''}{before[-BEFORE:]}{text[place : place + WINDOW]}"


# ------------------------------------------------------------------------------------------------ changing a text


class UnicodeNormalization(Step):
    """Gives equal characters one form: é becomes one code point in NFC, and the ligature ﬁ two letters in NFKC.

    Only the first 64 of consecutive combining marks are kept: no real text has more, and sorting them takes quadratic
    time.
    """

    name = "unicode_normalization"
    unit = "text"
    expects = {"form": "NFC, NFKC, NFD or NFKD"}
    form: Literal["NFC", "NFKC", "NFD", "NFKD"] = "NFC"

    MAY_BE_MARKS: ClassVar[re.Pattern[str]] = re.compile(r"[^\w\s\x00-\x7f]{65}")

    def apply(self, text: str) -> Result:
        if text.isascii():
            return Result(text)
        normal = self._without_many_marks(unicodedata.normalize(self.form, self._without_many_marks(text)))
        if normal == text:
            return Result(text)
        place = next((i for i, (a, b) in enumerate(zip(text, normal, strict=False)) if a != b), len(normal))
        if _after_secret(text, place) != place:
            return Result(normal, 1, "<SECRET>")
        before, after = (_without_secrets(each[place : place + WINDOW])[:20] for each in (text, normal))
        return Result(normal, 1, f"{one_line(before)} -> {one_line(after)}")

    def _without_many_marks(self, text: str) -> str:
        return _many_marks().sub(r"\1", text) if self.MAY_BE_MARKS.search(text) else text


@functools.cache
def _many_marks() -> re.Pattern[str]:
    marks = "".join(chr(point) for point in range(0x300, 0x20000) if unicodedata.combining(chr(point)))
    return re.compile(f"([{marks}]{{64}})[{marks}]+")


class ControlCharacters(Step):
    """Removes characters that are not text: control characters, terminal colours, zero-width spaces, directional
    overrides, tags, halves of surrogate pairs. Every kind of line break becomes a newline."""

    name = "control_characters"
    unit = "character"
    BREAKS: ClassVar[re.Pattern[str]] = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
    ESCAPE: ClassVar[re.Pattern[str]] = re.compile("\x1b\\[[0-9;?]{0,30}[ -/]{0,5}[@-~]")
    CONTROL: ClassVar[re.Pattern[str]] = re.compile(
        "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
        "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
    )

    def apply(self, text: str) -> Result:
        text, breaks = self.BREAKS.subn("\n", text)
        first = self.CONTROL.search(text)
        if first is None:
            return Result(text, breaks, "a line break" if breaks else "")
        example = _around(text, first.start())
        text, escapes = self.ESCAPE.subn("", text)
        text, controls = self.CONTROL.subn("", text)
        return Result(text, breaks + escapes + controls, example)


class BoilerplateLines(Step):
    """Removes short lines with phrases that are typical of the boilerplate of web pages."""

    name = "boilerplate_lines"
    unit = "line"
    expects = {"phrases": "a list of phrases", "max_characters": "an integer >= 0"}
    phrases: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "accept cookies",
        "all rights reserved",
        "click here",
        "cookie policy",
        "enable javascript",
        "lorem ipsum",
        "privacy policy",
        "share on facebook",
        "sign up for our newsletter",
        "skip to content",
        "subscribe to our newsletter",
        "terms of service",
        "terms of use",
        "uses cookies",
    )
    max_characters: Count = 200

    def apply(self, text: str) -> Result:
        lowered = text.lower()
        phrases = [phrase for phrase in (phrase.lower() for phrase in self.phrases) if phrase in lowered]
        if not phrases:
            return Result(text)
        kept: list[str] = []
        removed: list[str] = []
        for line in text.split("\n"):
            short = len(line) <= self.max_characters and line.lower()
            (removed if short and any(phrase in short for phrase in phrases) else kept).append(line)
        return Result("\n".join(kept), len(removed), removed[0] if removed else "")


class Emails(Step):
    """Replaces each e-mail address by a mask."""

    name = "emails"
    unit = "replacement"
    expects = {"mask": "a name in angle brackets, such as <EMAIL>"}
    mask: Annotated[str, Field(pattern=MASK)] = "<EMAIL>"

    def apply(self, text: str) -> Result:
        return _changed(*masked(text, email_spans(text), self.mask))


class Secrets(Step):
    """Replaces each private key, token and password that `utils.runs.secrets` finds by a mask."""

    name = "secrets"
    unit = "replacement"
    expects = {"mask": "a name in angle brackets, such as <SECRET>"}
    mask: Annotated[str, Field(pattern=MASK)] = "<SECRET>"

    def apply(self, text: str) -> Result:
        return _changed(*masked(text, secret_spans(text, self.mask), self.mask))


def _changed(text: str, changes: int, first: int) -> Result:
    return Result(text, changes, _around(text, first) if changes else "")


# ------------------------------------------------------------------------------------------------ removing a document


class DocumentLength(Step):
    """Removes a document that is too short or too long."""

    name = "document_length"
    expects = {"min_characters": "an integer >= 0", "max_characters": "an integer >= 0 or none"}
    min_characters: Count = 100
    max_characters: Count | None = None

    @field_validator("max_characters")
    @classmethod
    def _is_not_below_the_least(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("min_characters", 0):
            raise ValueError(f"{value:,} is below min_characters ({info.data['min_characters']:,})")
        return value

    def apply(self, text: str) -> Result:
        return self.judge(len(text.strip()), text)

    def judge(self, length: int, text: str) -> Result:
        """Judge a document by its length; `text` may be only its beginning."""
        good = self.min_characters <= length and (self.max_characters is None or length <= self.max_characters)
        return Result(text) if good else Result(None, 1, f"{counted(length, 'character')}: {text[:WINDOW]}")


class ParagraphLength(Step):
    """Removes a document with too few paragraphs (lines) of a minimum length."""

    name = "paragraph_length"
    expects = {"min_paragraphs": "an integer >= 0", "min_characters": "an integer >= 0"}
    min_paragraphs: Count = 3
    min_characters: Count = 3

    def apply(self, text: str) -> Result:
        return self.judge(paragraph_length_filter(text, self.min_paragraphs, self.min_characters), text)

    def judge(self, good: bool, text: str) -> Result:
        """The result if the document has enough paragraphs or not; `text` may be only its beginning."""
        return Result(text) if good else Result(None, 1, f"fewer than {self.min_paragraphs}: {text[:WINDOW]}")


class Repetition(Step):
    """Removes a document that repeats itself too much, by rules of Gopher [Rae et al. 2021, table A1]."""

    name = "repetition"
    expects = dict.fromkeys(
        ("duplicate_lines", "duplicate_paragraphs", "top_2gram", "top_3gram", "top_4gram"), "a number from 0 to 1"
    )
    duplicate_lines: Share = 0.30
    duplicate_paragraphs: Share = 0.30
    top_2gram: Share = 0.20
    top_3gram: Share = 0.18
    top_4gram: Share = 0.16

    def apply(self, text: str) -> Result:
        ngrams = {2: self.top_2gram, 3: self.top_3gram, 4: self.top_4gram}
        found = repetition(text, self.duplicate_lines, self.duplicate_paragraphs, ngrams)
        if found is None:
            return Result(text)
        # The example has words in lower case without punctuation, in which a secret could not be recognised any more.
        shown = repetition(_without_secrets(text), self.duplicate_lines, self.duplicate_paragraphs, ngrams)
        return Result(None, 1, (shown or found.partition(":")[0])[:WINDOW])


def _norwegian(languages: Any) -> Any:
    """Restore the code of Norwegian, no, which YAML reads as false."""
    return (
        ["no" if language is False else language for language in languages]
        if isinstance(languages, list)
        else languages
    )


def _known(languages: tuple[str, ...]) -> tuple[str, ...]:
    check_languages(languages)
    return languages


class Language(Step):
    """Removes a document that is not clearly in one of the given languages (ISO 639 codes)."""

    name = "language"
    expects = {"languages": "a list of codes such as [en, de]", "min_probability": "a number from 0 to 1"}
    languages: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_norwegian), AfterValidator(_known)] = (
        "en",
    )
    min_probability: Share = 0.5

    def apply(self, text: str) -> Result:
        language, probability = language_of(text)
        if language in self.languages and probability >= self.min_probability:
            return Result(text)
        return Result(None, 1, f"{language} ({probability:.2f}): {text[:WINDOW]}")


# ------------------------------------------------------------------------------------------------ comparing documents


class ExactDuplicates(Step):
    """Removes a document that equals an earlier one."""

    name = "exact_duplicates"


class NearDuplicates(Step):
    """Removes a document that equals or nearly equals an earlier one (`utils.preparation.duplicates`)."""

    name = "near_duplicates"
    expects = {"threshold": "a number from 0.7 to 1"}
    threshold: Annotated[StrictFloat | StrictInt, Field(ge=0.7, le=1)] = 0.8


COMPARING = (ExactDuplicates, NearDuplicates)
STEPS: dict[str, type[Step]] = {
    kind.name: kind
    for kind in (
        *(UnicodeNormalization, ControlCharacters, BoilerplateLines, Emails, Secrets),
        *(DocumentLength, ParagraphLength, Repetition, Language, *COMPARING),
    )
}
