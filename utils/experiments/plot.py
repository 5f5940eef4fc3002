"""Curves of several runs in one plot: in the terminal, as PNG or as SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, nearest
from utils.experiments.curve import Axis, logged_metrics, read_curve
from utils.experiments.thinning import kept_points
from utils.files import write_output
from utils.runs.index import IndexedRun
from utils.runs.metrics import metric
from utils.terminal.pictures import new_figure, picture_of
from utils.terminal.words import HEX_COLORS, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PICTURES = (".png", ".svg")
TERMINAL_COLORS = (33, 208, 35, 197, 135, 37, 178, 245)  # of the 256; legible on black and on white
PLAIN_MARKERS = "*o+x#%@="  # without colours a curve is recognised by its character
POINTS_PER_COLUMN = 4  # a braille cell has two columns of dots, each of which shows a smallest and a largest value
TICKS = {"x": 8, "y": 4}  # least distance between two ticks, in columns and lines
TIME_UNITS = ((7200.0, 3600.0, "h"), (300.0, 60.0, "min"), (0.0, 1.0, "s"))  # (from so many seconds on, divisor, name)


@dataclass(frozen=True)
class PlottedCurve:
    """x: steps, tokens or seconds of training; y: the metric, finite everywhere."""

    name: str
    x: list[float]
    y: list[float]


def load_curves(runs: Sequence[IndexedRun], metric: str, axis: Axis, smooth: float) -> list[PlottedCurve]:
    """Read one metric of several runs; a run without a finite value is left out.

    Args:
        smooth: weight of the past in an exponential moving average, at least 0 (as logged) and below 1.

    Raises:
        UserError: no run has logged the metric, no value of it is finite, or a log is damaged.
    """
    loaded = [read_curve(run.path, metric) for run in runs]
    if not any(curve.values for curve in loaded):
        known = {name for run in runs for name in logged_metrics(run.path)}
        raise UserError(f"no run has logged {metric}{nearest(metric, sorted(known))}")
    curves = []
    for curve, name in zip(loaded, names_of(runs), strict=True):
        points = [(x, y) for x, y in zip(curve.places(axis), curve.values, strict=True) if math.isfinite(y)]
        if points:
            curves.append(PlottedCurve(name, [x for x, _ in points], smoothed([y for _, y in points], smooth)))
    if not curves:
        raise UserError(f"no value of {metric} is finite")
    return curves


def names_of(runs: Sequence[IndexedRun]) -> list[str]:
    """The name of each run in a legend: its tag, or its id if it has no tag or shares it with another of the runs."""
    tags = [str(run.record.get("tag") or run.id) for run in runs]
    count = Counter(tags)
    return [tag if count[tag] == 1 else run.id for run, tag in zip(runs, tags, strict=True)]


def smoothed(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving averages, corrected for the bias of the first values towards zero (as in TensorBoard)."""
    average, remaining, result = 0.0, 1.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        remaining *= weight
        result.append(average / (1 - remaining))
    return result


def y_label(name: str) -> str:
    """The name of a metric with its unit."""
    try:
        unit = metric(name).unit
    except KeyError:  # registered by a callback of the run
        return name
    return name if unit == "1" else f"{name} ({unit})"


def x_scale(axis: Axis, largest: float) -> tuple[float, str]:
    """The divisor of x, and the label of the axis with its unit, if the longest curve ends at `largest`."""
    if axis != "time":
        return 1.0, {"step": "step", "tokens": "tokens of training"}[axis]
    _, seconds, name = next(unit for unit in TIME_UNITS if largest >= unit[0])
    return seconds, f"time of training ({name})"


