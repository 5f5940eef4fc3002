"""The plot of a run's losses, artifacts/curves.png."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.files import write_atomic
from utils.runs.layout import CURVES, METRICS_LOG
from utils.runs.log import read_lines
from utils.runs.metrics import decode_number
from utils.terminal.pictures import new_figure, picture_of

CURVE_NAMES = {"train/loss": "train/loss, each step", "train/eval_loss": "train/eval_loss", "val/loss": "val/loss"}
POINTS = 20_000  # most points of a curve
RECORD_BYTES = 170  # approximate length of a line of the log
COLORS = {"train/loss": "#b8c4d6", "train/eval_loss": "#3b6fb6", "val/loss": "#d1495b"}


def thinned_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all evaluations of a log and at most about POINTS training losses; more would not be visible."""
    stride = 1 + (path.stat().st_size // RECORD_BYTES if path.exists() else 0) // POINTS
    offset = steps = 0
    while lines := (read_lines(path, offset) if path.exists() else []):
        offset += sum(map(len, lines))
        for line in lines:
            of_step = b'"train/loss"' in line
            if b'"val/loss"' in line or (of_step and steps % stride == 0):
                yield json.loads(line)
            steps += of_step


def draw_curves(run: Path) -> bool:
    """Draw artifacts/curves.png of the run directory `run`.

    Returns:
        False if the run has not logged a loss yet, and nothing was drawn.

    Raises:
        OSError: the file cannot be written.
    """
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVE_NAMES}
    for record in thinned_records(run / METRICS_LOG):
        for name in record.keys() & curves.keys():
            curves[name].append((record["step"], decode_number(record[name])))
    if not any(curves.values()):
        return False
    with new_figure(8, 4.5, dpi=120) as figure:
        axes = figure.add_subplot()
        for name, points in curves.items():
            if points:
                steps, values = zip(*points, strict=True)
                dots = "o" if name != "train/loss" and len(points) < 50 else ""
                style: dict[str, Any] = {
                    "color": COLORS[name],
                    "label": CURVE_NAMES[name],
                    "markersize": 3,
                    "linewidth": 1.2,
                }
                axes.plot(steps, values, dots + "-", **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
        write_atomic(run / CURVES, picture_of(figure))
    return True
