"""Which of some runs are better, and is it more than noise? Metrics at equal steps, tokens and time. No torch here."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.errors import UserError
from utils.runs.index import (
    TRAJECTORY_KEYS,
    IndexedRun,
    code_identity,
    differing_settings,
    origin_of,
    read_run,
    resolved_setting,
    seconds_of,
)
from utils.runs.layout import METRIC_REGISTRY, METRICS_LOG
from utils.runs.log import read_records
from utils.runs.metrics import decode_number, metric, registered_metrics

METRIC = "val/loss"
SEEDS_NEEDED = 3  # on either side of a verdict
LEVEL = 0.05  # probability of a false alarm in one verdict
AXES = ("step", "tokens", "time")
FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of what all runs have reached, where they are compared
Verdict = Literal["better", "worse", "different", "within noise", "too few seeds"]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    finals: the last value of the metric of one complete run for each seed.
    mean, deviation, interval: of these; None where they are too few.
    """

    name: str
    runs: tuple[str, ...]
    finals: tuple[float, ...]
    mean: float | None = None
    deviation: float | None = None
    interval: tuple[float, float] | None = None  # 95% of the mean, by Student's t


@dataclass(frozen=True)
class PairVerdict:
    """The first group's metric against the second's; p: of Welch's t-test."""

    first: str
    second: str
    verdict: Verdict
    difference: float | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """at: axis -> rows of (place on the axis, one value a group: the mean over its runs)."""

    metric: str
    groups: list[Group]
    verdicts: list[PairVerdict]
    at: dict[str, list[tuple[float, list[float | None]]]]
    left_out: list[str] = field(default_factory=list)  # "run: reason"


@dataclass(frozen=True)
class Curve:
    """Values of one metric in the order of the log; step, tokens and time are known of each.

    time: seconds since the first record, pauses between sessions left out.
    """

    step: list[float]
    tokens: list[float]
    time: list[float]
    values: list[float]

    def at(self, axis: str, place: float) -> float | None:
        """The value at `place`, between two values on the line through them; None before the first."""
        places: list[float] = getattr(self, axis)
        index = bisect.bisect_right(places, place) - 1
        if index < 0 or index == len(places) - 1:
            return self.values[index] if index >= 0 else None
        share = (place - places[index]) / (places[index + 1] - places[index])
        return (
            self.values[index] + share * (self.values[index + 1] - self.values[index]) if share else self.values[index]
        )


def read_curve(run: Path, name: str) -> Curve:
    """One metric of a run; empty if it was never logged.

    Raises:
        UserError: the log holds a line that is no record.
    """
    try:
        return _read_curve(run, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.name}: its log is damaged: {type(error).__name__}: {error}") from None


def _read_curve(run: Path, name: str) -> Curve:
    curve = Curve([], [], [], [])
    elapsed, before = 0.0, None
    sessions = _session_starts(run)
    for record in read_records(run / METRICS_LOG):
        now = record["time"]
        resumed = before is not None and any(before < start <= now for start in sessions)
        elapsed, before = elapsed + (0.0 if before is None or resumed else max(0.0, now - before)), now
        if name in record:
            curve.step.append(record["step"])
            curve.tokens.append(record.get("tokens", 0))
            curve.time.append(elapsed)
            curve.values.append(decode_number(record[name]))
    return curve


def _session_starts(run: Path) -> list[float]:
    """When training went on after a pause, in seconds since the epoch."""
    resumes = read_run(run).record.get("resumes") or []
    starts = (seconds_of(session.get("time")) for session in resumes)
    return [start for start in starts if start is not None]


def compare(runs: Sequence[IndexedRun], name: str = METRIC) -> Comparison:
    """Groups of the same experiment, a verdict for each pair of them, and the metric at equal steps, tokens, time.

    Raises:
        UserError: fewer than two runs have logged the metric.
    """
    curves: dict[str, Curve] = {}
    left_out = []
    for run in {run.path: run for run in runs}.values():
        try:
            curve = read_curve(run.path, name)
        except UserError as error:
            left_out.append(str(error))
            continue
        if curve.values:
            curves[run.id] = curve
        else:
            left_out.append(f"{run.id}: {run.problem or f'no {name} in its log'}")
    runs = list({run.path: run for run in runs if run.id in curves}.values())
    if len(runs) < 2:
        raise UserError(f"two runs with {name} are needed to compare" + "".join(f"; {line}" for line in left_out))
    by_experiment: dict[str, list[IndexedRun]] = {}
    for run in runs:
        by_experiment.setdefault(_identity(run), []).append(run)
    names = _names(list(by_experiment.values()))
    groups = [_group(name, members, curves) for name, members in zip(names, by_experiment.values(), strict=True)]
    left_out += [f"{run.id}: {run.status}, so its last value is no result" for run in runs if run.status != "completed"]
    for members in by_experiment.values():
        counted = {run.id for run in _one_a_seed(members)}
        repeated = (run for run in members if run.status == "completed" and run.id not in counted)
        left_out += [f"{run.id}: repeats a seed of its group, so it counts no second time" for run in repeated]
    lower = {"lower": True, "higher": False}.get(metric_direction(name, runs))
    verdicts = [judge(a, b, lower) for a, b in itertools.combinations(groups, 2)]
    return Comparison(name, groups, verdicts, _at_equal(groups, curves), left_out)


