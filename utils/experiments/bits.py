"""Two logs bit by bit. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.runs.layout import LOGS
from utils.runs.log import HISTOGRAMS_FILE, LOG_FILES, METRICS_FILE, read_records
from utils.runs.metrics import NOT_METRICS, is_reproducible


@dataclass(frozen=True)
class Difference:
    """The first place where two logs do not say the same."""

    step: int
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        values = f": {self.name} {self.before} vs {self.after}"
        return f"first difference at step {self.step:,}{values if len(values) < 200 else f': {self.name}'}"


@dataclass(frozen=True)
class LogComparison:
    """steps: how many updates both logs tell the training loss of, up to the first difference.

    problem: why the logs cannot be compared.
    """

    steps: int
    difference: Difference | None
    problem: str | None = None

    @property
    def identical(self) -> bool:
        return self.difference is None and self.problem is None and self.steps > 0


def compare_logs(before: Path, after: Path, first: int = 0) -> LogComparison:
    """Compare what two run directories logged at the same steps, bit by bit, from step `first` on.

    Left out is what the machine decides: times, speeds, system metrics (Metric.reproducible).
    """
    try:
        return _compare(before, after, first)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # lines that no writer of ours wrote
        return LogComparison(0, None, f"a log is damaged: {type(error).__name__}: {error}")


def _compare(before: Path, after: Path, first: int) -> LogComparison:
    steps, differences = 0, []
    for log_file in LOG_FILES:
        logs = (_numbers(run / LOGS / log_file, log_file, first) for run in (before, after))
        for step, old, new in _same_steps(*logs):
            name = next(
                (name for name in old if name in new and repr(old[name]) != repr(new[name])), None
            )  # -0.0 is not 0.0
            if name is not None:
                differences.append(Difference(step, name, old[name], new[name]))
                break
            steps += log_file == METRICS_FILE and "train/loss" in old and "train/loss" in new
    first_one = min(differences, key=lambda difference: difference.step, default=None)
    return LogComparison(steps if first_one is None else min(steps, first_one.step - first), first_one)


Numbers = dict[str, Any]


def _numbers(path: Path, log_file: str, first: int) -> Iterator[tuple[int, Numbers]]:
    """What a log says of each step, by name; non-finite numbers are strings there, and equal themselves."""
    records = (record for record in read_records(path) if record["step"] >= first)
    for step, of_step in itertools.groupby(records, key=lambda record: record["step"]):
        numbers: Numbers = {}
        for record in of_step:
            facts = {key: value for key, value in record.items() if key not in NOT_METRICS}
            if log_file == METRICS_FILE:
                numbers |= {name: value for name, value in facts.items() if is_reproducible(name)}
            elif log_file == HISTOGRAMS_FILE:
                numbers[f"histogram of {facts.pop('name')}"] = facts
            else:
                numbers["sample text"] = facts["text"]
        yield step, numbers


def _same_steps(
    left: Iterator[tuple[int, Numbers]], right: Iterator[tuple[int, Numbers]]
) -> Iterator[tuple[int, Numbers, Numbers]]:
    """What both say of the steps that both have; in either the steps only grow."""
    one, other = next(left, None), next(right, None)
    while one and other:
        if one[0] == other[0]:
            yield one[0], one[1], other[1]
        smaller = min(one[0], other[0])
        one, other = (next(log, None) if entry[0] == smaller else entry for entry, log in ((one, left), (other, right)))
