"""The output of scripts: to the terminal and, as plain text, to logs/train.log."""

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
    """A Console that escapes the control characters in text (`printable`) but not its own.

    Tags, notes and generated text come from anywhere: printed as they are, they could move the cursor or hide a line.
    It prints to its file in a notebook too, where rich would show everything as the output of the cell.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(force_jupyter=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Stdout(PrintableConsole):
    """A console on stdout that survives a closed pipe: in `profile_model.py ... | head` the work goes on, unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        drop(sys.stdout)


def can_redraw(console: Console) -> bool:
    """Whether the console can redraw in place: it is a terminal, and TERM is not "dumb"."""
    return console.is_terminal and not console.is_dumb_terminal


def is_coloured(console: Console) -> bool:
    """Whether the console shows colours: it is a terminal, unless NO_COLOR or TERM=dumb is set."""
    return console.color_system is not None and not console.no_color


def print_to(console: Console, renderable: RenderableType) -> None:
    """Print with a line break at the end. Text is wrapped on a terminal only, by `wrapped`; tables everywhere."""
    if isinstance(renderable, Group):
        for part in renderable.renderables:
            print_to(console, part)
        return
    text = Text(renderable) if isinstance(renderable, str) else renderable
    if isinstance(text, Text) and console.is_terminal:
        text = wrapped(text, console.width)
    elif not isinstance(text, Text) and not console.is_terminal:  # drop the spaces that pad the last column
        with console.capture() as capture:
            console.print(text, markup=False, emoji=False)
        text = Text("\n".join(line.rstrip() for line in capture.get().splitlines()))
    console.print(text, soft_wrap=isinstance(text, Text), markup=False, emoji=False)


class Terminal:
    """Prints to stdout (unless quiet) and, once attached, to a log file.

    What is printed before `attach` is kept, and `attach` writes it to the log.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console: Console = _Stdout(highlight=False)
        self._log: IO[str] = io.StringIO()

    @property
    def live(self) -> bool:
        """Whether stdout is a terminal that can show a moving progress bar."""
        return can_redraw(self.console) and not self.quiet and not in_notebook()

    def attach(self, path: Path) -> None:
        """Append to the file `path` what was printed so far and everything that is printed from now on."""
        binary = io.BufferedWriter(Output(path, lasting=True))  # only people read it: losing it must not end a run
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        if isinstance(self._log, io.StringIO):
            file.write(self._log.getvalue())
        self._log = file

    def print(self, *renderables: RenderableType, log_only: bool = False) -> None:
        """Print each renderable as `print_to` does."""
        plain = PrintableConsole(file=self._log, width=LOG_WIDTH, no_color=True, force_terminal=False, highlight=False)
        for console in [plain] if self.quiet or log_only else [self.console, plain]:
            for renderable in renderables:
                print_to(console, renderable)

    def warn(self, message: str) -> None:
        """Print a warning; when quiet, to stderr."""
        if self.quiet:
            print(f"warning: {printable(message)}", file=sys.stderr)
        self.print(Text.assemble(("warning: ", "bold yellow"), message))

    def close(self) -> None:
        """Close the log file; later output goes to the terminal only."""
        lost = why_lost(self._log)
        self._log.close()
        self._log = io.StringIO()
        if lost is not None:
            self.warn(f"the log of the output is incomplete: {lost.strerror}")


def settings_table(rows: Sequence[tuple[str, Any, str]]) -> RenderableType:
    """The table printed when training starts: (setting, value, source) of each setting that is not at its default."""
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
    """Print a piece of generated text at once, without a line break; on a terminal, through `printable`."""
    if sys.stdout is not None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def dim(text: str) -> str:
    """`text` for stdout, dim if that is a terminal."""
    console = PrintableConsole(file=sys.stdout)
    with console.capture() as capture:
        console.print(Text(text, style="dim"), end="", soft_wrap=True)
    return capture.get()
