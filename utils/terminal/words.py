"""How values, sizes and durations are written for people, and the colours of curves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.text import Text

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

HASH_LENGTH = 10


def shown(column: str, value: Any) -> str:
    """A value as a person reads it."""
    return CONTROL.sub(lambda found: repr(found.group())[1:-1], _words(column, value))  # a note may hold any


def _words(column: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if column in ("age", "duration"):
        return span(value)
    if column == "commit" or column.endswith("_hash"):
        return str(value)[:HASH_LENGTH]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if column in ("steps", "parameters", "best_step") else str(value)
    if isinstance(value, float):
        return f"{value:.4f}" if column.endswith("loss") else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def span(seconds: float) -> str:
    """ "42 s", "3:05 min", "2:10 h" or "12 d"."""
    if seconds < 3600:
        return duration(seconds)
    minutes = round(seconds / 60)
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else f"{minutes // 60}:{minutes % 60:02d} h"


def size(count: float) -> str:
    """Bytes in decimal units: "1.5 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def facts(rows: Iterable[tuple[str, str]], title: str | None = None) -> Text:
    """Lines of "what  how much" with a common indent; long values are not wrapped, so that they can be copied."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + 2
    text = Text(f"{title}\n" if title else "", style="")
    text.stylize("bold")
    for name, value in rows:
        text.append(f"{name:<{width}}", style="cyan").append(f"{value}\n")
    return text[:-1]


def duration(seconds: float) -> str:
    """ "42 s", "3:05 min" or "2:10:00 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


HEX_COLORS = ("#3b6fb6", "#e07b1f", "#2f9e63", "#d1495b", "#8a63c4", "#1b9aaa", "#b8860b", "#7a7f87")
