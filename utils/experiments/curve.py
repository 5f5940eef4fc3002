"""One metric of one run over the course of training, by step, tokens and time."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from utils.errors import UserError
from utils.runs.duration import resume_times
from utils.runs.layout import METRICS_LOG
from utils.runs.log import RunLogError, read_records
from utils.runs.metrics import NOT_METRICS, decode_number

Axis = Literal["step", "tokens", "time"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Curve:
    """The values of a metric in the order of the log, and the place of each on every axis.

    tokens: the tokens that the run had been trained on.
    time: seconds since the first record, without the pauses between sessions.
    """

    step: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def places(self, axis: Axis) -> list[float]:
        """The place of each value on `axis`."""
        places: list[float] = getattr(self, axis)
        return places

    def at(self, axis: Axis, place: float) -> float | None:
        """The value at `place`, by linear interpolation; the last value after the end, None before the start."""
        places = self.places(axis)
        left = bisect.bisect_right(places, place) - 1
        if left < 0 or left == len(places) - 1:
            return self.values[left] if left >= 0 else None
        share = (place - places[left]) / (places[left + 1] - places[left])
        # A logged value is returned unchanged: infinity times zero would be NaN.
        return self.values[left] + share * (self.values[left + 1] - self.values[left]) if share else self.values[left]


def read_curve(run: Path, metric: str) -> Curve:
    """Read one metric of the run directory `run`; the curve is empty if it was never logged.

    Raises:
        UserError: the log is damaged.
    """
    try:
        return _read_curve(run, metric)
    except RunLogError as error:
        raise UserError(f"{run.name}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.name}: its log is damaged: {type(error).__name__}: {error}") from None


def _read_curve(run: Path, metric: str) -> Curve:
    curve = Curve()
    elapsed, previous = 0.0, None
    from utils.runs.index import read_run  # imports pydantic: a third of a second, which --help does not need

    sessions = resume_times(read_run(run).record)
    for record in read_records(run / METRICS_LOG):
        now = record["time"]
        if previous is not None and not any(previous < start <= now for start in sessions):
            elapsed += max(0.0, now - previous)
        previous = now
        if metric in record:
            curve.step.append(record["step"])
            curve.tokens.append(record.get("tokens", 0))
            curve.time.append(elapsed)
            curve.values.append(decode_number(record[metric]))
    return curve


def logged_metrics(run: Path) -> set[str]:
    """The names of all metrics in the log of the run directory `run`."""
    return {name for record in read_records(run / METRICS_LOG) for name in record} - NOT_METRICS
