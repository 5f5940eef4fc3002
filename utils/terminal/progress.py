"""Progress displays for training, feeding trackers, preparing a dataset, and completing the prompts of a file.

On a terminal each is a moving bar; training shows its bar in a notebook too. Elsewhere all but feeding print a plain
line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from utils.terminal.console import PrintableConsole, Terminal, can_redraw
from utils.terminal.notebook import NotebookLine
from utils.terminal.streams import in_notebook
from utils.terminal.words import bits_text, duration, loss_text, size

PLAIN_LINE_SECONDS = 10.0  # between progress lines where no bar can move
REFRESH_SECONDS = 0.1  # between updates of a bar
NOTEBOOK_SECONDS = 0.5  # the same in a notebook, which stores and sends each update
STEPS_BEFORE_ESTIMATE = 10  # the time of fewer steps says little about the rest
BAR_WIDTH = 24  # characters
FIELD_STYLES = {"loss": "bold", "val": "bold green", "speed": "magenta", "elapsed": "dim", "left": "dim"}


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


class _TrainingLine(ProgressColumn):
    """The bar and the fields of training on one line, however narrow the terminal.

    With a second line, rich would move up before each redraw, over what a signal handler has printed meanwhile.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="crop"))
        self._console = console

    def render(self, task: Task) -> Text:
        fields = {name: text for name, text in _field_texts(task).items() if text}
        for dispensable in ("elapsed", "speed", "loss", "val", "left"):
            if len("  ".join(fields.values())) > self._console.width:
                fields.pop(dispensable, None)
        line = Text("  ").join(Text(text, style=FIELD_STYLES.get(name, "")) for name, text in fields.items())
        if self._console.width - len(line) - 2 >= BAR_WIDTH:
            filled = round(BAR_WIDTH * min(1.0, task.completed / task.total)) if task.total else 0
            bar = Text("━" * filled, style="bar.complete").append("━" * (BAR_WIDTH - filled), style="bar.back")
            line = bar.append("  ").append_text(line)
        return line


def _field_texts(task: Task) -> dict[str, str]:
    """The texts on the line of training, by name; empty while a value is not known."""
    fields = task.fields
    return {
        "step": f"step {task.completed:,.0f}/{task.total:,.0f}",
        "evaluating": fields["evaluating"] or "",
        "loss": "" if fields["loss"] is None else f"loss {fields['loss']:.4f}",
        "val": "" if fields["val_loss"] is None else f"val {fields['val_loss']:.4f}",
        "speed": "" if fields["tokens_per_second"] is None else f"{fields['tokens_per_second']:,.0f} tok/s",
        "elapsed": f"{fields['elapsed']} elapsed",
        "left": "" if fields["remaining"] is None else f"{fields['remaining']} left",
    }


