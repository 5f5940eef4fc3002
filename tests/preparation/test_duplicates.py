"""Planted duplicates are found and nothing else is; of a document and its duplicates, one is kept."""

from __future__ import annotations

import doctest
import random
import sys
from collections.abc import Sequence

import pytest

from benchmarks.data_duplicates import edited_copy, planted, random_text, reference_similarity
from utils.errors import UserError
from utils.preparation import duplicates
from utils.preparation.duplicates import deduplication, find_duplicates, find_leaks, fingerprint


def jaccard(a: str, b: str) -> float:
    return duplicates._jaccard(duplicates._shingles(a), duplicates._shingles(b))


def found(texts: Sequence[str], threshold: float | None = 0.8) -> dict[int, int]:
    return find_duplicates(map(fingerprint, texts), texts.__getitem__, threshold)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The quick brown fox", "The quick brown dog"),
        ("", ""),
        ("", "x"),
        ("x", "x"),
        ("short", "shorter"),
        ("A  text\nwith white space", "a text with white space"),
        ("从前有一个小女孩住在森林里", "从前有一个小男孩住在森林里"),
        ("lone \ud800 surrogates", "lone \ud800 surrogate"),
        ("abc" * 200_000, "abc" * 200_001),
    ],
)
def test_similarity_is_the_jaccard_index_of_runs_of_9_characters(a: str, b: str) -> None:
    assert jaccard(a, b) == reference_similarity(a, b)
    assert jaccard(b, a) == jaccard(a, b)
    assert len(fingerprint(a)) == len(fingerprint(b)) == 116


def test_a_long_text_hashed_in_parts_has_the_same_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(random.Random(0), 3000)
    whole = fingerprint(text), sorted(duplicates._shingles(text))
    monkeypatch.setattr(duplicates, "HASHED_CHARACTERS", 100)
    assert (fingerprint(text), sorted(duplicates._shingles(text))) == whole


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    """Half of the planted copies are just above the threshold, the others just below."""
    data = planted(documents=1000)
    assert len(data.repeats()) == 100
    assert found(data.texts) == data.repeats()


def test_the_order_of_documents_decides_which_is_kept() -> None:
    texts = [
        "a long enough text, the first",
        "another text entirely",
        "a long enough text, the First",
        "third",
        "third",
    ]
    assert found(texts) == {2: 0, 4: 3}
    assert found(texts[::-1]) == {1: 0, 4: 2}
    assert found(texts, None) == {4: 3}


def test_a_document_that_repeats_only_a_removed_one_is_kept() -> None:
    """b is near a, and c near b but not near a: once b is removed, c repeats nothing."""
    generator = random.Random(3)
    a = random_text(generator, 1000)
    b, _ = edited_copy(generator, a, 0.8, 0.82)
    c, _ = edited_copy(generator, b, 0.8, 0.82)
    assert jaccard(a, c) < 0.8 <= jaccard(b, c)
    assert found([a, b, c]) == {1: 0}
    assert found([a, b, c, b, c]) == {1: 0, 3: 0, 4: 2}


def test_texts_at_the_threshold_are_duplicates() -> None:
    text = "0123456789abcdefgh"  # 10 shingles
    other = "0123456789abcdefghij"  # 12, so the similarity is 10 / 12
    assert found([text, other], 10 / 12) == {1: 0}
    assert found([text, other], 10 / 12 + 1e-9) == {}
    assert found([text, text.upper()], 1.0) == {1: 0}


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["x", "x", "y"]])
def test_few_and_short_texts(texts: list[str]) -> None:
    assert found(texts) == {number: texts.index(text) for number, text in enumerate(texts) if text in texts[:number]}


def test_thousands_of_candidates_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text shares a band with all others, but none are similar."""
    compared = []
    monkeypatch.setattr(duplicates, "_jaccard", lambda a, b: compared.append(1) or 0.0)
    prints = [number.to_bytes(16, "big") + bytes(100) for number in range(400)]
    assert find_duplicates(prints, lambda number: f"text {number}") == {}
    assert len(compared) < 400 * duplicates.MOST_CANDIDATES


def test_leaks_are_validation_documents_that_training_contains() -> None:
    generator = random.Random(5)
    train = [random_text(generator, 500) for _ in range(40)]
    val = [train[7], "unseen", edited_copy(generator, train[3], 0.85, 0.9)[0], random_text(generator, 500), train[7]]
    arguments = [map(fingerprint, train), map(fingerprint, val), train.__getitem__, val.__getitem__]
    assert find_leaks(*arguments) == {0: 7, 2: 3, 4: 7}  # type: ignore[arg-type]
    assert find_leaks([], map(fingerprint, val), train.__getitem__, val.__getitem__) == {}
    assert find_leaks(map(fingerprint, train), [], train.__getitem__, val.__getitem__) == {}


def test_deduplication_keeps_documents_as_they_are() -> None:
    records = [{"text": "one and the same text", "id": 1}, {"text": "One and the same  text", "id": 2}]
    assert deduplication(records) == records[:1]
    assert deduplication(records, threshold=None) == records
    assert deduplication(["b", "a", "b", "c", "a", "b"], threshold=None) == ["b", "a", "c"]
    assert deduplication([]) == []
    with pytest.raises(UserError, match=r"threshold must be from 0.7 to 1, not 0.5"):
        deduplication(["a"], threshold=0.5)


def test_a_missing_package_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="pip install rensa"):
        fingerprint("a")


def test_the_examples_in_docstrings_run() -> None:
    assert doctest.testmod(duplicates).failed == 0
