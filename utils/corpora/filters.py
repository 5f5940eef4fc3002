"""Filters that decide whether a document is worth learning from: each returns True for the documents to keep.

A document is a text, or a mapping with a `text`, so that the functions can be passed to `datasets.Dataset.filter`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

Document: TypeAlias = str | Mapping[str, Any]

# Scripts without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters. Each character counts as a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
ASCII_WORD, WORD = re.compile(r"\w+", re.ASCII), re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*\n\s*")
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # Rae et al. 2021, table A1
SEARCHED = 1_000_000  # characters of a document that are searched for repeated n-grams


def text_of(document: Document) -> str:
    return document if isinstance(document, str) else document["text"]


def paragraph_length_filter(document: Document, min_paragraphs: int = 3, min_characters: int = 3) -> bool:
    """Whether a document has enough paragraphs of a minimum length. A paragraph is a line here.

    Args:
        document: a text, or a mapping with a `text`.
        min_paragraphs: how many lines must be long enough.
        min_characters: how long they must be, not counting white space around them.

    >>> paragraph_length_filter("One.\\nTwo.\\nThree."), paragraph_length_filter("One.\\nTwo.\\n3")
    (True, False)
    """
    long = (line for line in text_of(document).split("\n") if len(line.strip()) >= min_characters)
    return sum(1 for _ in islice(long, min_paragraphs)) >= min_paragraphs


def paragraph_repetition_filter(
    document: Document,
    duplicate_lines: float = 0.3,
    duplicate_paragraphs: float = 0.3,
    top_ngrams: Mapping[int, float] = TOP_NGRAMS,
) -> bool:
    """Whether a document does not repeat itself too much, by rules of Gopher [Rae et al. 2021, table A1].

    Args:
        document: a text, or a mapping with a `text`.
        duplicate_lines: the largest allowed fraction of lines that repeat an earlier line.
        duplicate_paragraphs: the same for paragraphs, which are separated by blank lines.
        top_ngrams: n -> the largest allowed fraction of the characters of all words that belong to the most frequent
            n-gram of words, if it occurs more than once.

    >>> paragraph_repetition_filter("To be, or not to be"), paragraph_repetition_filter("Buy now!\\n" * 10)
    (False, False)
    >>> paragraph_repetition_filter("It was the best of times, it was the worst of times, it was the age of wisdom")
    False
    """
    return repetition(document, duplicate_lines, duplicate_paragraphs, top_ngrams) is None


def repetition(
    document: Document, duplicate_lines: float, duplicate_paragraphs: float, top_ngrams: Mapping[int, float]
) -> str | None:
    """A description of what a document repeats too often; None if there is nothing."""
    text = text_of(document)
    for name, parts, most in (
        ("lines", text.split("\n"), duplicate_lines),
        ("paragraphs", PARAGRAPH_BREAK.split(text), duplicate_paragraphs),
    ):
        share, example = _duplicates(part.strip() for part in parts)
        if share > most:
            return f"{share:.0%} duplicate {name}: {example}"
    words = words_of(text[:SEARCHED])
    length = sum(map(len, words))
    most_of_a_word = max((len(word) * count for word, count in Counter(words).items()), default=0)
    for n, most in top_ngrams.items():
        if n * most_of_a_word <= most * length:  # an n-gram occurs at most as often as each of its words
            continue
        ngram, characters = _top_ngram(words, n)
        if characters > most * length:
            return f"{characters / length:.0%} are one {n}-gram: {' '.join(ngram)}"
    return None


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; in scripts without spaces, each character is a word.

    >>> words_of("The GPT-2 模型")
    ['the', 'gpt', '2', '模', '型']
    """
    return (ASCII_WORD if text.isascii() else WORD).findall(text.lower())


def _duplicates(parts: Iterable[str]) -> tuple[float, str]:
    """The fraction of the parts that repeat an earlier one, and the most frequent part; empty parts do not count."""
    counts = Counter(filter(None, parts))
    total = counts.total()
    return ((total - len(counts)) / total, counts.most_common(1)[0][0]) if total else (0.0, "")


def _top_ngram(words: Sequence[str], n: int) -> tuple[tuple[str, ...], int]:
    """The most frequent n-gram, and the characters of all its occurrences; () and 0 if every n-gram occurs once."""
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return (), 0
    ngram = max((ngram for ngram, count in counts.items() if count == most), key=lambda ngram: sum(map(len, ngram)))
    return ngram, most * sum(map(len, ngram))
