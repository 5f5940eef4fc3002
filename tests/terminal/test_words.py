"""Formatting values for people."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from utils.terminal import words


def test_the_doctests_of_words_pass() -> None:
    assert doctest.testmod(words).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (False, "off"), (1e-5, "1e-05"), (0.0123456789, "0.0123456789"), (("a", 1), "a, 1"), ("x", "x")],
)
def test_a_setting_is_written_without_losing_digits(value: Any, text: str) -> None:
    assert words.setting_text(value) == text


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("val_loss", 1.23456, "1.2346"),
        ("commit", "0123456789abcdef", "0123456789"),
        ("duration", 7800.0, "2:10 h"),
        ("steps", 12345, "12,345"),
        ("seed", 12345, "12345"),
        ("pinned", True, "yes"),
        ("note", "two\nlines\x1b[2J", r"two\nlines\x1b[2J"),
        ("tag", None, ""),
    ],
)
def test_a_value_is_formatted_according_to_its_column(column: str, value: Any, text: str) -> None:
    assert words.column_text(column, value) == text


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (42, "42 s", "42 s"),
        (59.7, "1:00 min", "1:00 min"),
        (185, "3:05 min", "3:05 min"),
        (3599.7, "1:00:00 h", "1:00 h"),
        (7800, "2:10:00 h", "2:10 h"),
        (1e6, "277:46:40 h", "12 d"),
    ],
)
def test_durations_are_formatted(seconds: float, exact: str, rough: str) -> None:
    assert (words.duration(seconds), words.rough_duration(seconds)) == (exact, rough)
