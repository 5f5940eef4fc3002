"""What the terminal shows: progress, and no control characters of others."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.terminal import progress
from utils.terminal.console import PrintableConsole, Terminal
from utils.terminal.progress import TrainingProgress


@pytest.fixture
def terminal() -> Terminal:
    """A terminal with a live display that writes into memory."""
    terminal = Terminal()
    terminal.console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    return terminal


def shown(terminal: Terminal) -> str:
    assert isinstance(terminal.console.file, io.StringIO)
    return terminal.console.file.getvalue()


def test_a_field_without_a_value_is_not_shown(terminal: Terminal) -> None:
    with TrainingProgress(terminal, total=100):
        pass
    assert "step 0/100" in shown(terminal)
    assert "None" not in shown(terminal)
    assert "loss" not in shown(terminal)


def test_fields_with_values_are_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    with TrainingProgress(terminal, total=100, start=40) as display:
        display.update(60, loss=1.25, tokens_per_second=1234.0)
    assert all(word in shown(terminal) for word in ("step 60/100", "loss 1.2500", "1,234 tok/s", "left"))


def test_control_characters_of_others_reach_neither_the_terminal_nor_the_log(tmp_path: Path) -> None:
    terminal = Terminal()
    terminal.console = PrintableConsole(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    terminal.attach(tmp_path / "train.log")
    table = Table()
    table.add_row(Text("tag \x1b[2J"))
    terminal.print("note \x1b]0;title", table, Text("red", style="red"))
    terminal.warn("name \x9b31m")
    terminal.close()
    for printed in (shown(terminal), (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert all(word in printed for word in (r"note \x1b]0;title", r"tag \x1", r"name \x9b31m"))
        assert not any(control in printed for control in ("\x1b]", "\x1b[2J", "\x9b"))
    assert "\x1b[31mred\x1b[0m" in shown(terminal)  # its own colours stay
