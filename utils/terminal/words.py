"""How text, numbers, sizes and durations are written for people, and the colours of curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from utils.errors import number_text

if TYPE_CHECKING:
    from rich.text import Text

HASH_LENGTH = 10  # characters of a hash or commit that are shown
HEX_COLORS = ("#3b6fb6", "#e07b1f", "#2f9e63", "#d1495b", "#8a63c4", "#1b9aaa", "#b8860b", "#7a7f87")  # of curves


def printable(text: str) -> str:
    """Escape each character of `text` that a terminal would interpret or hide, except line breaks and tabs.

    >>> printable("red: \\x1b[31m")
    'red: \\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`text` as `printable` writes it, with line breaks and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def json_text(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """`value` as JSON that is safe to print: with an escape for each character that `printable` would escape.

    >>> json_text("\\x9b31m ü")
    '"\\\\u009b31m ü"'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def setting_text(value: Any) -> str:
    """The value of a setting as text.

    >>> [setting_text(value) for value in (None, True, 3e-4, ("a", "b"))]
    ['none', 'on', '0.0003', 'a, b']
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return number_text(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def column_text(column: str, value: Any) -> str:
    """A value in a table of runs, on one line, written as its column requires; empty for None."""
    if value is None or value == "":
        return ""
    if column in ("age", "duration"):
        return rough_duration(value)
    if column == "commit" or column.endswith("_hash"):
        return one_line(str(value)[:HASH_LENGTH])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if column in ("steps", "parameters", "best_step") else str(value)
    if isinstance(value, float):
        return loss_text(value) if column.endswith(("loss", "bits_per_byte")) else number_text(value)
    return one_line(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def loss_text(value: float | None) -> str:
    """A loss with four decimals; empty for None."""
    return "" if value is None else f"{value:.4f}"


def ratio_text(value: float) -> str:
    """A ratio with two decimals; below 0.1, with two significant digits.

    >>> [ratio_text(value) for value in (1234.567, 0.5, 0.00384)]
    ['1,234.57', '0.50', '0.0038']
    """
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def bits_text(loss: float | None, bits: float | None) -> str:
    """A loss in bits per byte, to follow the loss in nats per token; empty if a token is about a byte."""
    if loss is None or not bits or not math.isfinite(bits) or abs(loss / math.log(2) / bits - 1) < 0.1:
        return ""
    return f" ({bits:.4f} bits/byte)"


def duration(seconds: float) -> str:
    """A duration to the second: "42 s", "3:05 min" or "2:10:00 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def rough_duration(seconds: float) -> str:
    """A duration as in `duration` below an hour, then to the minute ("2:10 h"), from two days on in days ("12 d")."""
    if round(seconds) < 3600:
        return duration(seconds)
    minutes = round(seconds / 60)
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else f"{minutes // 60}:{minutes % 60:02d} h"


def time_text(moment: str) -> str:
    """A recorded time, which is in UTC, to the second: "2026-01-31 14:25:01 UTC"."""
    return f"{moment[:19].replace('T', ' ')} UTC"


def size(count: float) -> str:
    """A number of bytes in decimal units: "1.5 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 file", "2,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def fact_lines(rows: Iterable[tuple[str, str]], title: str | None = None, copied: bool = False) -> Text:
    """One line for each (name, value), with the values aligned, also in the continuation lines on a narrow terminal.

    Args:
        copied: the values are commands or data for copying, whose lines must not be broken.
    """
    from rich.style import Style
    from rich.text import Text

    from utils.terminal.wrapping import INDENT

    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + 2
    text = Text(f"{title}\n" if title else "", style="")
    text.stylize("bold")
    for name, value in rows:
        text.append(f"{name:<{width}}", style=Style(color="cyan", meta={INDENT: width})).append(f"{value}\n")
    text = text[:-1]
    text.no_wrap = copied
    return text
