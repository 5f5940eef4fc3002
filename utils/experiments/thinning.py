"""Thinning the points of a curve: the smallest and the largest value of each stretch of the axis are kept."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence


def kept_points(places: Sequence[float], values: Sequence[float], points: int, log_axis: bool = False) -> Sequence[int]:
    """Choose at most about `points` points, by index: the first, the last, and the extremes of each stretch.

    Args:
        places: places on the axis, never decreasing.
        values: finite values.
        log_axis: make the stretches equally long on a logarithmic axis.
    """
    if len(values) <= points:
        return range(len(values))
    kept = [0]
    edges = _edges(places, max(1, points // 2), log_axis)
    for start, end in itertools.pairwise(edges):
        if start < end:
            part = values[start:end]
            ends = (start + part.index(min(part)), start + part.index(max(part)))
            kept += sorted({*ends} - {kept[-1]})
    return kept if kept[-1] == len(values) - 1 else [*kept, len(values) - 1]


def _edges(places: Sequence[float], stretches: int, log_axis: bool) -> list[int]:
    """The indices at which the stretches begin, and the end of the last one."""
    low, high = places[0], places[-1]
    if log_axis:
        low = next((place for place in places if place > 0), 0.0)
    if not low < high:  # all at one place: stretches with equal numbers of points
        return [len(places) * i // stretches for i in range(stretches + 1)]
    if log_axis:
        ratio = math.log(high / low) / stretches
        inner = (low * math.exp(ratio * i) for i in range(1, stretches))
    else:
        inner = (low + (high - low) * i / stretches for i in range(1, stretches))
    return [0, *(bisect.bisect_left(places, place) for place in inner), len(places)]
