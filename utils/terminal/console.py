"""Everything a person reads in the terminal, and the same as plain text in logs/train.log."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0  # between progress lines where there is no live display
REFRESH_SECONDS = 0.1  # between updates of the live display
LOG_WIDTH = 110
STEPS_TO_TELL = 10  # before that the time of the first ones says little about the rest


class _Console(Console):
    """A Console that outlives its reader: after `train.py ... | head` training goes on without output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """Prints to the terminal (unless quiet) and, once attached, to a log file.

    What was printed before `attach` is written to the log then.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = _Console(highlight=False)
        self._log: IO[str] = io.StringIO()

    @property
    def live(self) -> bool:
        """True if a progress bar can move."""
        return self.console.is_terminal and not self.quiet

    def attach(self, path: Path) -> None:
        file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        if isinstance(self._log, io.StringIO):
            file.write(self._log.getvalue())
        self._log = file

    def print(self, *renderables: RenderableType, log_only: bool = False) -> None:
        """Print one below the other; lines of text are not wrapped, tables are."""
        plain = Console(file=self._log, width=LOG_WIDTH, no_color=True, force_terminal=False, highlight=False)
        for console in [plain] if self.quiet or log_only else [self.console, plain]:
            for renderable in renderables:
                plain_text = isinstance(renderable, str | Text)
                console.print(renderable, soft_wrap=plain_text, markup=False, emoji=False)

    def warn(self, message: str) -> None:
        """One visible line, also when quiet."""
        text = Text.assemble(("warning: ", "bold yellow"), message)
        if self.quiet:
            print(f"warning: {message}", file=sys.stderr)
        self.print(text)

    def close(self) -> None:
        self._log.close()
        self._log = io.StringIO()


def settings_table(rows: Sequence[tuple[str, Any, str]]) -> RenderableType:
    """The start-up table: (setting, value, source) of what differs from the defaults."""
    if not rows:
        return Text("All settings have their default values.", style="dim")
    table = Table(title="Settings that differ from the defaults", title_justify="left", title_style="bold")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("value", overflow="fold", min_width=8)
    table.add_column("set by", style="dim", overflow="fold")
    for key, value, source in rows:
        table.add_row(key, Text(_shown(value), overflow="fold"), Text(source))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """With an escape for each character that a terminal would obey or hide; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A part of a line of generated text, at once; a terminal gets it printable, a file as it is."""
    if sys.stdout is not None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def dim(text: str) -> str:
    """`text` for sys.stdout, dim where that is a terminal."""
    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(Text(text, style="dim"), end="", soft_wrap=True)
    return capture.get()
