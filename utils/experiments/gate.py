"""The gate: is a candidate better than a baseline, or was it the seed?

Both are trained with the same seeds, and so with the same batches in the same order. After each seed, a sequential test
(utils/experiments/sequential.py) judges the differences. Every verdict goes into a ledger, and nothing is tried twice.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from utils.errors import UserError, nearest
from utils.experiments.bits import compare_logs
from utils.experiments.compare import comparable_metric, metric_direction
from utils.experiments.ledger import append, read_ledger, trial_lock
from utils.experiments.sequential import MAX_SEEDS, Evidence, look
from utils.experiments.subjects import Experiment, Subjects, hash_of
from utils.experiments.trials import BudgetError, TrialError, Trials, last_value, seed_order
from utils.machine.signals import raise_on_signals
from utils.runs.metrics import registered_metrics

Verdict = Literal["keep", "discard", "unsure"]
EXIT_STATUS: dict[Verdict, int] = {"keep": 0, "discard": 1, "unsure": 3}
SAME_AGAIN = 2  # after so many pairs with identical logs, no more are trained
BUDGET = "budget"


@dataclass(frozen=True)
class Pair:
    """The two runs of one seed, and their values of the metric."""

    seed: int
    candidate: str
    baseline: str
    candidate_value: float
    baseline_value: float


@dataclass(frozen=True)
class GateAnswer:
    """A verdict, and the evidence for it.

    reason: why, in words.
    effect: mean improvement of the candidate over the baseline, positive if it is better; None without a pair.
    interval: confidence interval of the effect; those of all looks hold together with 95%. None before three pairs.
    seconds: duration of this call; trained: number of runs that it trained.
    before: when the verdict was reached, if an earlier call reached it.
    compared: number of verdicts in the ledger, including this one.
    """

    verdict: Verdict
    reason: str
    candidate: str
    baseline: str
    metric: str
    effect: float | None
    interval: tuple[float, float] | None
    min_effect: float
    max_seeds: int
    pairs: list[Pair] = field(default_factory=list)
    seconds: float = 0.0
    trained: int = 0
    before: str | None = None
    compared: int = 0


def gate(
    candidate: str,
    baseline: str,
    root: Path,
    runs_dir: Path,
    *,
    metric: str | None = None,
    min_effect: float = 0.0,
    max_seeds: int = MAX_SEEDS,
    budget: float | None = None,
    settings: str | None = None,
    trusted: bool = False,
    output: IO[str],
) -> GateAnswer:
    """Compare a candidate with a baseline, training what is missing.

    Args:
        metric: val/loss by default, or bits per byte if the tokenizers differ.
        min_effect: the improvement that the candidate must exceed.
        max_seeds: the most pairs; if the same question was asked before, its number applies instead.
        budget: the most seconds of wall time.
        settings: settings of both, if neither is a run.
        output: where progress is printed.

    Raises:
        UserError: the two cannot be compared.
    """
    if metric is not None and metric not in registered_metrics() and (hint := nearest(metric, registered_metrics())):
        raise UserError(f"--metric: no metric {metric}{hint}")
    with raise_on_signals(), tempfile.TemporaryDirectory(prefix="gate-") as folder:
        subjects = Subjects(root, runs_dir, Path(folder), trusted)
        pair = subjects.pair(candidate, baseline, settings)
        runs_dir.mkdir(parents=True, exist_ok=True)
        key = hash_of([*(one.key for one in pair), metric, min_effect])
        trials = Trials(root, runs_dir, Path(folder), output, budget)
        with trial_lock(runs_dir, key):
            return _decide(Question(*pair, key, metric, min_effect, max_seeds), trials)


@dataclass(frozen=True)
class Question:
    """Is the candidate better than the baseline by more than min_effect?

    key: a hash that identifies the question in the ledger.
    """

    candidate: Experiment
    baseline: Experiment
    key: str
    metric: str | None
    min_effect: float
    max_seeds: int


def _decide(question: Question, trials: Trials) -> GateAnswer:
    """The answer in the ledger if it is final; otherwise a new one, which is added to the ledger."""
    entries = read_ledger(trials.runs_dir)
    before = [entry for entry in entries if entry["key"] == question.key]
    if before and before[-1].get("final"):
        return _answer_of(before[-1], question, trials, len(entries))
    max_seeds = int(before[-1]["max_seeds"]) if before else question.max_seeds  # looks were made at its levels
    seeds = [int(pair["seed"]) for pair in before[-1].get("pairs") or ()] if before else []
    collected = Collected(question, trials, max_seeds, seeds)
    verdict, reason, final = collected.verdict()
    answer = GateAnswer(
        verdict,
        reason,
        question.candidate.name,
        question.baseline.name,
        collected.metric or question.metric or "val/loss",
        collected.evidence.effect,
        collected.evidence.interval,
        question.min_effect,
        max_seeds,
        collected.pairs,
        round(trials.seconds, 1),
        len(trials.trained),
        None,
        len(entries) + 1,
    )
    append(trials.runs_dir, _entry(answer, question, final))
    return answer


class Collected:
    """The pairs so far, and the evidence that they give.

    seeds: the seeds of an earlier call's pairs, in its order, so that no look is repeated with other pairs.
    """

    def __init__(self, question: Question, trials: Trials, max_seeds: int, seeds: Sequence[int]) -> None:
        self.question, self.trials, self.max_seeds, self.seeds = question, trials, max_seeds, seeds
        self.pairs: list[Pair] = []
        self.evidence = Evidence(None, None, None)
        self.metric: str | None = None
        self._sign = -1.0

    def verdict(self) -> tuple[Verdict, str, bool]:
        """Train pairs until there is a verdict; returns it, its reason, and whether it is final."""
        question = self.question
        if question.candidate.key == question.baseline.key:
            return "unsure", "both are the same code and configuration: there is nothing to compare", True
        try:
            return self._from_pairs()
        except BudgetError:
            return "unsure", f"the time budget ran out after {len(self.pairs)} seeds; another call continues", False

    def _from_pairs(self) -> tuple[Verdict, str, bool]:
        candidate, baseline = self.question.candidate, self.question.baseline
        of_candidate, of_baseline = self.trials.existing(candidate, baseline)
        improvements: list[float] = []
        same_logs: list[bool] = []
        order = seed_order(list(of_candidate), list(of_baseline))
        seeds = itertools.chain(self.seeds, (seed for seed in order if seed not in self.seeds))
        while len(self.pairs) < self.max_seeds:
            seed = next(seeds)
            base = of_baseline.get(seed) or self.trials.train(baseline, seed)
            if self.metric is None:
                self._choose_metric([base])
            assert self.metric is not None
            base_value = last_value(base, self.metric)
            try:
                run = of_candidate.get(seed) or self.trials.train(candidate, seed)
                if not self.pairs:
                    self._choose_metric([run, base])
                    base_value = last_value(base, self.metric)
                value = last_value(run, self.metric)
            except TrialError as error:
                reason = f"the candidate has no result where the baseline has one: {error}"
                return "unsure" if error.by_machine else "discard", reason, error.final
            self.pairs.append(Pair(seed, run.id, base.id, value, base_value))
            improvements.append(self._sign * (value - base_value))
            self.evidence = look(improvements, self.max_seeds, self.question.min_effect)
            print(self._progress(), file=self.trials.output, flush=True)
            if self.evidence.decision is not None:
                return self.evidence.decision, f"after {len(self.pairs)} seeds", True
            if len(self.pairs) <= SAME_AGAIN:
                logs = compare_logs(base.path, run.path)
                same_logs.append(logs.difference is None and logs.problem is None)
            if len(self.pairs) == SAME_AGAIN and not any(improvements) and all(same_logs):
                return "unsure", f"no difference at all with {SAME_AGAIN} seeds: the change has no effect", True
        return "unsure", f"{len(self.pairs)} seeds cannot tell the effect from the noise", True

    def _choose_metric(self, runs: Sequence[Any]) -> None:
        self.metric, _ = comparable_metric(runs, self.question.metric)
        direction = metric_direction(self.metric, runs)
        if direction not in ("lower", "higher"):
            raise UserError(f"--metric {self.metric}: neither direction is better")
        self._sign = -1.0 if direction == "lower" else 1.0

    def _progress(self) -> str:
        pair, effect = self.pairs[-1], self.evidence.effect
        values = f"{pair.candidate_value:.6g} against {pair.baseline_value:.6g}"
        return f"seed {pair.seed}: {self.metric} {values}; mean improvement {effect:+.4g}"


def _entry(answer: GateAnswer, question: Question, final: bool) -> Mapping[str, Any]:
    """The line of the ledger for an answer."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    keys = {
        role: {"name": one.name, "config": one.config_key, "commit": one.code[0], "code": one.code[1]}
        for role, one in (("candidate", question.candidate), ("baseline", question.baseline))
    }
    facts = {name: value for name, value in asdict(answer).items() if name not in ("before", "compared")}
    return {"key": question.key, "time": now, "final": final, **facts, **keys}


def _answer_of(entry: Mapping[str, Any], question: Question, trials: Trials, compared: int) -> GateAnswer:
    """The answer recorded in an entry of the ledger."""
    interval = entry.get("interval")
    return GateAnswer(
        entry["verdict"],
        str(entry.get("reason")),
        question.candidate.name,
        question.baseline.name,
        str(entry.get("metric")),
        entry.get("effect"),
        (interval[0], interval[1]) if interval else None,
        question.min_effect,
        int(entry["max_seeds"]),
        [Pair(**pair) for pair in entry.get("pairs") or ()],
        round(trials.seconds, 1),
        0,
        str(entry.get("time")),
        compared,
    )