def terminal_plot(
    curves: Sequence[PlottedCurve], metric: str, axis: Axis, width: int, height: int, colour: bool = True
) -> str:
    """The curves as text: a legend, then the plot.

    Args:
        width, height: total size in columns and lines.
        colour: use ANSI colours; without them, each curve is drawn with a different character.
    """
    import plotext

    divisor, x_label = x_scale(axis, max(curve.x[-1] for curve in curves))
    head = [y_label(metric), *_legend([curve.name for curve in curves], width, colour)]
    figure = plotext.figure
    plotext.terminal.limit(False, False)  # the caller's size applies, not that of the terminal
    figure.clear()
    plotext.add_theme("curves", sequence=TERMINAL_COLORS)
    figure.theme("curves")
    figure.plot_size(width, height - len(head))
    for index, curve in enumerate(curves):
        kept = kept_points(range(len(curve.y)), curve.y, POINTS_PER_COLUMN * width)
        x, y = [curve.x[i] / divisor for i in kept], [curve.y[i] for i in kept]
        marker = "braille" if colour or len(curves) == 1 else PLAIN_MARKERS[index % len(PLAIN_MARKERS)]
        figure.draw(figure.signal(x, y, marker=marker).lines())
    x_ends = min(curve.x[0] for curve in curves) / divisor, max(curve.x[-1] for curve in curves) / divisor
    x_ticks = _ticks(*x_ends, width // TICKS["x"], least=0.0 if axis == "time" else 1.0)
    y_ends = min(min(curve.y) for curve in curves), max(max(curve.y) for curve in curves)
    y_ticks = _ticks(*y_ends, (height - len(head)) // TICKS["y"])
    for name, ends, ticks in (("x", x_ends, x_ticks), ("y", y_ends, y_ticks)):
        figure.ruler(name).ticks(ticks, _tick_labels(ticks))
        if ends[0] < ends[1]:
            figure.ruler(name).lim(*ends)
    figure.label(x_label, axis="x")
    lines = figure.build().string(colorless=not colour).rstrip("\n").split("\n")
    figure.clear()
    return "\n".join([*head, *(line.rstrip() for line in lines)])


def plot_screen(curves: Sequence[PlottedCurve], metric: str, axis: Axis, console: Console) -> Iterator[RenderableType]:
    """The curves, about as large as the terminal."""
    from rich.text import Text

    from utils.terminal.console import is_coloured

    width, height = min(console.width, 140), max(12, min(console.height - 2, 36))
    yield Text.from_ansi(terminal_plot(curves, metric, axis, width, height, colour=is_coloured(console)))


def _legend(names: Sequence[str], width: int, colour: bool) -> list[str]:
    """The lines of the legend: a marker and the name of each curve."""
    lines, used = [""], 0
    for index, name in enumerate(names):
        name = one_line(name)
        name = name if len(name) <= width - 3 else name[: width - 4] + "…"
        if used and used + len(name) + 5 > width:
            lines, used = [*lines, ""], 0
        mark = PLAIN_MARKERS[index % len(PLAIN_MARKERS)] * 2 if len(names) > 1 else "⠒⠒"
        if colour:
            mark = f"\x1b[38;5;{TERMINAL_COLORS[index % len(TERMINAL_COLORS)]}m━━\x1b[0m"
        lines[-1] += f"{'   ' if used else ''}{mark} {name}"
        used += len(name) + (6 if used else 3)
    return lines


def _ticks(low: float, high: float, room: int, least: float = 0.0) -> list[float]:
    """Round numbers from `low` to `high`: at most about `room` of them, at least `least` apart."""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    least = max(least, (high - low) / max(2, room))
    power = 10.0 ** math.floor(math.log10(least))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, all with the same number of decimals; thousands, millions and billions end in k, M and G."""
    largest = max(map(abs, ticks))
    if 0 < largest < 1e-3 or largest >= 1e12:
        return [f"{tick:.1e}" if tick else "0" for tick in ticks]
    divisor, suffix = next(((d, s) for d, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= d), (1.0, ""))
    divisor = 1e3 if suffix == "k" else divisor
    gap = (ticks[1] - ticks[0] if len(ticks) > 1 else largest) / divisor
    decimals = max(0, min(6, math.ceil(-math.log10(gap) - 1e-9))) if gap else 0
    return [f"{tick / divisor:,.{decimals}f}{suffix if tick else ''}" for tick in ticks]


def save_plot(curves: Sequence[PlottedCurve], metric: str, axis: Axis, out: Path) -> None:
    """Draw the curves to the file `out`, PNG or SVG.

    Raises:
        UserError: the name ends neither in .png nor in .svg.
        OSError: the file cannot be written.
    """
    if out.suffix.lower() not in PICTURES:
        raise UserError(f"{out}: expected a file that ends in {' or '.join(PICTURES)}")
    divisor, x_label = x_scale(axis, max(curve.x[-1] for curve in curves))
    with new_figure(8, 4.5, dpi=150) as figure:
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            dots = "o" if len(curve.x) < 50 else ""
            color = HEX_COLORS[index % len(HEX_COLORS)]
            axes.plot([x / divisor for x in curve.x], curve.y, dots + "-", color=color, markersize=3, linewidth=1.4)
        axes.set(xlabel=x_label)
        axes.set_ylabel(y_label(metric), parse_math=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(axes.lines, [str(index) for index in range(len(curves))])
        for text, curve in zip(legend.get_texts(), curves, strict=True):
            text.set(text=curve.name, parse_math=False)  # a label that begins with _ would be hidden
        write_output(out, picture_of(figure, out.suffix.lower()[1:]))
