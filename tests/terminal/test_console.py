"""What the live progress line shows, and what it does not know yet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from utils.terminal import console
from utils.terminal.console import Terminal
from utils.terminal.progress import TrainingProgress


@pytest.fixture
def terminal() -> Terminal:
    """One that shows a live line, kept in memory."""
    terminal = Terminal()
    terminal.console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    return terminal


def shown(terminal: Terminal) -> str:
    assert isinstance(terminal.console.file, io.StringIO)
    return terminal.console.file.getvalue()


def test_what_is_not_known_yet_is_not_shown(terminal: Terminal) -> None:
    with TrainingProgress(terminal, total=100):
        pass
    assert "step 0/100" in shown(terminal)
    assert "None" not in shown(terminal)
    assert "loss" not in shown(terminal)


def test_what_is_known_is_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REFRESH_SECONDS", 0.0)
    with TrainingProgress(terminal, total=100, start=40) as progress:
        progress.update(60, loss=1.25, tokens_per_second=1234.0)
    assert all(word in shown(terminal) for word in ("step 60/100", "loss 1.2500", "1,234 tok/s", "left"))