class TrainingProgress:
    """Step, losses, tokens per second, elapsed and remaining time of a training run.

    Args:
        total: the last step.
        start: the step that training starts from.
        stop_at: the step that this session ends at, for the remaining time; None: the last one.
        eval_interval: steps between evaluations, whose time is estimated separately; None if unknown.
        stops: returns True if training ends before the last step; from then on no remaining time is shown.
    """

    def __init__(
        self,
        terminal: Terminal,
        total: int,
        start: int = 0,
        *,
        stop_at: int | None = None,
        eval_interval: int | None = None,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        self.terminal = terminal
        self._stops = stops
        self.total, self.start = total, start
        self._end = total if stop_at is None else min(stop_at, total)
        self.fields: dict[str, Any] = {"loss": None, "val_loss": None, "tokens_per_second": None, "evaluating": None}
        self._eval_interval = eval_interval
        self._evaluation_began: float | None = None  # None between evaluations
        self._evaluation_seconds = 0.0  # of the last evaluation
        self._all_evaluations = 0.0  # seconds
        self._first: tuple[int, float] | None = None  # the step that speed is measured from, its seconds of training
        self._began = time.monotonic()
        self._next_update = 0.0
        self._next_line = self._began + PLAIN_LINE_SECONDS
        self._progress: Progress | None = None
        self._cell: NotebookLine | None = None  # set in a notebook
        self._estimated = False
        self._step = start  # the last one that was reported

    @property
    def moves(self) -> bool:
        """Whether a bar shows each step."""
        return self._progress is not None

    def __enter__(self) -> Self:
        if not self.terminal.quiet and in_notebook():
            self._cell = NotebookLine()
        if self.terminal.live or self._cell is not None:
            console = self.terminal.console
            self._progress = Progress(_TrainingLine(console), console=console, transient=True)
            self._task = self._progress.add_task(
                "train", total=self.total, completed=self.start, **self._times(self.start)
            )
            if self._cell is None:
                self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._progress and self._cell is None:
            self._progress.stop()
        elif self._progress:
            self._show(self._step)  # the last state, which stays in the cell

    def _show(self, step: int) -> None:
        """Update the bar."""
        if self._progress is None:
            return
        self._next_update = time.monotonic() + (REFRESH_SECONDS if self._cell is None else NOTEBOOK_SECONDS)
        self._progress.update(self._task, completed=step, **self._times(step))
        if self._cell is not None:
            line: Any = self._progress.columns[0]  # a _TrainingLine
            self._cell.show(line.render(self._progress.tasks[0]))

    def update(self, step: int, **fields: float) -> None:
        """Take note of `step` and new values of the fields, and show them if enough time has passed.

        Cheap enough to call at every step.
        """
        self.fields.update(fields)
        self._step = step
        now = time.monotonic()
        if self._first is None and step > self.start:
            few = step - self.start < STEPS_BEFORE_ESTIMATE
            self._first = (step, self._training_seconds(now)) if few else (self.start, 0.0)
        if self._progress and now >= self._next_update:
            self._show(step)
        if not self._estimated and (left := self._seconds_left(step)) is not None:
            self._estimate(step, left)
        if now >= self._next_line:
            self._line(step)

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Show that the evaluation after `step` updates has read `done` of `total` sequences."""
        now = time.monotonic()
        if not done:
            self._evaluation_began = now
        self.fields["evaluating"] = f"evaluating {done / total:.0%}"
        if self._progress and now >= self._next_update:
            self._show(step)
        if now >= self._next_line:
            self._line(step)

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Print the losses of a completed evaluation on a line of their own."""
        if self._evaluation_began is not None:
            self._evaluation_seconds = time.monotonic() - self._evaluation_began
            self._all_evaluations += self._evaluation_seconds
            self._evaluation_began = None
        self.fields.update(val_loss=losses["val/loss"], evaluating=None)
        self._step = step
        self._line(step, losses)

    def _training_seconds(self, now: float) -> float:
        """Seconds since the start, without those of evaluations."""
        evaluating = now - self._evaluation_began if self._evaluation_began is not None else 0.0
        return now - self._began - self._all_evaluations - evaluating

    def _seconds_left(self, step: int) -> float | None:
        """Seconds that the remaining steps and evaluations will take; None until they can be estimated.

        The time of the first update is left out, because the first step is slow, unless it covers many steps.
        """
        if self._first is None or step - self._first[0] < STEPS_BEFORE_ESTIMATE or self._stops():
            return None
        seconds = (self._training_seconds(time.monotonic()) - self._first[1]) / (step - self._first[0])
        evaluations = 0
        if self._eval_interval is not None:
            evaluations = -(-self._end // self._eval_interval) - step // self._eval_interval
        return seconds * (self._end - step) + evaluations * self._evaluation_seconds

    def _times(self, step: int) -> dict[str, Any]:
        """The fields with the elapsed and the remaining time."""
        left = self._seconds_left(step)
        return {
            **self.fields,
            "elapsed": duration(time.monotonic() - self._began),
            "remaining": duration(left) if left is not None else None,
        }

    def _estimate(self, step: int, left: float) -> None:
        """Print, once, how long the run will take."""
        self._estimated = True
        if left >= PLAIN_LINE_SECONDS:
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            self.terminal.print(f"estimated: {duration(left)} for the {self._end - step:,} steps left, until {end}")

    def _line(self, step: int, losses: dict[str, float] | None = None) -> None:
        """Print a plain line; if a bar shows the same, only to the log, unless it has the losses of an evaluation."""
        self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
        times = self._times(step)
        parts = [f"step {step:>{len(f'{self.total:,}')},}/{self.total:,}"]
        if losses:
            bits = bits_text(losses["val/loss"], losses.get("val/bits_per_byte"))
            parts.append(f"train {loss_text(losses['train/eval_loss'])}  val {loss_text(losses['val/loss'])}{bits}")
            if (accuracy := losses.get("val/accuracy")) is not None:
                parts.append(f"accuracy {accuracy:.1%}")
        elif self.fields["evaluating"]:
            parts.append(self.fields["evaluating"])
        elif self.fields["loss"] is not None:
            parts.append(f"loss {loss_text(self.fields['loss'])}")
        if self.fields["tokens_per_second"]:
            parts.append(f"{self.fields['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{times['elapsed']} elapsed")
        if times["remaining"] and step < self._end:
            parts.append(f"{times['remaining']} left")
        self.terminal.print("  ".join(parts), log_only=self.moves and losses is None)


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
        """Show that the tracker `name` has received `done` of `total` bytes."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)


class PreparationProgress:
    """How many bytes one pass of a preparation has processed.

    Args:
        name: the name of the pass.
        total: the bytes to process.
    """

    def __init__(self, terminal: Terminal, name: str, total: int) -> None:
        self._terminal, self._name, self._total, self._done = terminal, name, total, 0
        self._began = time.monotonic()
        self._next_line = self._began + PLAIN_LINE_SECONDS
        self._progress = Progress(
            TextColumn(name, style="cyan"),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.percentage:>3.0f}%"),
            _Field("{speed}", "magenta"),
            TimeRemainingColumn(),
            console=terminal.console,
            transient=True,
            disable=not terminal.live,
        )
        self._task = self._progress.add_task(name, total=max(total, 1), speed=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def skip(self, count: int) -> None:
        """Leave out `count` bytes, which an earlier process has done."""
        self._total -= count
        self._progress.update(self._task, total=max(self._total, 1))

    def advance(self, count: int) -> None:
        """Count `count` more bytes as done."""
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        self._progress.update(self._task, completed=min(self._done, self._total), speed=f"{size(rate)}/s")
        if now >= self._next_line and not self._terminal.live:
            self._next_line = now + PLAIN_LINE_SECONDS
            left = duration(max(self._total - self._done, 0) / max(rate, 1e-9))
            share = min(self._done / max(self._total, 1), 1.0)
            self._terminal.print(f"{self._name} {share:.0%}  {size(rate)}/s  {left} left")


class CompletionProgress:
    """How many prompts of a file are completed, or how much of a text is scored, shown on stderr.

    Args:
        total: the number of prompts, or of other things.
        quiet: show nothing, because the completions themselves are shown.
        noun: what is counted, in the singular.
    """

    def __init__(self, total: int, quiet: bool = False, noun: str = "prompt") -> None:
        console = PrintableConsole(stderr=True, highlight=False)
        self._total, self._done, self._tokens, self._noun = total, 0, 0, noun
        self._began = time.monotonic()
        moves = can_redraw(console) and not in_notebook() and not quiet
        self._next_line = float("inf") if moves or quiet else self._began + PLAIN_LINE_SECONDS
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn(f"{noun} {{task.completed:,.0f}}/{{task.total:,.0f}}"),
            _Field("{tokens_per_second:,.0f} tok/s", "magenta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # stdout may be a file
            disable=not moves,
        )
        self._task = self._progress.add_task(noun, total=total, tokens_per_second=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int, done: int = 1) -> None:
        """Count one more completed prompt, or `done` more of the things counted, with this many new tokens."""
        self._done, self._tokens = self._done + done, self._tokens + tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._began, 1e-9)
        self._progress.update(self._task, completed=self._done, tokens_per_second=rate)
        if now >= self._next_line:
            self._next_line = now + PLAIN_LINE_SECONDS
            left = duration((now - self._began) / self._done * (self._total - self._done))
            print(f"{self._noun} {self._done:,}/{self._total:,}  {rate:,.0f} tok/s  {left} left", file=sys.stderr)
