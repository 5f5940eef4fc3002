"""The text in a JSON object. An object of hundreds of megabytes is read without holding all of it in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from utils.errors import nearest

PIECE = 1 << 20  # bytes of a long text that are decoded at a time
SHOWN_FIELDS = 8
# Strings, with the colon that follows a key, and brackets. Possessive quantifiers keep no backtracking stack.
TOKEN = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")(\s*+:)?+|[{}\[\]]', re.DOTALL)
# Complete characters and escapes; a surrogate pair of escapes is kept together.
ESCAPES = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB]..\\u....|\\u[dD][89abAB]..(?=[^\\]|\\[^u])|\\u(?![dD][89abAB])....|\\[^u])*+",
    re.DOTALL,
)
KEY = 1000  # a key of at least this many bytes is not compared with the field


class RecordError(ValueError):
    """A record has no usable text. The message says why, but not where."""


def text_of(line: bytes, field: str) -> str:
    """The string in `field` of a JSON object.

    Raises:
        RecordError: the line is not JSON or not an object, or the field is missing or not a string.
        UnicodeDecodeError: the line is not UTF-8.
    """
    import orjson

    try:
        value = orjson.loads(line)
    except ValueError:  # not JSON, or the extensions of Python's own writer: NaN, half a surrogate pair
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecordError(f"expected a JSON object, got {kind_of(value)}")
    return checked_text(value.get(field, value), value, field)


def checked_text(text: Any, fields: Any, field: str) -> str:
    """`text` if it is a string; raises RecordError otherwise. Pass `fields` as `text` if the field is missing."""
    if text is fields:
        raise RecordError(f"no field {field!r}: {fields_text(fields, field)}")
    if not isinstance(text, str):
        raise RecordError(f"field {field!r} is {kind_of(text)}, expected a text")
    return text


def fields_text(names: Any, field: str) -> str:
    """The fields that a record has instead of `field`, in words."""
    names = list(map(str, names))
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return f"it has {', '.join(names[:SHOWN_FIELDS]) or 'none'}{more}{nearest(field, names)}"


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def long_text_of(line: Any, field: str, replace: bool = False) -> Iterator[str]:
    """Like `text_of`, but yield the string in pieces.

    Args:
        line: a memory map of the line.
        replace: put U+FFFD in place of bytes that are not UTF-8.
    """
    start, end = _span(line, field)
    place = start
    while place < end:
        stop = min(place + PIECE, end)
        found = ESCAPES.match(line, place, stop)
        reached = found.end() if found and stop < end else end
        while place < reached < end and 0x80 <= line[reached] < 0xC0:  # within a character
            reached -= 1
        reached = reached if reached > place else end
        try:
            text = line[place:reached].decode(errors="replace" if replace else "strict")
            yield json.loads(f'"{text}"', strict=False)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise RecordError(f"not JSON: {error}") from None
        place = reached


def _span(line: Any, field: str) -> tuple[int, int]:
    """The bytes at which the text of the field begins and ends."""
    depth, key, span, names = 0, None, None, []
    first = re.match(rb"\s*+", line)
    assert first is not None
    if line[first.end() : first.end() + 1] != b"{":
        raise RecordError("not a JSON object")
    for found in TOKEN.finditer(line):
        token = line[found.start()]
        if token in b"{[":
            depth += 1
        elif token in b"}]":
            depth -= 1
        elif depth == 1 and found[2] is not None:
            key = json.loads(found[1]) if found.end(1) - found.start(1) < KEY else None
            names.append(str(key))
            if key == field:
                span = found.end(), found.end()  # replaced if a string follows
            continue
        elif depth == 1 and key == field:
            span = found.start(1) + 1, found.end(1) - 1
        key = None
    if depth:
        raise RecordError("not JSON: it ends within an object")
    if span is None:
        raise RecordError(f"no field {field!r}: {fields_text(names, field)}")
    if line[span[0] - 1] != ord('"'):
        raise RecordError(f"field {field!r} is not a text")
    return span
