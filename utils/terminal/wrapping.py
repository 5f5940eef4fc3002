"""Wrapping of lines that are too long for a terminal: between fields, if two spaces separate them, or between words.

What people copy is not broken, however long it is: a word (a path, an id), quoted text, and a command in a sentence.
The terminal itself breaks those at the end of its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

INDENT = "indent"  # a key in the meta of the style that a line begins with: the indent of its continuation lines
UNBROKEN = re.compile(
    r"""
    (?:\S*python'?\ \S+\.py'?|\S*lm-workbench)\ (?:'[^']*'|[^;)'])*[^;)\s][;)]*  # a command, to the end of its clause
    | (?<!\S)(?:'[^']*'|"[^"]*")\S*
    | \S+
    """,
    re.VERBOSE,
)

FIELD = re.compile(r"\S+(?: \S+)*")  # the fields of a line have two or more spaces between them


def wrapped(text: Text, width: int) -> Text:
    """Break `text` into lines of at most `width` columns, as far as words allow; `no_wrap` leaves it unchanged."""
    if text.no_wrap:
        return text
    lines = text.split("\n", allow_blank=True)
    return Text("\n").join(part for line in lines for part in _parts(line, width))


def _parts(line: Text, width: int) -> Iterator[Text]:
    if line.cell_len <= width:
        yield line
        return
    indent = _indent(line)
    words = list(UNBROKEN.finditer(line.plain))
    places = {word.start() for word in words}
    fields = [field for field in FIELD.finditer(line.plain) if field.start() in places]
    starts = [0]
    for word in words:
        margin, name = (indent, 0) if starts[1:] else (0, indent)  # each part has a word, besides the name of a fact
        if word.start() > starts[-1] + name and margin + cell_len(line.plain[starts[-1] : word.end()]) > width:
            field = [field for field in fields if field.start() <= word.start()][-1]
            is_whole = field.start() > starts[-1] + name and indent + cell_len(field.group()) <= width
            starts.append((field if is_whole else word).start())
    first, *others = line.divide(starts[1:])
    for part in (first, *(Text(" " * indent).append_text(other) for other in others)):
        part.rstrip()
        yield part


def _indent(line: Text) -> int:
    """The number of spaces before the continuation lines of `line`."""
    styles = (span.style for span in line.spans if span.start == 0 and isinstance(span.style, Style))
    return max((style.meta.get(INDENT, 0) for style in styles), default=0)
