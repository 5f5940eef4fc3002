"""Progress displays: of training, of feeding trackers, of completing the prompts of a file.

On a terminal each is a bar that moves; elsewhere training and completing print a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from utils.terminal.console import PrintableConsole, Terminal
from utils.terminal.words import bits_text, duration, loss_text

PLAIN_LINE_SECONDS = 10.0  # between progress lines where no bar can move
REFRESH_SECONDS = 0.1  # between updates of a bar
STEPS_BEFORE_ESTIMATE = 10  # the first steps are slower and say little about the rest


class _Field(ProgressColumn):
    """A column that shows one field of the task; empty until the field has a value."""

    def __init__(self, template: str, style: str = "") -> None:
        super().__init__()
        self.template, self.style = template, style

    def render(self, task: Task) -> Text:
        known = {name: value for name, value in task.fields.items() if value is not None}
        try:
            return Text(self.template.format(**known), style=self.style)
        except KeyError:  # not known yet
            return Text("")


class TrainingProgress:
    """Step, losses, tokens per second, elapsed and remaining time of a training run.

    Args:
        total: the last step.
        start: the step that training starts from.
    """

    def __init__(self, terminal: Terminal, total: int, start: int = 0) -> None:
        self.terminal = terminal
        self.total, self.start = total, start
        self.fields: dict[str, Any] = {"loss": None, "val_loss": None, "tokens_per_second": None}
        self._began = time.monotonic()
        self._next_update = 0.0
        self._next_line = self._began + PLAIN_LINE_SECONDS
        self._progress: Progress | None = None
        self._estimated = False

    @property
    def moves(self) -> bool:
        """True if there is a bar that shows each step."""
        return self._progress is not None

    def __enter__(self) -> Self:
        if self.terminal.live:
            self._progress = Progress(
                BarColumn(bar_width=24),
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                _Field("loss {loss:.4f}", "bold"),
                _Field("val {val_loss:.4f}", "bold green"),
                _Field("{tokens_per_second:,.0f} tok/s", "magenta"),
                _Field("{elapsed} elapsed", "dim"),
                _Field("{remaining} left", "dim"),
                console=self.terminal.console,
                transient=True,
            )
            self._task = self._progress.add_task(
                "train", total=self.total, completed=self.start, **self._times(self.start)
            )
            self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, step: int, **fields: float) -> None:
        """Show `step` and new values of the fields, if enough time has passed; cheap enough for every step."""
        self.fields.update(fields)
        now = time.monotonic()
        if self._progress and now >= self._next_update:
            self._next_update = now + REFRESH_SECONDS
            self._progress.update(self._task, completed=step, **self._times(step))
        if not self._estimated and step - self.start >= STEPS_BEFORE_ESTIMATE:
            self._estimate(step)
        if now >= self._next_line:
            self._line(step)

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Print the losses of an evaluation on a line of their own."""
        self.fields["val_loss"] = losses["val/loss"]
        self._line(step, losses)

    def _times(self, step: int) -> dict[str, Any]:
        """The fields with the elapsed and the remaining time."""
        elapsed = time.monotonic() - self._began
        done = step - self.start
        remaining = elapsed / done * (self.total - step) if done >= STEPS_BEFORE_ESTIMATE else None
        return {
            **self.fields,
            "elapsed": duration(elapsed),
            "remaining": duration(remaining) if remaining is not None else None,
        }

    def _estimate(self, step: int) -> None:
        """Print, once, how long the run will take."""
        self._estimated = True
        left = (time.monotonic() - self._began) / (step - self.start) * (self.total - step)
        if left >= PLAIN_LINE_SECONDS:
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            self.terminal.print(f"estimated: {duration(left)} for the {self.total - step:,} steps left, until {end}")

    def _line(self, step: int, losses: dict[str, float] | None = None) -> None:
        """A plain line; to the log only where a bar shows the same, unless it has the losses of an evaluation."""
        self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
        times = self._times(step)
        parts = [f"step {step:>{len(f'{self.total:,}')},}/{self.total:,}"]
        if losses:
            bits = bits_text(losses["val/loss"], losses.get("val/bits_per_byte"))
            parts.append(f"train {loss_text(losses['train/eval_loss'])}  val {loss_text(losses['val/loss'])}{bits}")
        elif self.fields["loss"] is not None:
            parts.append(f"loss {loss_text(self.fields['loss'])}")
        if self.fields["tokens_per_second"]:
            parts.append(f"{self.fields['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{times['elapsed']} elapsed")
        if times["remaining"] and step < self.total:
            parts.append(f"{times['remaining']} left")
        self.terminal.print("  ".join(parts), log_only=self.terminal.live and losses is None)


class FeedingProgress:
    """How much of a run's logs each tracker has received."""

    def __init__(self, terminal: Terminal) -> None:
        self._progress = Progress(
            TextColumn("feeding {task.description}", style="cyan"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=terminal.console,
            transient=True,
            disable=not terminal.live,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int) -> None:
        """The tracker `name` has received `done` of `total` bytes."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)


class CompletionProgress:
    """How many prompts of a file are completed, on stderr.

    Args:
        total: the number of prompts.
        quiet: show nothing, because the completions themselves are shown.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        console = PrintableConsole(stderr=True, highlight=False)
        self._total, self._done, self._tokens = total, 0, 0
        self._began = time.monotonic()
        self._next_line = float("inf") if console.is_terminal or quiet else self._began + PLAIN_LINE_SECONDS
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("prompt {task.completed:,.0f}/{task.total:,.0f}"),
            _Field("{tokens_per_second:,.0f} tok/s", "magenta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # stdout may be a file
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("prompts", total=total, tokens_per_second=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int) -> None:
        """One more prompt is completed, with this many new tokens."""
        self._done, self._tokens = self._done + 1, self._tokens + tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._began, 1e-9)
        self._progress.update(self._task, completed=self._done, tokens_per_second=rate)
        if now >= self._next_line:
            self._next_line = now + PLAIN_LINE_SECONDS
            left = duration((now - self._began) / self._done * (self._total - self._done))
            print(f"prompt {self._done:,}/{self._total:,}  {rate:,.0f} tok/s  {left} left", file=sys.stderr)
