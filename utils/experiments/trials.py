"""The runs of an experiment by seed: those that exist, and those that are trained for a comparison."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from utils.errors import UserError, nearest
from utils.experiments.curve import logged_metrics, read_curve
from utils.experiments.subjects import Experiment
from utils.experiments.training_process import train_again
from utils.files import write_atomic
from utils.machine.signals import StopSignal
from utils.runs.code import git_text
from utils.runs.index import IndexedRun, read_index, read_run
from utils.runs.layout import GIT, PATCH
from utils.runs.run import change_record
from utils.runs.seal import write_seal
from utils.runs.trust import made_here
from utils.terminal.words import printable

SIGNALS = {128 + s: s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}  # by the exit status after them


class BudgetError(Exception):
    """The time is over, or too short for another run."""


class TrialError(UserError):
    """A run ended without a result."""


@dataclass
class Trials:
    """Trains and finds the runs of experiments.

    folder: a temporary one, removed if this process is killed.
    output: where the progress of training is printed.
    budget: seconds from now on; None: no limit.
    trained: seconds that each run took that was trained here.
    """

    root: Path
    runs_dir: Path
    folder: Path
    output: IO[str]
    budget: float | None = None
    trained: list[float] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _index: list[IndexedRun] | None = None

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._began

    def existing(self, experiment: Experiment) -> dict[int, IndexedRun]:
        """The oldest complete run of each seed."""
        if self._index is None:
            self._index = read_index(self.runs_dir)
        found: dict[int, IndexedRun] = {}
        for run in self._index:
            seed = run.settings.get("seed")
            if run.status == "completed" and isinstance(seed, int) and experiment.is_of(run):
                found.setdefault(seed, run)
        return found

    def train(self, experiment: Experiment, seed: int, place: str = "") -> IndexedRun:
        """Train one seed of an experiment.

        Args:
            place: of this run among those that are trained, as it is printed.

        Raises:
            BudgetError: no time is left for it.
            TrialError: it failed or diverged.
            StopSignal: a signal stopped it.
        """
        left = None if self.budget is None else self.budget - self.seconds
        if left is not None and left <= (max(self.trained) if self.trained else 0):
            raise BudgetError
        print(printable(f"training {experiment.name} with seed {seed}{place}"), file=self.output, flush=True)
        began = time.monotonic()
        flags = list(experiment.flags(self.root, self.runs_dir, seed))
        if left is not None:
            flags.append(f"--max-minutes={left / 60}")
        path, status = train_again(experiment.project, flags, self.runs_dir, self.output, self.folder)
        self.trained.append(time.monotonic() - began)
        if path is None:
            if status in SIGNALS:
                raise StopSignal(SIGNALS[status])
            raise TrialError(f"{experiment.name} made no run with seed {seed} (exit status {status}): see above")
        self._record(experiment, path)
        run = read_run(path)
        if status in SIGNALS:
            raise StopSignal(SIGNALS[status])
        if run.status == "interrupted" and left is not None:
            raise BudgetError
        if self._index is not None:
            self._index.append(run)
        if run.status != "completed":
            reason = run.record.get("exit_reason")
            raise TrialError(f"{run.id} {run.status}" + (f": {reason}" if reason else ""))
        return run

    def _record(self, experiment: Experiment, path: Path) -> None:
        """Write into a new run which code it is of: its own folder was no repository."""
        facts = {"made": made_here(self.root), "experiment": experiment.key}
        if experiment.project != self.root:
            commit, fingerprint = experiment.code
            dirty = bool(experiment.patch)
            facts["git"] = {"commit": commit, "branch": None, "dirty": dirty, "remote": None, "code": fingerprint}
            write_atomic(path / GIT, git_text(experiment.git_facts()))
            if experiment.patch:
                write_atomic(path / PATCH, experiment.patch)
        change_record(path, **facts)
        write_seal(path)


def last_value(run: IndexedRun, metric: str) -> float:
    """The last value of a metric in the log of a run.

    Raises:
        UserError: it was never logged, or is not finite.
    """
    values = read_curve(run.path, metric).values
    if not values:
        raise UserError(f"{run.id} has not logged {metric}{nearest(metric, logged_metrics(run.path))}")
    if not math.isfinite(values[-1]):
        raise TrialError(f"{run.id}: its last {metric} is {values[-1]}")
    return values[-1]


def seed_order(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """Seeds for pairs: those that both have, that one has, and then new ones from 1 on."""
    both = sorted(set(first) & set(second))
    yield from both
    one = sorted(set(first) ^ set(second))
    yield from one
    known, seed = {*both, *one}, 0
    while True:
        seed += 1
        if seed not in known:
            yield seed
