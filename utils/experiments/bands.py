"""The curves of a group of seeds summarised as their mean and a band of one standard deviation around it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from utils.experiments.curve import Axis, Curve

POINTS = 400  # about so many places of a band


@dataclass(frozen=True)
class Band:
    """The mean over the runs of a group at each of `places`, and the mean minus and plus the standard deviation."""

    places: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(curves: Sequence[Curve], axis: Axis) -> Band:
    """The band of these curves on an axis, at those places of the first curve that lie within all of them."""
    found = Band([], [], [], [])
    if len(curves) < 2 or not all(curve.values for curve in curves):
        return found
    start = max(curve.places(axis)[0] for curve in curves)
    end = min(curve.places(axis)[-1] for curve in curves)
    places = [place for place in dict.fromkeys(curves[0].places(axis)) if start <= place <= end]
    for place in dict.fromkeys([*places[:: 1 + len(places) // POINTS], *places[-1:]]):
        values = [value for curve in curves if (value := curve.at(axis, place)) is not None and math.isfinite(value)]
        if len(values) == len(curves):
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            for numbers, number in (
                (found.places, place),
                (found.mean, mean),
                (found.low, mean - deviation),
                (found.high, mean + deviation),
            ):
                numbers.append(number)
    return found
