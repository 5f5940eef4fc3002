"""The terminal: the display of progress, and control characters, which are escaped."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.machine.signals import StopRequest
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


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    with TrainingProgress(terminal, total=100) as display:
        display.update(60, loss=1.25)
    assert "step  60/100  loss 1.2500" in shown(terminal)


def test_progress_fields_without_values_are_not_shown(terminal: Terminal) -> None:
    with TrainingProgress(terminal, total=100):
        pass
    assert "step 0/100" in shown(terminal)
    assert "None" not in shown(terminal)
    assert "loss" not in shown(terminal)


def test_progress_fields_with_values_are_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    with TrainingProgress(terminal, total=100, start=40) as display:
        display.update(60, loss=1.25, tokens_per_second=1234.0)
    assert all(word in shown(terminal) for word in ("step 60/100", "loss 1.2500", "1,234 tok/s", "left"))


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_the_progress_fits_on_one_line_at_any_width(terminal: Terminal, width: int) -> None:
    terminal.console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    display = TrainingProgress(terminal, total=2_000_000)
    fields = {**display.fields, "loss": 1.25, "val_loss": 2.5, "tokens_per_second": 1e6, "evaluating": "evaluating 5%"}
    with display:
        display._progress.update(  # type: ignore[union-attr]
            display._task, completed=1_000_000, **fields, elapsed="12:10:00 h", remaining="12:10:00 h"
        )
        lines = terminal.console.render_lines(display._progress.get_renderable())  # type: ignore[union-attr]
    (line,) = ["".join(segment.text for segment in of_line).rstrip() for of_line in lines]
    assert "1,000,000/2,000,000" in line
    assert "evaluating 5%" in line
    assert ("left" in line) == (width >= 60)
    assert ("elapsed" in line) == (width >= 120)


def test_the_remaining_time_counts_steps_and_evaluations_separately(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = {"monotonic": lambda: now[0], "time": int, "localtime": int, "strftime": lambda *_: "12:00"}
    monkeypatch.setattr(progress, "time", SimpleNamespace(**clock))
    display = TrainingProgress(terminal, total=100, eval_interval=50)
    for step in range(1, 41):
        if step == 1:
            for done in range(5):  # 20 seconds
                display.evaluating(0, done, 5)
                now[0] += 4
            display.evaluation(0, {"val/loss": 4.0, "train/eval_loss": 4.0})
        now[0] += 3.0 if step == 1 else 0.5  # the first step is slow
        display.update(step)
        if step == 10:
            assert display._seconds_left(step) is None
        elif step >= 11:
            assert display._seconds_left(step) == pytest.approx(0.5 * (100 - step) + 2 * 20)
    assert "estimated: 1:24 min for the 89 steps left" in shown(terminal)


def test_the_remaining_time_is_that_until_the_step_at_which_the_session_stops(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = {"monotonic": lambda: now[0], "time": int, "localtime": int, "strftime": lambda *_: "12:00"}
    monkeypatch.setattr(progress, "time", SimpleNamespace(**clock))
    display = TrainingProgress(terminal, total=1000, stop_at=40)
    for step in range(1, 12):
        now[0] += 1.0
        display.update(step)
    assert "estimated: 29 s for the 29 steps left" in shown(terminal)
    assert display._times(40)["remaining"] == "0 s"


def test_no_remaining_time_is_estimated_after_a_request_to_stop(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, stop = [1000.0], StopRequest()
    clock = {"monotonic": lambda: now[0], "time": int, "localtime": int, "strftime": lambda *_: "12:00"}
    monkeypatch.setattr(progress, "time", SimpleNamespace(**clock))
    display = TrainingProgress(terminal, total=100, stops=lambda: bool(stop))
    for step in range(1, 20):
        now[0] += 1.0
        if step == 5:
            stop.stop("SIGINT")
        display.update(step, loss=1.0)
    assert "step  19/100" not in shown(terminal)
    assert "step  10/100  loss 1.0000" in shown(terminal)
    assert not any(word in shown(terminal) for word in ("estimated", "left"))


def test_control_characters_in_texts_reach_neither_the_terminal_nor_the_log(tmp_path: Path) -> None:
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
    assert "\x1b[31mred\x1b[0m" in shown(terminal)  # colours of the workbench are kept
