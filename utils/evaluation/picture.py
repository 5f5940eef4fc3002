"""The picture of the task arithmetic: confusion matrix of characters, and accuracy by operator and digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.evaluation.arithmetic import END, Answer, confusion
from utils.terminal.pictures import new_figure, picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def arithmetic_picture(name: str, answers: Sequence[Answer], record: Mapping[str, Any], kind: str = "png") -> bytes:
    """Draw the picture of a run's answers; returns the content of a PNG or SVG file.

    Args:
        record: the result of `task_record`.
    """
    with new_figure(11, 5, dpi=110) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_confusion(left, answers)
        _draw_accuracy(right, record["by_operator_and_digits"])
        figure.suptitle(f"{name}: {record['accuracy']:.2%} of {record['problems']:,} held-out problems", fontsize=11)
        return picture_of(figure, kind)


def _draw_confusion(axes: Axes, answers: Sequence[Answer]) -> None:
    """Draw the confusion matrix; colours show which fraction of each right character was given as each character."""
    counts = confusion(answers)
    order = [*(c for c in "0123456789-" if any(c in pair for pair in counts)), END]
    table = np.array([[counts[expected, given] for given in order] for expected in order], dtype=float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(table > 0):
        value, dark = int(table[row, column]), shares[row, column] > 0.5
        color = "white" if dark else "black" if row == column else "firebrick"
        axes.text(column, row, f"{value:,}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(order)), order)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="given", ylabel="right", title="characters of the answers")


def _draw_accuracy(axes: Axes, by: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Draw the fraction of right answers for each operator and each number of digits of the longest operand."""
    digits = sorted({int(number) for cells in by.values() for number in cells})
    shares = np.full((len(by), len(digits)), np.nan)
    for row, cells in enumerate(by.values()):
        for column, number in enumerate(digits):
            right, count = cells.get(str(number), (0, 0))
            if count:
                shares[row, column] = right / count
                color = "white" if shares[row, column] > 0.5 else "black"
                words = f"{right / count:.1%}\n{right:,} of {count:,}"
                axes.text(column, row, words, ha="center", va="center", fontsize=8, color=color)
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(digits)), [str(number) for number in digits])
    axes.set_yticks(range(len(by)), list(by))
    axes.set(xlabel="digits of the longest operand", title="right answers")
