"""The runs of an experiment by seed: existing ones, and those that are trained for a comparison."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from utils.corpora.sources import ARITHMETIC
from utils.errors import UserError, nearest
from utils.experiments.curve import logged_metrics, read_curve
from utils.experiments.subjects import Experiment
from utils.experiments.training_process import run_training
from utils.files import write_atomic
from utils.machine.signals import StopSignal
from utils.runs.code import git_text
from utils.runs.identity import corpus_of
from utils.runs.index import IndexedRun, read_index, read_run
from utils.runs.layout import GIT, PATCH
from utils.runs.run import change_record
from utils.runs.seal import write_seal
from utils.runs.trust import made_here
from utils.terminal.words import printable

MACHINE_FAILURES = ("OSError", "MemoryError", "OutOfMemoryError", "out of memory")  # how such exit reasons begin
SIGNALS = {128 + s: s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}  # exit status -> the signal behind it


class BudgetError(Exception):
    """The time budget has run out, or is too short for another run."""


class TrialError(UserError):
    """A run ended without a result.

    by_machine: the machine lacked memory or disk space, or ended the process.
    final: it would end the same way again.
    """

    def __init__(self, message: str, *, by_machine: bool = False, final: bool = True) -> None:
        super().__init__(message)
        self.by_machine, self.final = by_machine, final and not by_machine


@dataclass
class Trials:
    """Finds the runs of experiments, and trains missing ones.

    folder: a temporary folder, removed if this process is killed.
    output: where the progress of training is printed.
    budget: seconds from now on; None: no limit.
    trained: for each run trained here, the seconds that it took.
    one_text: all runs with the same dataset must have been trained on the same text.
    """

    root: Path
    runs_dir: Path
    folder: Path
    output: IO[str]
    budget: float | None = None
    trained: list[float] = field(default_factory=list)
    one_text: bool = True
    _began: float = field(default_factory=time.monotonic)
    _index: list[IndexedRun] | None = None
    _texts: dict[Any, IndexedRun] = field(default_factory=dict)  # dataset -> the run whose text all others must have

    @property
    def seconds(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._began

    def existing(self, *experiments: Experiment) -> list[dict[int, IndexedRun]]:
        """For each experiment, the oldest complete run of each seed; those with one dataset were trained on one text.

        That is the text of the run that an experiment comes from or, if there is none, of the newest run found.

        Raises:
            UserError: two experiments come from runs that were trained on different texts of the same name.
        """
        if self._index is None:
            self._index = read_index(self.runs_dir)
        complete = [run for run in self._index if run.status == "completed" and isinstance(_seed(run), int)]
        for experiment in experiments:
            if (run := experiment.text_of) is not None and not self._has_the_text(experiment, run):
                other = self._texts[experiment.dataset].id
                raise UserError(f"{run.id} was trained on another text of {experiment.dataset} than {other}")
        for run in reversed(complete):
            for experiment in experiments:
                if experiment.is_of(run):
                    self._texts.setdefault(experiment.dataset, run)
        return [
            {
                _seed(run): run
                for run in reversed(complete)
                if experiment.is_of(run) and self._has_the_text(experiment, run)
            }
            for experiment in experiments
        ]

    def _has_the_text(self, experiment: Experiment, run: IndexedRun) -> bool:
        """Whether a run was trained on the same text as the others with this dataset, or on arithmetic (no text)."""
        if not self.one_text or experiment.dataset == ARITHMETIC:
            return True
        return corpus_of(run) == corpus_of(self._texts.setdefault(experiment.dataset, run))

    def train(self, experiment: Experiment, seed: int, place: str = "") -> IndexedRun:
        """Train one seed of an experiment.

        Args:
            place: its place among the runs to train (" (1 of 3)"), printed with the name.

        Raises:
            BudgetError: no time is left.
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
        path, status = run_training(experiment.project, flags, self.runs_dir, self.output, self.folder)
        self.trained.append(time.monotonic() - began)
        if path is None:
            if status in SIGNALS:
                raise StopSignal(SIGNALS[status])
            message = f"{experiment.name} made no run with seed {seed} (exit status {status}): see above"
            raise TrialError(message, by_machine=status not in (1, 2), final=False)  # or there was no space for a run
        self._record(experiment, path)
        run = read_run(path)
        if status in SIGNALS:
            raise StopSignal(SIGNALS[status])
        if run.status == "interrupted" and left is not None:
            raise BudgetError
        if self._index is not None:
            self._index.append(run)
        if run.status != "completed":
            reason = str(run.record.get("exit_reason") or "")
            by_machine = run.status != "diverged" and (run.status != "failed" or reason.startswith(MACHINE_FAILURES))
            raise TrialError(f"{run.id} {run.status}" + (f": {reason}" if reason else ""), by_machine=by_machine)
        if not self._has_the_text(experiment, run):
            raise UserError(
                f"{run.id}: the text of {experiment.dataset} is not the one that "
                f"{self._texts[experiment.dataset].id} was trained on, so they cannot be compared"
            )
        return run

    def _record(self, experiment: Experiment, path: Path) -> None:
        """Record the experiment in a new run, and its code, which git could not name in the temporary folder."""
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


def _seed(run: IndexedRun) -> Any:
    return run.settings.get("seed")


def last_value(run: IndexedRun, metric: str) -> float:
    """The last value of a metric in the log of a run.

    Raises:
        UserError: the metric was never logged.
        TrialError: the value is not finite.
    """
    values = read_curve(run.path, metric).values
    if not values:
        raise UserError(f"{run.id} has not logged {metric}{nearest(metric, logged_metrics(run.path))}")
    if not math.isfinite(values[-1]):
        raise TrialError(f"{run.id}: its last {metric} is {values[-1]}")
    return values[-1]


def seed_order(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """Yield seeds for pairs: first those that both have, then those that one has, then new ones from 1 on."""
    both = sorted(set(first) & set(second))
    yield from both
    one = sorted(set(first) ^ set(second))
    yield from one
    known, seed = {*both, *one}, 0
    while True:
        seed += 1
        if seed not in known:
            yield seed
