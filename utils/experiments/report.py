"""A self-contained HTML page about runs: it needs no other file and no network."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.experiments.bands import band
from utils.experiments.compare import Comparison, compare, counted_runs
from utils.experiments.comparison_tables import group_cells, verdict_words
from utils.experiments.curve import AXES, Axis, Curve, read_curve
from utils.experiments.diff import RunDiff, diff
from utils.experiments.explain import settings_with_sources
from utils.experiments.plot import names_of, x_scale, y_label
from utils.experiments.thinning import kept_points
from utils.files import write_output
from utils.runs.environment import read_environment
from utils.runs.identity import non_default_settings
from utils.runs.index import IndexedRun
from utils.runs.layout import ENVIRONMENT, METRICS_LOG, RECORD, SAMPLES_LOG
from utils.runs.log import last_record
from utils.terminal.html import render
from utils.terminal.words import HEX_COLORS, column_text, duration, loss_text, setting_text, time_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
CHARTS = ("val/loss", "train/loss")  # metrics, one chart each
POINTS = 2000  # of a curve; more than a screen has columns
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # raised by damaged files
GIT_FACTS = ("commit", "branch", "remote")


def write_report(runs: Sequence[IndexedRun], out: Path, root: Path) -> None:
    """Write the page about `runs`; it names the parts of a run that cannot be read.

    Args:
        out: the .html file.
        root: the project folder, whose git repository has the commits.

    Raises:
        OSError: the file cannot be written.
    """
    problems: dict[Path, list[str]] = {run.path: [run.problem] if run.problem else [] for run in runs}

    def attempt(run: IndexedRun, what: str, make: Callable[[IndexedRun], Any], otherwise: Any) -> Any:
        """The result of `make`; on failure, list the reason with the problems of the run and return `otherwise`."""
        try:
            return make(run) if run.readable else otherwise
        except UNREADABLE as error:
            problems[run.path].append(f"{what} cannot be read: {type(error).__name__}: {error}")
            return otherwise

    curves = [attempt(run, str(METRICS_LOG), _curves, {}) for run in runs]
    sound = [run for run, of_run in zip(runs, curves, strict=True) if of_run]
    differences, difference_problem = _differences(sound, root)
    described = [
        {
            "id": run.id,
            "path": run.path,
            "name": name,
            "color": HEX_COLORS[index % len(HEX_COLORS)],
            "status": run.status,
            **attempt(run, "its results", _results, dict.fromkeys(_results(IndexedRun(run.path)))),
            "sample": attempt(run, str(SAMPLES_LOG), _last_sample, None),
            "origin": attempt(run, str(RECORD), _origin, []),
            "environment": attempt(run, str(ENVIRONMENT), lambda run: read_environment(run.path), ""),
            "settings": attempt(run, "its settings", _own_settings, None),
            "problems": problems[run.path],
        }
        for index, (run, name) in enumerate(zip(runs, names_of(runs), strict=True))
    ]
    comparison = _comparison(sound)
    data = _chart(described, curves)
    data["bands"] = _bands(comparison, runs, described, curves, data["axes"]) if comparison else []
    page = render(
        TEMPLATE,
        {"setting": _value_text},
        runs=described,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        chart=data,
        plotly=_plotly() if data["traces"] else "",
        groups=_group_rows(comparison) if comparison else [],
        metric=comparison.metric if comparison else "",
        note=comparison.note if comparison else None,
        verdicts=[(f"{pair.first} against {pair.second}", *verdict_words(pair)) for pair in comparison.verdicts]
        if comparison
        else [],
        splits=comparison.splits if comparison else [],
        left_out=comparison.left_out if comparison else [],
        differences=differences,
        different_names=[run["name"] for run, of_run in zip(described, curves, strict=True) if of_run],
        difference_problem=difference_problem,
        divergences=[(run, str(logs)) for run, logs in differences.curves] if differences else [],
    )
    write_output(out, page)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", r"<\/script").replace("<!--", r"<\!--")


def _curves(run: IndexedRun) -> dict[str, Curve]:
    return {name: read_curve(run.path, name) for name in CHARTS}


def _differences(runs: Sequence[IndexedRun], root: Path) -> tuple[RunDiff | None, str | None]:
    """What differs between the runs, or the reason why that is not known; (None, None) for fewer than two runs."""
    if len(runs) < 2:
        return None, None
    try:
        return diff(runs, root), None
    except UNREADABLE as error:
        return None, f"{type(error).__name__}: {error}"


def _results(run: IndexedRun) -> dict[str, Any]:
    """The texts of a run in the table of results."""
    row = run.row()
    return {
        "steps": column_text("steps", row["steps"]),
        "best": loss_text(row["val_loss"]),
        "best_step": column_text("best_step", row["best_step"]),
        "last": loss_text(row["last_val_loss"]),
        "duration": "" if row["duration"] is None else duration(row["duration"]),
        "commit": column_text("commit", row["commit"]),
        "dirty": bool(row["dirty"]),
        "tags": ", ".join(row["tags"]),
        "note": row["note"],
        "reason": run.record.get("exit_reason") or "",
    }


def _last_sample(run: IndexedRun) -> dict[str, Any] | None:
    record = last_record(run.path / SAMPLES_LOG)
    return None if record is None else {"step": f"{record['step']:,}", "text": record["text"]}


def _own_settings(run: IndexedRun) -> list[tuple[str, Any, str]] | None:
    """(key, value, source) of each setting that differs from its default; None if the settings are not known."""
    if not run.settings:
        return None
    sources = settings_with_sources(run)
    return [(key, value, sources.get(key, "")) for key, value in non_default_settings(run).items()]


def _origin(run: IndexedRun) -> list[tuple[str, str]]:
    """The origin of the run as rows of (name, text), from run.json."""
    record, git = run.record, run.record.get("git") or {}
    resolved, parent = record.get("resolved") or {}, record.get("parent")
    known = {
        "command": shlex.join(map(str, record.get("argv") or [])),
        "started": record.get("start") and time_text(record["start"]),
        "ended": record.get("end") and time_text(record["end"]),
        "host": record.get("host"),
        **{f"git {name}": git.get(name) for name in GIT_FACTS},
        "uncommitted changes": None if git.get("dirty") is None else "yes" if git["dirty"] else "no",
        "configuration": record.get("config_hash"),
        "corpus": resolved.get("corpus_hash"),
        "tokenizer": resolved.get("tokenizer_hash"),
        "parent": parent and ", ".join(f"{key} {_value_text(value)}" for key, value in parent.items()),
    }
    rows = [(name, _value_text(value)) for name, value in known.items() if value not in (None, "")]
    for session in record.get("resumes") or []:
        status = (session.get("before") or {}).get("status")
        rows.append(("resumed", f"at step {session['step']:,}, {time_text(session['time'])}; the run was {status}"))
    return rows


def _comparison(runs: Sequence[IndexedRun]) -> Comparison | None:
    """The comparison of the runs by groups of seeds; None unless a group has several runs."""
    try:
        found = compare(runs)
    except UserError:  # fewer than two have logged a loss
        return None
    return found if any(len(group.runs) > 1 for group in found.groups) else None


def _group_rows(comparison: Comparison) -> list[list[str]]:
    return [[group.name, *group_cells(group)] for group in comparison.groups]


def _bands(
    comparison: Comparison,
    runs: Sequence[IndexedRun],
    described: Sequence[dict[str, Any]],
    curves: Sequence[dict[str, Curve]],
    axes: Iterable[Axis],
) -> list[dict[str, Any]]:
    """The mean and the band of each group of several runs that count, for each chart and on each axis."""
    index = {run.path: number for number, run in enumerate(runs)}
    scales = {axis: x_scale(axis, _longest(curves, axis))[0] for axis in axes}
    taken = [described[index[group.paths[0]]]["color"] for group in comparison.groups if len(group.paths) == 1]
    found = []
    for group in comparison.groups:
        members = [index[path] for path in group.paths]
        colors = [described[number]["color"] for number in members]
        color = next((one for one in (*colors, *HEX_COLORS) if one not in taken), colors[0])
        taken.append(color)
        counted = [index[run.path] for run in counted_runs([runs[number] for number in members])]
        for row, name in enumerate(CHARTS):
            of_group = [curves[number][name] for number in counted]
            bands = {axis: band(of_group, axis) for axis in scales}
            if all(one.places for one in bands.values()):
                found.append(
                    {
                        "name": html.escape(f"{group.name}: mean of {len(counted)}", quote=False),
                        "color": color,
                        "row": row,
                        "members": members,
                        "axes": {
                            axis: {
                                "x": [_rounded(place / scales[axis]) for place in one.places],
                                **{key: [_rounded(v) for v in getattr(one, key)] for key in ("mean", "low", "high")},
                            }
                            for axis, one in bands.items()
                        },
                    }
                )
    return found


def _longest(curves: Sequence[dict[str, Curve]], axis: Axis) -> float:
    found = [curve for of_run in curves for curve in of_run.values() if curve.values]
    return max((curve.places(axis)[-1] for curve in found), default=0.0)


def _chart(runs: Sequence[dict[str, Any]], curves: Sequence[dict[str, Curve]]) -> dict[str, Any]:
    """The data that the script of the page draws: the axes, and one trace for each curve, with its x on every axis.

    The key "lost" has the number of values that are left out because they are not finite.
    """
    scales = {axis: x_scale(axis, _longest(curves, axis)) for axis in AXES}
    traces, lost = [], 0
    for index, (run, of_run) in enumerate(zip(runs, curves, strict=True)):
        for name, curve in of_run.items():
            finite = [i for i, value in enumerate(curve.values) if math.isfinite(value)]
            lost += len(curve.values) - len(finite)
            kept = [finite[i] for i in kept_points(range(len(finite)), [curve.values[i] for i in finite], POINTS)]
            if kept:
                traces.append(
                    {
                        "name": html.escape(run["name"], quote=False),  # plotly reads some tags
                        "color": run["color"],
                        "run": index,
                        "row": CHARTS.index(name),
                        "x": {
                            axis: [_rounded(curve.places(axis)[i] / divisor) for i in kept]
                            for axis, (divisor, _) in scales.items()
                        },
                        "y": [_rounded(curve.values[i]) for i in kept],
                    }
                )
    return {
        "axes": {axis: label for axis, (_, label) in scales.items()},
        "metrics": [y_label(name) for name in CHARTS],
        "traces": traces,
        "lost": lost,
    }


def _rounded(value: float) -> float:
    """`value` rounded to nine significant digits, more than a screen can show."""
    return float(f"{value:.9g}")


def _value_text(value: Any) -> str:
    """The text of a setting or a fact; a dash for None."""
    return "–" if value is None else setting_text(value)
