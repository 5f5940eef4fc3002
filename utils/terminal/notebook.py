"""Output in notebooks: a line that is redrawn in place, and tables and pictures as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from utils.files import open_regular
from utils.terminal.console import PrintableConsole, print_to

WIDTH = 110  # characters
MOST_BYTES = 2 << 20  # the largest picture that is shown
PAGE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3; font-family: monospace">{code}</pre>'


class NotebookLine:
    """One line that `show` replaces in place, in the output of the cell that first showed it."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: Text) -> None:
        """Show `line` in place of the previous one; rich converts it to HTML."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(line, display_id=True)
        else:
            self._handle.update(line)


def html_of(renderables: Iterable[RenderableType]) -> str:
    """The renderables as HTML that looks like a terminal; all text is escaped."""
    console = PrintableConsole(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False, color_system="truecolor"
    )
    for renderable in renderables:
        print_to(console, renderable)
    return console.export_html(inline_styles=True, code_format=PAGE)


def text_of(renderables: Iterable[RenderableType]) -> str:
    """The renderables as plain text."""
    console = PrintableConsole(width=WIDTH, file=io.StringIO(), force_terminal=False, highlight=False)
    with console.capture() as capture:
        for renderable in renderables:
            print_to(console, renderable)
    return capture.get()


def picture_html(path: Path, root: Path) -> str:
    """An <img> element that contains a PNG file of the folder `root`; empty if it cannot be read or is not a PNG."""
    try:
        with open_regular(path, root) as file:
            data = file.read(MOST_BYTES + 1)
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG") or len(data) > MOST_BYTES:
        return ""
    return f'<img alt="curves" style="max-width: 100%" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
