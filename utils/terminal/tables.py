"""The common look of the tables of all scripts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def title(text: str) -> Text:
    """The heading of a table."""
    return Text(text, style="bold")


def plain_table(left: Sequence[str] = (), right: Sequence[str] = (), show_header: bool = True) -> Table:
    """A table without lines: columns of text, then columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=show_header, padding=(0, 2, 0, 0))
    for header in left:
        table.add_column(Text(header), overflow="fold")
    for header in right:
        table.add_column(Text(header), justify="right")
    return table