def metric_direction(name: str, runs: Sequence[IndexedRun]) -> str:
    """Which way the metric is better, as the runs have registered it."""
    for run in runs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            for facts in json.loads((run.path / METRIC_REGISTRY).read_text(encoding="utf-8")):
                if facts["name"] == name:
                    return str(facts["direction"])
    return metric(name).direction if name in registered_metrics() else "none"


def judge(first: Group, second: Group, lower_is_better: bool | None = True) -> PairVerdict:
    """Whether the first group is better than the second, by Welch's t-test [Welch 1947] at the level of 5%.

    Args:
        lower_is_better: None: neither way is.
    """
    if min(len(first.finals), len(second.finals)) < SEEDS_NEEDED:
        difference = None if first.mean is None or second.mean is None else first.mean - second.mean
        return PairVerdict(first.name, second.name, "too few seeds", difference, None)
    assert first.mean is not None
    assert second.mean is not None
    difference = first.mean - second.mean
    if not math.isfinite(difference):
        return PairVerdict(first.name, second.name, "within noise", difference, None)
    if first.deviation == second.deviation == 0:  # the test knows no answer: nothing varies
        p = 1.0 if difference == 0 else 0.0
    else:
        from scipy.stats import ttest_ind

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a side where nothing varies
            p = float(ttest_ind(first.finals, second.finals, equal_var=False).pvalue)
    verdict: Verdict = "within noise"
    if p < LEVEL:
        better: Verdict = "better" if (difference < 0) == lower_is_better else "worse"
        verdict = "different" if lower_is_better is None else better
    return PairVerdict(first.name, second.name, verdict, difference, p)


def _identity(run: IndexedRun) -> str:
    """What runs of one group have in common: everything that decides the numbers, but for the seed."""
    decisive = {key: resolved_setting(run, key) for key in sorted(run.settings) if key in TRAJECTORY_KEYS - {"seed"}}
    resolved = run.record.get("resolved") or {}
    data = (resolved.get("corpus_hash"), resolved.get("tokenizer_hash"))
    return repr((decisive, data, code_identity(run), origin_of(run)))


def _names(groups: Sequence[Sequence[IndexedRun]]) -> list[str]:
    """A short name for each group: the tag of its runs, or what sets it apart."""
    firsts = [members[0] for members in groups]
    names = [_common_tag(members) for members in groups]
    if len(set(names)) < len(names):
        keys = [key for key in differing_settings(firsts) if key != "seed"]
        words = [" ".join(f"{key}={resolved_setting(run, key)}" for key in keys[:3]) for run in firsts]
        names = [f"{name} {word}".strip() for name, word in zip(names, words, strict=True)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _common_tag(members: Sequence[IndexedRun]) -> str:
    tags = {str(run.record.get("tag") or run.id) for run in members}
    return tags.pop() if len(tags) == 1 else min(tags, key=lambda tag: (len(tag), tag))


def _one_a_seed(members: Sequence[IndexedRun]) -> list[IndexedRun]:
    """The first complete run of each seed: a repetition says nothing new."""
    of_seed = {repr(run.settings.get("seed")): run for run in reversed(members) if run.status == "completed"}
    return list(reversed(of_seed.values()))


def _group(name: str, members: Sequence[IndexedRun], curves: dict[str, Curve]) -> Group:
    finals = tuple(curves[run.id].values[-1] for run in _one_a_seed(members))
    ids = tuple(run.id for run in members)
    if not finals:
        return Group(name, ids, finals)
    mean = statistics.fmean(finals)
    if len(finals) < 2 or not math.isfinite(mean):
        return Group(name, ids, finals, mean)
    from scipy.stats import t

    deviation = statistics.stdev(finals)
    half = float(t.ppf(1 - LEVEL / 2, len(finals) - 1)) * deviation / math.sqrt(len(finals))
    return Group(name, ids, finals, mean, deviation, (mean - half, mean + half))


def _at_equal(groups: Sequence[Group], curves: dict[str, Curve]) -> dict[str, list[tuple[float, list[float | None]]]]:
    """The metric of each group at parts of what all runs have reached, on each axis."""
    tables = {}
    for axis in AXES:
        reached = min(getattr(curve, axis)[-1] for curve in curves.values() if curve.values)
        # Places where all were evaluated, if there are some: then nothing is interpolated.
        shared = sorted(set.intersection(*(set(getattr(curve, axis)) for curve in curves.values())) - {0})
        wanted = [fraction * reached for fraction in FRACTIONS]
        places = (
            sorted({min(shared, key=lambda one: abs(one - place)) for place in wanted}) if len(shared) > 1 else wanted
        )
        tables[axis] = [
            (place, [_mean([curves[run].at(axis, place) for run in group.runs]) for group in groups])
            for place in places
        ]
    return tables


def _mean(values: Sequence[Any]) -> float | None:
    return None if None in values else statistics.fmean(values)
