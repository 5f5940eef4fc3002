"""The curves of one run in the terminal, redrawn as its log grows, until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from utils.errors import UserError
from utils.experiments.curve import Axis
from utils.experiments.plot import PlottedCurve, load_curves, terminal_plot
from utils.runs.index import IndexedRun, read_run
from utils.runs.layout import METRICS_LOG
from utils.terminal.console import can_redraw, is_coloured
from utils.terminal.words import loss_text, one_line, rough_duration

LOSSES = ("train/loss", "val/loss")
LINES = (12, 32)  # the least and the most lines of the picture
PLAIN_SECONDS = 10.0  # between lines if the console cannot redraw a picture
SHARE = 5  # wait this many times as long as reading the log took
GOOD = ("completed", "interrupted")


class Watch:
    """The curves and the status line of a run that is watched.

    Args:
        metrics: the metrics to draw; those that are not logged are left out.
        smooth: see `load_curves`; beside another metric, val/loss is not smoothed.
    """

    def __init__(self, path: Path, metrics: Sequence[str] = LOSSES, axis: Axis = "step", smooth: float = 0.0) -> None:
        self.path, self.metrics, self.axis, self.smooth = path, metrics, axis, smooth
        self.run = read_run(path)
        self._curves: list[PlottedCurve] = []
        self._read: tuple[int, int] | None = None  # size and mtime of the log that was read last

    def refresh(self) -> bool:
        """Read the log if it has changed; returns whether the run is still running."""
        self.run = read_run(self.path)
        try:
            found = (self.path / METRICS_LOG).stat()
        except OSError:
            return self.run.status == "running"
        if (seen := (found.st_size, found.st_mtime_ns)) != self._read:
            self._curves = list(self._load())
            self._read = seen
        return self.run.status == "running"

    def _load(self) -> list[PlottedCurve]:
        """Read a curve for each metric, named after it.

        Raises:
            UserError: the run has ended, and the one metric that was asked for cannot be drawn.
        """
        curves, missing = [], None
        for metric in self.metrics:
            smooth = self.smooth if metric != "val/loss" or len(self.metrics) == 1 else 0.0
            try:
                (curve,) = load_curves([self.run], metric, self.axis, smooth)
            except UserError as error:  # not logged yet
                missing = error
                continue
            curves.append(PlottedCurve(metric, curve.x, curve.y))
        if missing is not None and len(self.metrics) == 1 and self.run.status != "running":
            raise missing
        return curves

    @property
    def line(self) -> str:
        """The name, status, step, last values and age of the run in one line."""
        record = self.run.record
        most = (record.get("resolved") or {}).get("max_iters")
        last = max((int(curve.x[-1]) for curve in self._curves), default=0) if self.axis == "step" else None
        why = "" if self.run.readable else f": {self.run.problem}"
        parts = [one_line(str(record.get("tag") or self.run.id)), self.run.status + why]
        if last is not None:
            parts.append(f"step {last:,}" + (f" of {most:,}" if isinstance(most, int) else ""))
        parts += [f"{curve.name} {loss_text(curve.y[-1])}" for curve in self._curves]
        if age := self.run.row()["age"]:
            parts.append(f"started {rough_duration(age)} ago")
        return "  ".join(parts)

    def picture(self, console: Console) -> RenderableType:
        """The line and the curves, about as large as the terminal."""
        line = Text(self.line, style="bold", no_wrap=True, overflow="ellipsis")
        if not self._curves:
            words = "nothing is logged yet" if self.run.status == "running" else "no finite loss in its log"
            return Group(line, Text(words, style="dim"))
        lines = max(LINES[0], min(console.height - 3, LINES[1]))
        width = min(console.width, 140)
        label = self._curves[0].name if len(self._curves) == 1 else "loss"
        plot = terminal_plot(self._curves, label, self.axis, width, lines, colour=is_coloured(console))
        return Group(line, Text.from_ansi(plot, no_wrap=True))


def watch(
    shown: Watch, console: Console | None, interval: float = 1.0, sleep: Callable[[float], None] = time.sleep
) -> IndexedRun:
    """Show a run until it ends; returns the run in its last state.

    On a terminal the picture is redrawn; elsewhere a line is printed every 10 seconds. The caller prints the picture of
    the end.

    Args:
        console: None to show nothing.
        interval: least seconds between two looks at the log.
        sleep: called to wait.
    """
    next_line = 0.0
    with ExitStack() as stack:
        live = None
        if console is not None and can_redraw(console):
            live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
        while True:
            began = time.monotonic()
            goes_on = shown.refresh()
            if not goes_on:
                break
            if console is not None and live is not None:
                live.update(shown.picture(console), refresh=True)
            elif console is not None and began >= next_line:
                console.print(shown.line, markup=False, soft_wrap=True)
                next_line = began + PLAIN_SECONDS
            sleep(max(interval, SHARE * (time.monotonic() - began)))
    return shown.run
