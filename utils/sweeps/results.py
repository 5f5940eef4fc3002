"""The value of a run for the goal of a sweep, read from its log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.runs.duration import seconds_of
from utils.runs.layout import METRICS_LOG
from utils.runs.log import read_from, read_records
from utils.runs.metrics import decode_number
from utils.runs.run import read_record
from utils.sweeps.space import VAL_LOSS, Goal


class Evaluations:
    """Reads the values of a metric from a growing log, each once.

    at_step: the values that `new` has returned so far, by step.
    last_step: the last step in the log.
    """

    def __init__(self, run: Path, metric: str) -> None:
        self._path, self._metric, self._offset = run / METRICS_LOG, metric, 0
        self.at_step: dict[int, float] = {}
        self.last_step = 0

    def new(self) -> list[tuple[int, float]]:
        """(step, value) of each evaluation since the previous call."""
        found = []
        while self._path.exists():
            records, end = read_from(self._path, self._offset)
            if end == self._offset:
                break
            self._offset = end
            for record in records:
                self.last_step = max(self.last_step, int(record.get("step", 0)))
                if self._metric in record:
                    found.append((int(record["step"]), decode_number(record[self._metric])))
        self.at_step.update(found)
        return found


def value_of_run(run: Path, goal: Goal, step: int | None = None, *, best_weights: bool = False) -> float | None:
    """The value of a run for a goal; None if its log does not have it.

    Args:
        step: the step of the evaluation that counts; None: the last one, or with `best_weights` the one whose weights
            are exported.
    """
    if goal.seconds_to_loss is not None:
        return seconds_to_loss(run, goal.seconds_to_loss)
    evaluations = Evaluations(run, goal.metric)
    evaluations.new()
    if step is None and best_weights:
        step = read_record(run).get("best_step")
    if step is not None:
        return evaluations.at_step.get(step)
    return evaluations.at_step[max(evaluations.at_step)] if evaluations.at_step else None


def seconds_to_loss(run: Path, loss: float) -> float | None:
    """Seconds of training until val/loss was `loss` or less, without pauses between sessions; None: it never was."""
    record = read_record(run)
    sessions = [record.get("start"), *(session.get("time") for session in record.get("resumes") or ())]
    starts = [start for start in map(seconds_of, sessions) if start is not None]
    before, last = 0.0, 0.0
    current = 0
    for entry in _timed(run):
        moment = entry["time"]
        while current + 1 < len(starts) and moment >= starts[current + 1]:
            before, last, current = before + last, 0.0, current + 1
        last = max(last, moment - starts[current])
        if VAL_LOSS in entry and decode_number(entry[VAL_LOSS]) <= loss:
            return before + last
    return None


def _timed(run: Path) -> Iterator[Mapping[str, Any]]:
    return (record for record in read_records(run / METRICS_LOG) if isinstance(record.get("time"), int | float))
