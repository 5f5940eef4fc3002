"""Bitwise comparison of the logs of two runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runs.layout import LOGS
from utils.runs.log import HISTOGRAMS_FILE, LOG_FILES, METRICS_FILE, SAMPLES_FILE, RunLogError, read_records
from utils.runs.metrics import NOT_METRICS, is_reproducible

# What reading a line may raise that our writer did not write.
DAMAGED_LOG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Difference:
    """The first number that differs between two logs."""

    step: int
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        values = f": {self.name} {self.before} vs {self.after}"
        return f"first difference at step {self.step:,}{values if len(values) < 200 else f': {self.name}'}"


@dataclass(frozen=True)
class LogComparison:
    """The result of comparing two logs.

    steps: updates whose training loss is in both logs, up to the first difference.
    problem: why the logs cannot be compared, if they cannot.
    """

    steps: int
    difference: Difference | None
    problem: str | None = None

    @property
    def identical(self) -> bool:
        return self.difference is None and self.problem is None and self.steps > 0

    def __str__(self) -> str:
        if self.identical:
            return f"identical in all {self.steps:,} steps that both have"
        return str(self.difference or self.problem or "no step that both have logged")


def compare_logs(before: Path, after: Path, first: int = 0, first_text: int = 0) -> LogComparison:
    """Compare, bit by bit, what two run directories logged at the same steps, from step `first` on.

    Metrics that depend on the machine (times, speeds, system metrics: not Metric.reproducible) are ignored.

    Args:
        first_text: the step from which sample texts are compared: a resume may have changed their prompt and length.
    """
    try:
        return _compare(before, after, first, first_text)
    except RunLogError as error:
        return LogComparison(0, None, str(error))
    except DAMAGED_LOG as error:
        return LogComparison(0, None, f"a log is damaged: {type(error).__name__}: {error}")


def _compare(before: Path, after: Path, first: int, first_text: int) -> LogComparison:
    steps, differences = 0, []
    for log_file in LOG_FILES:
        begin = max(first, first_text) if log_file == SAMPLES_FILE else first
        logs = (_numbers(run / LOGS / log_file, log_file, begin) for run in (before, after))
        for step, old, new in _same_steps(*logs):
            differing = (name for name in old if name in new and repr(old[name]) != repr(new[name]))  # -0.0 is not 0.0
            name = next(differing, None)
            if name is not None:
                differences.append(Difference(step, name, old[name], new[name]))
                break
            steps += log_file == METRICS_FILE and "train/loss" in old and "train/loss" in new
    first_one = min(differences, key=lambda difference: difference.step, default=None)
    return LogComparison(steps if first_one is None else min(steps, first_one.step - first), first_one)


Numbers = dict[str, Any]  # name -> the value that a log has for one step


def _numbers(path: Path, log_file: str, first: int) -> Iterator[tuple[int, Numbers]]:
    """Yield each step in a log with its numbers; the log has non-finite numbers as strings, so NaN equals NaN."""
    records = (record for record in read_records(path) if record["step"] >= first)
    for step, of_step in itertools.groupby(records, key=lambda record: record["step"]):
        numbers: Numbers = {}
        for record in of_step:
            values = {key: value for key, value in record.items() if key not in NOT_METRICS}
            if log_file == METRICS_FILE:
                numbers |= {name: value for name, value in values.items() if is_reproducible(name)}
            elif log_file == HISTOGRAMS_FILE:
                numbers[f"histogram of {values.pop('name')}"] = values
            else:
                numbers["sample text"] = values["text"]
        yield step, numbers


def _same_steps(
    left: Iterator[tuple[int, Numbers]], right: Iterator[tuple[int, Numbers]]
) -> Iterator[tuple[int, Numbers, Numbers]]:
    """Yield each step that both logs have, with the numbers of both; the steps of each log must increase."""
    one, other = next(left, None), next(right, None)
    while one and other:
        if one[0] == other[0]:
            yield one[0], one[1], other[1]
        smaller = min(one[0], other[0])
        one, other = (next(log, None) if entry[0] == smaller else entry for entry, log in ((one, left), (other, right)))
