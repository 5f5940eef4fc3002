"""Bisection: which commit, or which settings together, make the difference between two experiments?

The settings and the code that differ are treated as changes of the good experiment; delta debugging finds the smallest
set of changes that makes it behave like the bad one. If the code is in the set, a binary search finds the first bad
commit. A trial is judged by bits (does it log the same numbers as the good one?) or by the loss (a sequential test
against the midpoint between the two).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from utils.errors import UserError
from utils.experiments.bits import compare_logs
from utils.experiments.compare import comparable_metric, metric_direction
from utils.experiments.delta import Outcome, first_bad, smallest_set
from utils.experiments.reproduce import environment_differences
from utils.experiments.sequential import look
from utils.experiments.subjects import Code, Experiment, Subjects
from utils.experiments.trials import TrialError, Trials, last_value, seed_order
from utils.machine.signals import raise_on_signals
from utils.runs.code import open_repo
from utils.runs.index import IndexedRun
from utils.terminal.words import printable, setting_text

Oracle = Literal["bits", "loss"]
BISECT_SEEDS = 3  # for each trial, if it is judged by the loss
CODE = "code"  # the change from the good code to the bad code; all others are named after a setting


@dataclass(frozen=True)
class Bisection:
    """What makes the difference between two experiments.

    settings: name -> (good value, bad value); code: whether the code is needed too.
    commit: the first bad commit, with its subject; None if the code makes no difference, or no commit can be named.
    doubtful: commits before it that could not be judged.
    trials: number of variants that were judged.
    trained: number of runs that were trained; seconds: how long the bisection took.
    problem: why nothing was found.
    environment: facts that differ in the environment, which is not varied.
    """

    good: str
    bad: str
    oracle: Oracle
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    code: bool = False
    commit: str | None = None
    doubtful: list[str] = field(default_factory=list)
    trials: int = 0
    trained: int = 0
    seconds: float = 0.0
    problem: str | None = None
    environment: list[str] = field(default_factory=list)


def bisect(
    good: str,
    bad: str,
    root: Path,
    runs_dir: Path,
    *,
    oracle: Oracle | None = None,
    metric: str | None = None,
    seeds: int = BISECT_SEEDS,
    settings: str | None = None,
    trusted: bool = False,
    output: IO[str],
) -> Bisection:
    """Find the commit or the settings that make the difference between two experiments, training what is missing.

    Args:
        oracle: how trials are judged; by default by bits if no setting differs, and by the loss otherwise.
        metric: the metric that the loss oracle compares.
        seeds: seeds of each trial for the loss; with fewer than three, the nearer of the two experiments wins.
        settings: settings of both, if neither is a run.

    Raises:
        UserError: the two cannot be compared.
    """
    with raise_on_signals(), tempfile.TemporaryDirectory(prefix="bisect-") as folder:
        subjects = Subjects(root, runs_dir, Path(folder), trusted)
        bad_one, good_one = subjects.pair(bad, good, settings)
        runs_dir.mkdir(parents=True, exist_ok=True)
        return Bisector(subjects, Trials(root, runs_dir, Path(folder), output), good_one, bad_one).run(
            oracle, metric, seeds
        )


class Bisector:
    """One bisection: the changes between two experiments, and the trials of variants of the good one."""

    def __init__(self, subjects: Subjects, trials: Trials, good: Experiment, bad: Experiment) -> None:
        self.subjects, self.trials, self.good, self.bad = subjects, trials, good, bad
        before, after = good.settings, bad.settings
        self.settings = {key: (before[key], after[key]) for key in before if before[key] != after.get(key)}
        self.changes = [*self.settings, *([CODE] if good.code != bad.code else [])]
        self.count = 0

    def run(self, oracle: Oracle | None, metric: str | None, seeds: int) -> Bisection:
        good_run, bad_run = self.good.run, self.bad.run
        environment = environment_differences(good_run, bad_run) if good_run and bad_run else []
        chosen: Oracle = oracle or ("loss" if self.settings else "bits")
        facts: dict[str, Any] = {"good": self.good.name, "bad": self.bad.name, "oracle": chosen}
        facts["environment"] = environment
        if not self.changes:
            return Bisection(**facts, problem="no setting and no code differs")
        self.trials.one_text = chosen == "loss"  # by bits, another text counts as a difference
        judge = Bits(self, seeds=1) if chosen == "bits" else Losses(self, metric, seeds)
        try:
            problem = judge.prepare()
            if problem is None and judge.outcome(self.variant(self.changes)) != "bad":
                problem = "with all settings and the code of the bad one, the good one does not behave like the bad one"
            if problem is not None:
                return Bisection(**facts, **self._cost(), problem=problem)
            needed = smallest_set(self.changes, lambda some: judge.outcome(self.variant(some)))
            settings = {key: self.settings[key] for key in needed if key != CODE}
            commit, doubtful = self._first_commit(list(settings), judge) if CODE in needed else (None, [])
        except TrialError as error:
            return Bisection(**facts, **self._cost(), problem=str(error))
        return Bisection(
            **facts, **self._cost(), settings=settings, code=CODE in needed, commit=commit, doubtful=doubtful
        )

    def _cost(self) -> dict[str, Any]:
        trained, seconds = len(self.trials.trained), round(self.trials.seconds, 1)
        return {"trials": self.count, "trained": trained, "seconds": seconds}

    def variant(self, changes: Sequence[str], code: Code | None = None) -> Experiment | None:
        """The good experiment with some of the changes; None if the configuration is not valid."""
        settings = {key: self.settings[key][1] for key in changes if key != CODE}
        if code is None:
            code = self.bad.source if CODE in changes else self.good.source
        words = [f"{key}={setting_text(value)}" for key, value in settings.items()]
        name = ", ".join([*words, *([code.name] if code != self.good.source else [])]) or self.good.name
        try:
            return self.subjects.variant(self.good, code, settings, name)
        except UserError as error:
            print(printable(f"{name}: not valid: {error}"), file=self.trials.output, flush=True)
            return None

    def _first_commit(self, settings: list[str], judge: Judge) -> tuple[str | None, list[str]]:
        """The first bad commit between the two, and the commits before it that could not be judged."""
        codes = self._codes()
        if codes is None:
            return None, []
        good, bad = first_bad(len(codes), lambda index: judge.outcome(self.variant(settings, codes[index])))
        return codes[bad].name, [code.name for code in codes[good + 1 : bad]]

    def _codes(self) -> list[Code] | None:
        """The good code, the code of each commit in between, and the bad code, in order.

        None if git does not know one of them, or the good commit is not an ancestor of the bad one.
        """
        good, bad = self.good.source, self.bad.source
        if good.commit is None or bad.commit is None:
            return None
        with open_repo(self.subjects.root) as repo:
            status, *_ = repo.git.merge_base(
                good.commit, bad.commit, is_ancestor=True, with_extended_output=True, with_exceptions=False
            )
            if status != 0:  # 1: not an ancestor; higher: a commit is missing here
                return None
            listing = repo.git.log("--first-parent", "--reverse", "--format=%H %s", f"{good.commit}..{bad.commit}")
        commits = [Code(line.split(" ", 1)[0], b"", f"{line[:12]} {line[41:]}") for line in listing.splitlines()]
        committed = [Code(good.commit, b"", f"{good.name} without its uncommitted changes")] if good.patch else []
        return [good, *committed, *commits, *([bad] if bad.patch or not commits else [])]


class Judge:
    """Decides whether a variant behaves like the good or like the bad experiment."""

    def __init__(self, bisector: Bisector, seeds: int) -> None:
        self.trials, self.bisector = bisector.trials, bisector
        self._existing: dict[str, dict[int, IndexedRun]] = {}
        found = self.runs_of(bisector.good)
        order = seed_order(list(found), list(self.runs_of(bisector.bad)))
        self.seeds = [next(order) for _ in range(seeds)]

    def prepare(self) -> str | None:
        """Train the good and the bad experiment; returns why they cannot be told apart, None if they can."""
        raise NotImplementedError

    def judge(self, variant: Experiment) -> Outcome:
        raise NotImplementedError

    def outcome(self, variant: Experiment | None) -> Outcome:
        """How a variant behaves; "unresolved" if it cannot be trained or the test cannot decide."""
        self.bisector.count += 1
        if variant is None:
            return "unresolved"
        try:
            found = self.judge(variant)
        except TrialError as error:
            print(printable(f"{variant.name}: {error}"), file=self.trials.output, flush=True)
            found = "unresolved"
        print(printable(f"{variant.name}: {found}"), file=self.trials.output, flush=True)
        return found

    def runs_of(self, experiment: Experiment) -> dict[int, IndexedRun]:
        if experiment.key not in self._existing:
            [self._existing[experiment.key]] = self.trials.existing(experiment)
        return self._existing[experiment.key]

    def run(self, experiment: Experiment, seed: int) -> IndexedRun:
        runs = self.runs_of(experiment)
        if seed not in runs:
            runs[seed] = self.trials.train(experiment, seed)
        return runs[seed]


class Bits(Judge):
    """A variant is good if it logs the same numbers as the good experiment."""

    def prepare(self) -> str | None:
        good, bad = self.bisector.good, self.bisector.bad
        first = self.run(good, self.seeds[0])
        again = self.trials.train(good, self.seeds[0])
        logs = compare_logs(first.path, again.path)
        if not logs.identical:
            return f"the good one is not repeatable here: {logs.difference or logs.problem}"
        if compare_logs(first.path, self.run(bad, self.seeds[0]).path).identical:
            return "both log the same numbers"
        return None

    def judge(self, variant: Experiment) -> Outcome:
        expected, found = (self.run(one, self.seeds[0]) for one in (self.bisector.good, variant))
        return "good" if compare_logs(expected.path, found.path).identical else "bad"


class Losses(Judge):
    """A variant is good or bad by the side of the midpoint on which its metric lies, by a sequential test."""

    def __init__(self, bisector: Bisector, metric: str | None, seeds: int) -> None:
        super().__init__(bisector, seeds)
        self.metric, self.gap = metric, 0.0

    def prepare(self) -> str | None:
        good, bad = self.bisector.good, self.bisector.bad
        runs = [self.run(good, self.seeds[0]), self.run(bad, self.seeds[0])]
        self.metric, _ = comparable_metric(runs, self.metric)
        if metric_direction(self.metric, runs) == "none":
            raise UserError(f"--metric {self.metric}: neither direction is better")
        gaps = [self._distance(bad, seed) for seed in self.seeds]
        self.gap = statistics.fmean(gaps)
        if self._side(gaps, 0.0) != "bad" and self._side([-gap for gap in gaps], 0.0) != "bad":
            return f"{self.metric} differs by {self.gap:+.4g}, too little for {len(gaps)} seeds to tell from noise"
        return None

    def _distance(self, variant: Experiment, seed: int) -> float:
        """The metric of a variant minus that of the good experiment, with the same seed."""
        assert self.metric is not None
        found, expected = (last_value(self.run(one, seed), self.metric) for one in (variant, self.bisector.good))
        return found - expected

    def _side(self, distances: Sequence[float], middle: float) -> Outcome:
        if len(self.seeds) < BISECT_SEEDS:
            mean = statistics.fmean(distances)
            return "bad" if mean > middle else "good"
        decision = look(distances, len(self.seeds), middle).decision
        return "unresolved" if decision is None else "bad" if decision == "keep" else "good"

    def judge(self, variant: Experiment) -> Outcome:
        sign = 1.0 if self.gap > 0 else -1.0
        distances: list[float] = []
        for seed in self.seeds:
            distances.append(sign * self._distance(variant, seed))
            if len(distances) >= min(BISECT_SEEDS, len(self.seeds)):
                outcome = self._side(distances, abs(self.gap) / 2)
                if outcome != "unresolved":
                    return outcome
        return "unresolved"
