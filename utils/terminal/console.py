"""What scripts print: to the terminal and, as plain text, to logs/train.log."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from utils.terminal.streams import Output, drop, in_notebook, why_lost
from utils.terminal.words import printable, setting_text
from utils.terminal.wrapping import wrapped

LOG_WIDTH = 110  # columns of logs/train.log


class PrintableConsole(Console):
    """A Console that escapes the control characters in a text (`printable`) and still obeys its own.

    Tags, notes and generated text come from anywhere: printed as they are, they could move the cursor or hide a line.
    In a notebook, too, it prints to its file; rich alone would show everything as the output of the cell.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(force_jupyter=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Stdout(PrintableConsole):
    """A console on stdout that outlives its reader: after `profile_model.py ... | head` the work goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        drop(sys.stdout)


def can_redraw(console: Console) -> bool:
    """Whether a picture on it can be drawn again: on a terminal, unless TERM=dumb says that it cannot move."""
    return console.is_terminal and not console.is_dumb_terminal


def is_coloured(console: Console) -> bool:
    """Whether it shows colours: on a terminal, unless NO_COLOR or TERM=dumb asks for none."""
    return console.color_system is not None and not console.no_color


def print_to(console: Console, renderable: RenderableType) -> None:
    """Print on lines of its own; text is broken on a terminal alone, and only as `wrapped` does it, tables anywhere."""
    if isinstance(renderable, Group):
        for part in renderable.renderables:
            print_to(console, part)
        return
    text = Text(renderable) if isinstance(renderable, str) else renderable
    if isinstance(text, Text) and console.is_terminal:
        text = wrapped(text, console.width)
    elif not isinstance(text, Text) and not console.is_terminal:  # without the spaces that fill the last column
        with console.capture() as capture:
            console.print(text, markup=False, emoji=False)
        text = Text("\n".join(line.rstrip() for line in capture.get().splitlines()))
    console.print(text, soft_wrap=isinstance(text, Text), markup=False, emoji=False)


class Terminal:
    """Prints to stdout (unless quiet) and, once attached, to a log file.

    What was printed before `attach` is kept and written to the log then.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console: Console = _Stdout(highlight=False)
        self._log: IO[str] = io.StringIO()

    @property
    def live(self) -> bool:
        """True if stdout is a terminal that can show a moving progress bar."""
        return can_redraw(self.console) and not self.quiet and not in_notebook()

    def attach(self, path: Path) -> None:
        """Append everything that is printed from now on, and what was printed so far, to the file `path`."""
        binary = io.BufferedWriter(Output(path, lasting=True))  # the log serves people: losing it must not end a run
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        if isinstance(self._log, io.StringIO):
            file.write(self._log.getvalue())
        self._log = file

    def print(self, *renderables: RenderableType, log_only: bool = False) -> None:
        """Print each as `print_to` does."""
        plain = PrintableConsole(file=self._log, width=LOG_WIDTH, no_color=True, force_terminal=False, highlight=False)
        for console in [plain] if self.quiet or log_only else [self.console, plain]:
            for renderable in renderables:
                print_to(console, renderable)

    def warn(self, message: str) -> None:
        """Print a sentence that is seen, on stderr when quiet."""
        if self.quiet:
            print(f"warning: {printable(message)}", file=sys.stderr)
        self.print(Text.assemble(("warning: ", "bold yellow"), message))

    def close(self) -> None:
        """Close the log file; what is printed afterwards goes to the terminal only."""
        lost = why_lost(self._log)
        self._log.close()
        self._log = io.StringIO()
        if lost is not None:
            self.warn(f"the log of what was printed is incomplete: {lost.strerror}")


def settings_table(rows: Sequence[tuple[str, Any, str]]) -> RenderableType:
    """The table that training starts with: (setting, value, source) of each setting that differs from its default."""
    if not rows:
        return Text("All settings have their default values.", style="dim")
    table = Table(title="Settings that differ from the defaults", title_justify="left", title_style="bold")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("value", overflow="fold", min_width=8)
    table.add_column("set by", style="dim", overflow="fold")
    for key, value, source in rows:
        table.add_row(key, Text(setting_text(value), overflow="fold"), Text(source))
    return table


def say(text: str) -> None:
    """Print a piece of generated text at once, without a line break; only a terminal gets it `printable`."""
    if sys.stdout is not None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def dim(text: str) -> str:
    """`text` for stdout, dim where that is a terminal."""
    console = PrintableConsole(file=sys.stdout)
    with console.capture() as capture:
        console.print(Text(text, style="dim"), end="", soft_wrap=True)
    return capture.get()
