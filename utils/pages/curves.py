"""The curves of a chart: smoothed, thinned and grouped. Later requests get only the points that were added."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError
from utils.experiments.bands import band
from utils.experiments.curve import Axis, Curve
from utils.experiments.plot import smoothed, y_label
from utils.experiments.thinning import kept_points
from utils.pages.keys import key_of
from utils.pages.series import RESERVED, Series, SeriesStore
from utils.runs.index import IndexedRun, resolved_setting
from utils.terminal.words import one_line, printable, setting_text

MOST_POINTS = 4000  # of one curve; a screen has fewer columns
DIGITS = 6  # significant digits of a number; a screen shows fewer
LONGEST_COUNT = 18  # digits of the number of points in a cursor


@dataclass(frozen=True)
class ChartRequest:
    """What a chart shows.

    smooth: weight of the past in an exponential moving average, from 0 (as logged) to below 1.
    group: a setting, or a column of the table: runs of equal value are drawn as their mean and a band of one standard
        deviation around it.
    points: number of points in each curve.
    start, end: the part of the axis that is shown; None: all.
    known: run or group -> the cursor of the curve that the page already has.
    """

    metric: str
    axis: Axis = "step"
    smooth: float = 0.0
    group: str | None = None
    log_axis: bool = False
    points: int = 1000
    start: float | None = None
    end: float | None = None
    known: dict[str, str] = field(default_factory=dict)


def chart(runs: Sequence[IndexedRun], store: SeriesStore, request: ChartRequest) -> dict[str, Any]:
    """The curves of the chart, or the points that they have gained since the cursors of the request.

    Raises:
        UserError: the name cannot be that of a metric, or `smooth` is out of bounds.
    """
    if not 0 <= request.smooth < 1:
        raise UserError(f"smoothing by {request.smooth:g}: expected a weight from 0 to below 1")
    name = request.metric
    if not name or name.lower() in RESERVED or (name.lower() == "tokens" and name != "tokens"):
        raise UserError(f"{one_line(name)!r} is not a metric")
    series = store.read(runs, name)
    answer: dict[str, Any] = {"metric": name, "label": one_line(y_label(name))}
    if request.group:
        answer["groups"] = _groups(runs, series, request)
    else:
        curves = (_curve(run, of_run, request) for run, of_run in zip(runs, series, strict=True))
        answer["curves"] = [curve for curve in curves if curve]
    return answer


def _curve(run: IndexedRun, series: Series, request: ChartRequest) -> dict[str, Any] | None:
    """One curve, or only its new points if the page has a cursor of it; None if there are no new ones."""
    key, count = key_of(run.id), len(series.values)
    cursor = f"{series.generation}.{count}"
    if request.known.get(key) == cursor:
        return None
    places, values = shown_points(series, request)
    facts: dict[str, Any] = {"run": key, "cursor": cursor, "not_finite": count - len(values)}
    generation, _, seen = request.known.get(key, "").partition(".")
    is_known = generation == str(series.generation) and seen.isdecimal() and len(seen) <= LONGEST_COUNT
    first = int(seen) if is_known else 0
    if first:
        facts["added"] = True
        added = sum(map(math.isfinite, series.values[first:]))
        places, values = places[len(places) - added :], values[len(values) - added :]
    elif series.problem:
        facts["problem"] = printable(series.problem)
    if request.start is not None or request.end is not None:
        low = -math.inf if request.start is None else request.start
        high = math.inf if request.end is None else request.end
        inside = [i for i, place in enumerate(places) if low <= place <= high]
        if inside:  # with a neighbour on each side, so that the lines reach the edges
            part = slice(max(0, inside[0] - 1), inside[-1] + 2)
            places, values = places[part], values[part]
        else:
            places, values = places[:0], values[:0]
    kept = kept_points(places, values, min(request.points, MOST_POINTS), request.log_axis)
    return {**facts, "x": rounded([places[i] for i in kept]), "y": rounded([values[i] for i in kept])}


def shown_points(series: Series, request: ChartRequest) -> tuple[Sequence[float], Sequence[float]]:
    """The finite points of a series, smoothed."""
    places: Sequence[float] = series.places(request.axis)
    values: Sequence[float] = series.values
    if not all(map(math.isfinite, values)):
        finite = [math.isfinite(value) for value in values]
        places, values = list(itertools.compress(places, finite)), list(itertools.compress(values, finite))
    return places, smoothed(values, request.smooth) if request.smooth else values


def _groups(runs: Sequence[IndexedRun], series: Sequence[Series], request: ChartRequest) -> list[dict[str, Any]]:
    """The groups of runs with their means and bands; a group of one run has its curve instead of a mean.

    A group is computed anew whenever one of its runs has gained points, because it has at most 400 points itself.
    """
    members: dict[str, list[tuple[IndexedRun, Series]]] = {}
    for run, of_run in zip(runs, series, strict=True):
        members.setdefault(group_value(run, request.group or ""), []).append((run, of_run))
    found = []
    for value, group in members.items():
        key = f"{request.group}={value}"
        cursor = "_".join(f"{of_run.generation}.{len(of_run.values)}" for _, of_run in group)
        if request.known.get(key) == cursor:
            continue
        curves = []
        not_finite = 0
        for _, of_run in group:
            places, values = shown_points(of_run, request)
            not_finite += len(of_run.values) - len(values)
            if values:
                curves.append(Curve(**{"values": list(values), request.axis: list(places)}))
        facts = {
            "name": printable(key),
            "key": key,
            "runs": [key_of(run.id) for run, _ in group],
            "cursor": cursor,
            "not_finite": not_finite,
        }
        if len(curves) > 1:
            of_group = band(curves, request.axis)
            columns = {"x": of_group.places, "y": of_group.mean, "low": of_group.low, "high": of_group.high}
            if not of_group.places:
                facts["problem"] = f"its {len(curves)} runs share no part of the axis, so they have no mean"
        elif curves:
            places, values = curves[0].places(request.axis), curves[0].values
            kept = kept_points(places, values, min(request.points, MOST_POINTS), request.log_axis)
            columns = {"x": [places[i] for i in kept], "y": [values[i] for i in kept]}
        else:
            columns = {"x": [], "y": []}
        found.append({**facts, **{name: rounded(column) for name, column in columns.items()}})
    return found


def group_value(run: IndexedRun, column: str) -> str:
    """The value of `column` for a run, in words."""
    if column in ("tag", "status"):
        return str((run.record.get("tag") if column == "tag" else run.status) or "none")
    return setting_text(resolved_setting(run, column))


def rounded(values: Sequence[float]) -> list[float] | list[int]:
    """Shorten finite numbers for JSON: to integers if all are whole, otherwise to DIGITS digits of the smallest."""
    if all(map(float.is_integer, values)):
        return list(map(int, values))
    smallest = min(filter(None, map(abs, values)))
    decimals = DIGITS - 1 - math.floor(math.log10(smallest))
    return list(map(round, values, itertools.repeat(decimals))) if decimals < 15 else list(values)
