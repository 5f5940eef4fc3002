"""Which runs are better, and by more than noise? A test between groups of seeds, and values at equal places."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.errors import UserError
from utils.experiments.curve import AXES, Axis, Curve, read_curve
from utils.experiments.diff import differing_files, uncommitted_code
from utils.files import read_json
from utils.runs.identity import (
    DERIVED,
    TRAJECTORY_KEYS,
    code_identity,
    corpus_of,
    differing_settings,
    origin_of,
    tokenizers_differ,
)
from utils.runs.index import IndexedRun, resolved_setting
from utils.runs.layout import METRIC_REGISTRY
from utils.runs.metrics import BITS_PER_BYTE, metric, registered_metrics
from utils.terminal.words import HASH_LENGTH, setting_text

SEEDS_NEEDED = 3  # in each group, for a verdict
LEVEL = 0.05  # probability of a false alarm in one verdict
UNCOMMITTED = "uncommitted code"
SETTING_OF_HASH = {"corpus": "dataset", "tokenizer": "tokenizer"}  # which setting names what a hash identifies
FILES_SHOWN = 3  # how many of the files are named in which the code of two groups differs
FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the last place that all runs have reached; values are compared there
Rows = list[tuple[float, list[float | None]]]  # (place, one value for each group)
Verdict = Literal["better", "worse", "different", "within noise", "not finite", "too few seeds"]


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed.

    paths: their folders, in the same order; an id alone is ambiguous, because a copy of a run has the same id.
    finals: the last value of the metric, from one complete run for each seed.
    mean, deviation: of these values; None if there are too few.
    interval: 95% confidence interval of the mean, by Student's t.
    """

    name: str
    runs: tuple[str, ...]
    finals: tuple[float, ...]
    mean: float | None = None
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PairVerdict:
    """The verdict on the first group against the second.

    difference: of the means; None if a group has no value.
    p: of Welch's t-test; None if no test was made.
    """

    first: str
    second: str
    verdict: Verdict
    difference: float | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, a verdict for each pair, and their values at equal places.

    at: axis -> rows of (place, one value for each group: the mean over its runs, or None if a run begins after it). If
        a group has complete runs, the first one of each seed counts. An axis is missing if a run is still at 0 on it.
    interpolated: the axes with places at which a run was not evaluated.
    left_out: "run: reason" for each run, or last value, that is left out.
    splits: for each group but the first, how it differs from the earlier group that is most like it, in words.
    note: what the tokenizers of the runs mean for the metric, if they differ.
    lower_is_better: None if neither direction is better.
    """

    metric: str
    groups: list[SeedGroup]
    verdicts: list[PairVerdict]
    at: dict[str, Rows]
    left_out: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    note: str | None = None
    lower_is_better: bool | None = True
    interpolated: tuple[str, ...] = ()


def compare(runs: Sequence[IndexedRun], metric_name: str | None = None) -> Comparison:
    """Group runs by experiment, judge each pair of groups, and compare the metric at equal steps, tokens and time.

    Args:
        metric_name: by default val/loss, or bits per byte if the tokenizers differ.

    Raises:
        UserError: fewer than two runs have logged the metric.
    """
    metric_name, note = comparable_metric(runs, metric_name)
    curves: dict[Path, Curve] = {}
    left_out = []
    for run in {run.path: run for run in runs}.values():
        try:
            curve = read_curve(run.path, metric_name)
        except UserError as error:
            left_out.append(str(error))
            continue
        if curve.values:
            curves[run.path] = curve
        else:
            left_out.append(f"{run.id}: {run.problem or f'no {metric_name} in its log'}")
    runs = list({run.path: run for run in runs if run.path in curves}.values())
    if len(runs) < 2:
        raise UserError(f"a comparison needs two runs with {metric_name}" + "".join(f"; {line}" for line in left_out))
    by_experiment: dict[str, list[IndexedRun]] = {}
    for run in runs:
        by_experiment.setdefault(repr(identity(run)), []).append(run)
    names = _names(list(by_experiment.values()))
    groups = [_group(name, members, curves) for name, members in zip(names, by_experiment.values(), strict=True)]
    unfinished = (run for run in runs if run.status != "completed")
    left_out += [f"{run.id}: {run.status}, so its last value is not a result" for run in unfinished]
    for members in by_experiment.values():
        counted = {run.path for run in _first_of_each_seed(members)}
        repeated = (run for run in members if run.status == "completed" and run.path not in counted)
        left_out += [f"{run.id}: repeats a seed of its group, so it does not count again" for run in repeated]
    lower = {"lower": True, "higher": False}.get(metric_direction(metric_name, runs))
    verdicts = [judge(a, b, lower) for a, b in itertools.combinations(groups, 2)]
    splits = _splits(names, [members[0] for members in by_experiment.values()])
    at = _at_equal(list(by_experiment.values()), curves)
    between = tuple(axis for axis in AXES if not _are_evaluated([place for place, _ in at.get(axis, ())], curves, axis))
    return Comparison(metric_name, groups, verdicts, at, left_out, splits, note, lower, between)


def comparable_metric(runs: Sequence[IndexedRun], name: str | None) -> tuple[str, str | None]:
    """The metric to compare runs by, and a note if their tokenizers differ: losses per token are then not comparable.

    Args:
        name: the requested metric, which is used in any case; None: choose one.
    """
    loss = name or "val/loss"
    if loss not in BITS_PER_BYTE or not tokenizers_differ(runs):
        return loss, None
    bits = BITS_PER_BYTE[loss]
    if name is not None:
        return loss, f"the tokenizers differ, and {loss} is per token: only {bits} is comparable"
    lacking = [run.id for run in runs if "val/loss" in run.summary() and bits not in run.summary()]
    if lacking:
        return loss, f"the tokenizers differ, and {loss} is per token, but {lacking[0]} has not logged {bits}"
    return bits, f"the tokenizers differ, so the runs are compared by {bits}: {loss} is per token"


def metric_direction(name: str, runs: Sequence[IndexedRun]) -> str:
    """The direction in which the metric is better ("lower", "higher" or "none"), as the runs have registered it."""
    for run in runs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            for facts in read_json(run.path / METRIC_REGISTRY, run.path):
                if facts["name"] == name:
                    return str(facts["direction"])
    return metric(name).direction if name in registered_metrics() else "none"


def judge(first: SeedGroup, second: SeedGroup, lower_is_better: bool | None = True) -> PairVerdict:
    """Judge whether the first group is better than the second, by Welch's t-test [Welch 1947] at the 5% level.

    Args:
        lower_is_better: None if neither direction is better.
    """
    if min(len(first.finals), len(second.finals)) < SEEDS_NEEDED:
        difference = None if first.mean is None or second.mean is None else first.mean - second.mean
        return PairVerdict(first.name, second.name, "too few seeds", difference, None)
    assert first.mean is not None
    assert second.mean is not None
    difference = first.mean - second.mean
    if not math.isfinite(difference):
        return PairVerdict(first.name, second.name, "not finite", difference, None)
    if first.deviation == second.deviation == 0:  # without variation the test is not defined
        p = 1.0 if difference == 0 else 0.0
    else:
        from scipy.stats import ttest_ind

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from a group without variation
            p = float(ttest_ind(first.finals, second.finals, equal_var=False).pvalue)
    verdict: Verdict = "within noise"
    if p < LEVEL:
        better: Verdict = "better" if (difference < 0) == lower_is_better else "worse"
        verdict = "different" if lower_is_better is None else better
    return PairVerdict(first.name, second.name, verdict, difference, p)


def identity(run: IndexedRun) -> dict[str, Any]:
    """Everything that decides the numbers of a run, except the seed: equal for all runs of a group."""
    commit, code = code_identity(run)
    return {
        **{key: resolved_setting(run, key) for key in sorted(run.settings) if key in TRAJECTORY_KEYS - {"seed"}},
        "corpus": corpus_of(run),
        "tokenizer": (run.record.get("resolved") or {}).get("tokenizer_hash"),
        "commit": commit,
        UNCOMMITTED: code,
        "first weights": origin_of(run),
    }


def _splits(names: Sequence[str], firsts: Sequence[IndexedRun]) -> list[str]:
    """For each group but the first, how it differs from the earlier group that is most like it, in words.

    Args:
        firsts: one run of each group.
    """
    facts = [identity(run) for run in firsts]
    lines = []
    for index in range(1, len(facts)):
        differing = [[key for key in {**of, **facts[index]} if of.get(key) != facts[index].get(key)] for of in facts]
        nearest = min(range(index), key=lambda other: len(differing[other]))
        words = [
            _difference(key, facts[nearest].get(key), facts[index].get(key), firsts[nearest], firsts[index])
            for key in _causes(differing[nearest], firsts[nearest], firsts[index])
        ]
        lines.append(f"{names[index]} differs from {names[nearest]}: {'; '.join(words)}")
    return lines


def _causes(keys: Sequence[str], first: IndexedRun, second: IndexedRun) -> Sequence[str]:
    """Of the facts that differ, those that the user chose; derived facts count only if nothing else differs."""
    derived = {key for key in DERIVED if all(run.settings.get(key, "") is None for run in (first, second))}
    return [key for key in keys if key not in derived] or keys


def _difference(key: str, before: Any, after: Any, first: IndexedRun, second: IndexedRun) -> str:
    """One fact in which two groups differ, in words."""
    if key == UNCOMMITTED:
        files = differing_files(uncommitted_code(first), uncommitted_code(second))
        more = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
        return f"{key} in {', '.join(files[:FILES_SHOWN])}{more}" if files else key
    if key in SETTING_OF_HASH:
        names = [setting_text(run.settings.get(SETTING_OF_HASH[key])) for run in (first, second)]
        if names[0] != names[1]:
            return f"{key} {names[1]}, not {names[0]}"
    return f"{key} {_fact_text(key, after)}, not {_fact_text(key, before)}"


def _fact_text(key: str, value: Any) -> str:
    if key in ("commit", "corpus", "tokenizer"):
        return str(value or "unknown")[:HASH_LENGTH]
    if key == "first weights" and value is not None:
        return "of {1} at step {2:,} ({0})".format(*value)
    return setting_text(value)


def _names(groups: Sequence[Sequence[IndexedRun]]) -> list[str]:
    """A short name for each group: the tag of its first run that counts; settings that differ too if tags are equal."""
    firsts = [members[0] for members in groups]
    names = [_tag_of(members) for members in groups]
    if len(set(names)) < len(names):
        keys = [key for key in differing_settings(firsts) if key != "seed"]
        words = [" ".join(f"{key}={resolved_setting(run, key)}" for key in keys[:3]) for run in firsts]
        names = [f"{name} {word}".strip() for name, word in zip(names, words, strict=True)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _tag_of(members: Sequence[IndexedRun]) -> str:
    first = counted_runs(members)[0]
    return str(first.record.get("tag") or first.id)


def counted_runs(members: Sequence[IndexedRun]) -> Sequence[IndexedRun]:
    """Of the runs of a group, those whose curves are averaged: the first complete one of each seed; if none is, all."""
    return _first_of_each_seed(members) or members


def _first_of_each_seed(members: Sequence[IndexedRun]) -> list[IndexedRun]:
    """The first complete run of each seed; a repetition adds no information."""
    of_seed = {repr(run.settings.get("seed")): run for run in reversed(members) if run.status == "completed"}
    return list(reversed(of_seed.values()))


def _group(name: str, members: Sequence[IndexedRun], curves: dict[Path, Curve]) -> SeedGroup:
    finals = tuple(curves[run.path].values[-1] for run in _first_of_each_seed(members))
    ids, paths = tuple(run.id for run in members), tuple(run.path for run in members)
    if not finals:
        return SeedGroup(name, ids, finals, paths=paths)
    mean = statistics.fmean(finals)
    if len(finals) < 2 or not math.isfinite(mean):
        return SeedGroup(name, ids, finals, mean, paths=paths)
    from scipy.stats import t

    deviation = statistics.stdev(finals)
    half = float(t.ppf(1 - LEVEL / 2, len(finals) - 1)) * deviation / math.sqrt(len(finals))
    return SeedGroup(name, ids, finals, mean, deviation, (mean - half, mean + half), paths)


def _at_equal(groups: Sequence[Sequence[IndexedRun]], curves: dict[Path, Curve]) -> dict[str, Rows]:
    """The metric of each group on each axis, at FRACTIONS of the last place that all runs have reached.

    Only the runs of `counted_runs` count: a run that crashed early would otherwise end the tables early.
    """
    of_groups = [[curves[run.path] for run in counted_runs(group)] for group in groups]
    every = list(itertools.chain.from_iterable(of_groups))
    tables: dict[str, Rows] = {}
    for axis in AXES:
        reached = min(curve.places(axis)[-1] for curve in every)
        if reached == 0:
            continue
        # Prefer places at which all runs were evaluated: nothing is interpolated there.
        shared = sorted(set.intersection(*(set(curve.places(axis)) for curve in every)) - {0})
        places = {fraction * reached for fraction in FRACTIONS}
        if len(shared) > 1:
            places = {min(shared, key=lambda one: abs(one - place)) for place in places}
        elif axis != "time":
            places = {math.ceil(place) for place in places}
        tables[axis] = [
            (place, [_mean([curve.at(axis, place) for curve in group]) for group in of_groups])
            for place in sorted(places)
        ]
    return tables


def _are_evaluated(places: Sequence[float], curves: dict[Path, Curve], axis: Axis) -> bool:
    """Whether every curve has a logged value at each of these places that it reaches."""
    of_curves = [curve.places(axis) for curve in curves.values()]
    return all(place in of_curve for of_curve in of_curves for place in places if place <= of_curve[-1])


def _mean(values: Sequence[Any]) -> float | None:
    return None if None in values else statistics.fmean(values)
