"""The display of a running sweep, and the summary that it prints at the end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from utils.config.loader import relative_name
from utils.errors import number_text
from utils.sweeps.folder import Sweep, steps_of
from utils.sweeps.study import REASON, RUNS, Study
from utils.sweeps.trial import Activity, Outcome
from utils.terminal.console import Terminal
from utils.terminal.words import counted, duration, one_line, setting_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEST_SHOWN = 5
REFRESH_SECONDS = 1.0


def value_text(value: float | None) -> str:
    """The value of a trial; empty for None."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def params_text(params: dict[str, Any]) -> str:
    """Settings as text, with three digits of each float: `learning_rate 0.00123  n_embd 64`."""
    return "  ".join(f"{key} {param_text(value)}" for key, value in params.items())


def param_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else one_line(setting_text(value))


class Display:
    """A live table on a terminal, and a line for each trial that has ended or reached a rung.

    Args:
        activities: what the trials that this process carries out are doing, by number.
        total: the wanted number of trials.
    """

    def __init__(
        self, terminal: Terminal, sweep: Sweep, study: Study, activities: Mapping[int, Activity], total: int
    ) -> None:
        self.terminal, self.sweep, self.study, self.activities = terminal, sweep, study, activities
        self.total = study.limit(total)
        self._began = time.monotonic()
        self._done_before = sum(not study.is_unfinished(trial) for trial in study.trials())
        self._live: Live | None = None
        self._next = 0.0

    def __enter__(self) -> Display:
        if self.terminal.live:
            self._live = Live(console=self.terminal.console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Draw the table again, if enough time has passed."""
        if self._live is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self._live.update(self.screen(), refresh=True)

    def ended(self, number: int, outcome: Outcome) -> None:
        """Print a line about a trial that has ended or reached a rung."""
        trial = self.study.trials()[number]
        if outcome.value is not None:
            state, words = "", f"{self.sweep.plan.space.goal} {value_text(outcome.value)}"
            if self.study.is_unfinished(trial):
                words += f" at step {max(trial.intermediate_values):,}"
        else:
            state, words = ("ended early: " if outcome.pruned else "failed: "), outcome.reason or ""
        self.terminal.print(f"trial {number}: {state}{one_line(words)}   {params_text(trial.params)}")

    def screen(self) -> RenderableType:
        """The whole display: the running trials, and the best so far."""
        trials = self.study.trials()
        table = _table("trial", "step", str(self.sweep.plan.space.goal), "time", "settings")
        steps = steps_of(self.sweep.plan.config, self.sweep.plan.space)
        for number, activity in sorted(dict(self.activities).items()):
            step = f"{activity.step:,}" + (f"/{steps:,}" if steps else "")
            seconds = duration(time.monotonic() - activity.began)
            table.add_row(str(number), step, value_text(activity.loss), seconds, params_text(trials[number].params))
        return Group(self._heading(trials), table, *best_table(self.study, BEST_SHOWN))

    def _heading(self, trials: list[FrozenTrial]) -> Text:
        ended = [trial for trial in trials if not self.study.is_unfinished(trial)]
        total = max(self.total, len(trials))  # the forks of a population are further trials
        paused, failed = sum(map(self.study.is_paused, trials)), sum(map(self.study.is_failed, trials))
        words = [f"{len(ended)} of {counted(total, 'trial')} done"]
        words += [f"{paused} paused"] if paused else []
        words += [f"{failed} failed"] if failed else []
        seconds = time.monotonic() - self._began
        words.append(f"{duration(seconds)} elapsed")
        if (done := len(ended) - self._done_before) > 0:
            words.append(f"about {duration(seconds / done * max(0, total - len(ended)))} left")
        return Text.assemble((f"{self.sweep.name}: ", "bold"), ", ".join(words))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        left = column in ("settings", "run", "reason")
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    return table


def best_table(study: Study, most: int) -> Iterator[RenderableType]:
    """The best trials, the best first."""
    best = study.best()[:most]
    if not best:
        return
    table = _table("trial", str(study.sweep.plan.space.goal), "settings")
    for trial in best:
        table.add_row(str(trial.number), value_text(trial.value), params_text(trial.params))
    yield Text("")
    yield table


def summary(sweep: Sweep, study: Study, importance: dict[str, float], files: list[Path]) -> Iterator[RenderableType]:
    """The text that is printed at the end: the best trials, the importance of settings, and commands to type next.

    Args:
        importance: the importance of each setting, as shares.
        files: the pictures.
    """
    trials = study.trials()
    ended = [trial for trial in trials if not study.is_unfinished(trial)]
    complete = sum(map(study.is_complete, trials))
    failed = [trial for trial in trials if study.is_failed(trial)]
    words = [counted(complete, "complete trial"), f"{len(ended) - complete - len(failed)} ended early"]
    words += [f"{len(failed)} failed"] if failed else []
    yield Text.assemble((f"{sweep.name}: ", "bold"), ", ".join(words))
    yield from best_table(study, 10)
    if importance:
        yield Text("\nImportance of the settings", style="bold")
        width = max(map(len, importance))
        for key, share in importance.items():
            yield Text.assemble((f"{key:<{width}}  ", "cyan"), f"{share:4.0%} ", ("█" * round(20 * share), "blue"))
    if failed:
        table = _table("failed", "reason")
        for trial in failed[-5:]:
            table.add_row(str(trial.number), one_line(str(trial.user_attrs.get(REASON, ""))))
        yield Text("")
        yield table
    here = Path.cwd()
    if files:
        yield Text("\nPictures", style="bold")
        yield from (Text(relative_name(path, here)) for path in files)
    yield Text("\nNext", style="bold")
    yield from (Text.assemble((f"{name:<13}", "cyan"), command) for name, command in next_commands(sweep, study))


def next_commands(sweep: Sweep, study: Study) -> Iterator[tuple[str, str]]:
    """(description, command) of what the user may want to type next."""
    from utils.training.result import is_default_runs_dir, script_command

    flag = (
        ""
        if is_default_runs_dir(sweep.runs_dir)
        else f" --runs-dir {shlex.quote(relative_name(sweep.runs_dir, Path.cwd()))}"
    )
    experiments = script_command("experiments.py")
    yield "all runs", f"{experiments} list --where \"sweep = '{sweep.name}'\" --sort val_loss{flag}"
    yield "compare", f"{experiments} compare {sweep.name}{flag}"
    if (longer := longer_command(sweep, study)) is not None:
        yield "train longer", longer


LONGER = 10  # times as many steps as a trial


def longer_command(sweep: Sweep, study: Study) -> str | None:
    """The command that trains with the settings of the best trial for longer; None if no trial has a value."""
    from utils.runs.layout import CONFIG
    from utils.training.result import script_command

    best = study.best()
    runs = best[0].user_attrs.get(RUNS) if best else None
    if not runs or not (run := sweep.runs_dir / runs[0]).is_dir():
        return None
    config = shlex.quote(relative_name(run / CONFIG, Path.cwd()))
    train, params = sweep.plan.config.train, best[0].params
    steps = None if "epochs" in params else params.get("max_iters", train.max_iters)
    epochs = params.get("epochs", train.epochs or 1)
    flags = [f"--max-iters {LONGER * steps}" if steps else f"--epochs {number_text(LONGER * epochs)}"]
    flags += ["--eval-at ''"] if sweep.plan.pruner.pauses else []
    flags += ["--threads none"] if sweep.plan.threads is not None else []  # a trial has a share of the cores
    flags += ["--max-minutes none"] if params.get("max_minutes", train.max_minutes) is not None else []
    return f"{script_command('train.py')} --config {config} --run-tag {sweep.name}-best {' '.join(flags)}"
