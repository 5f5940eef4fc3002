"""evaluate.py --compare: quality and speed of several runs in one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text

from utils.evaluation.harness_tasks import is_higher_better, recorded_error
from utils.evaluation.report import comparison_notes
from utils.evaluation.weights import Trained
from utils.inference.quantization import weight_bytes
from utils.terminal.tables import plain_table
from utils.terminal.words import one_line, size

ROUNDS = 3  # rounds in which the models take turns, because the speed of a machine varies over time


class Speed(NamedTuple):
    """The size and speed of a model. Both speeds are for one sequence, in tokens per second.

    prefill: for a prompt that fills the context.
    decode: for new tokens after a prompt of half the context.
    """

    parameters: int
    weight_bytes: int
    prefill: float
    decode: float


def measure_speeds(models: Sequence[Trained], measure: Callable[[Any], tuple[float, float]]) -> list[Speed]:
    """Measure each model. A speed is the median of several rounds in which the models take turns.

    Args:
        measure: returns the speeds of prefill and decode of a LanguageModel, in tokens per second.
    """
    found = [[measure(trained.model) for trained in models] for _ in range(ROUNDS)]
    return [
        Speed(
            trained.model.num_parameters(),
            weight_bytes(trained.model),
            *(statistics.median(times) for times in zip(*of_model, strict=True)),
        )
        for trained, of_model in zip(models, zip(*found, strict=True), strict=True)
    ]


class _Row(NamedTuple):
    """A row of the table: one quantity for all runs. higher: whether higher is better; None if neither is."""

    label: str
    values: Sequence[float | None]
    text: Callable[[float], str]
    higher: bool | None


def comparison_table(
    names: Sequence[str], records: Sequence[Sequence[Mapping[str, Any]]], speeds: Sequence[Speed]
) -> Iterator[RenderableType]:
    """A column for each run and a row for each quantity, the best value in bold.

    Args:
        records: the evaluations of each run, with the same texts or tasks in the same order.
    """
    table = plain_table([""])
    for name in names:
        table.add_column(Text(one_line(name), style="cyan"), justify="right", overflow="fold")
    notes: dict[str, None] = {}
    for of_data in zip(*records, strict=True):
        notes.update(dict.fromkeys(comparison_notes(of_data)))
        for row in _quality(of_data):
            table.add_row(row.label, *_cells(row))
    table.add_section()
    for row in _speed(speeds):
        table.add_row(row.label, *_cells(row))
    yield table
    yield Text(f"speeds: one sequence, the median of {ROUNDS} rounds in which the runs take turns", style="dim")
    yield from (Text(note, style="yellow") for note in notes)


def _quality(records: Sequence[Mapping[str, Any]]) -> Iterator[_Row]:
    """The rows of one text, task or group of tasks."""
    data = one_line(" | ".join(dict.fromkeys(str(record["data"]) for record in records)))
    if "metrics" in records[0]:
        for metric in records[0]["metrics"]:
            values = [record["metrics"].get(metric) for record in records]
            error = max(recorded_error(metric, record) for record in records)
            of = f" (± {error:.4f})" if error else ""
            yield _Row(f"{data}: {metric}{of}", values, "{:.4f}".format, is_higher_better(metric, records[0]))
    elif "accuracy" in records[0]:
        yield _Row(f"{data}: right answers", [record["accuracy"] for record in records], "{:.2%}".format, True)
    else:
        yield _Row(f"{data}: bits/byte", [record["bits_per_byte"] for record in records], "{:.4f}".format, False)
        yield _Row("perplexity", [record["perplexity"] for record in records], "{:.4f}".format, False)


def _speed(speeds: Sequence[Speed]) -> Iterator[_Row]:
    yield _Row("parameters", [speed.parameters for speed in speeds], "{:,.0f}".format, None)
    yield _Row("weights", [speed.weight_bytes for speed in speeds], size, False)
    yield _Row("prefill, tokens/s", [speed.prefill for speed in speeds], "{:,.0f}".format, True)
    yield _Row("decode, tokens/s", [speed.decode for speed in speeds], "{:,.0f}".format, True)


def _cells(row: _Row) -> Iterator[Text]:
    known = [value for value in row.values if value is not None]
    best = None if row.higher is None or len(set(known)) < 2 else (max if row.higher else min)(known)
    for value in row.values:
        text = "" if value is None else row.text(value)
        yield Text(text, style="bold green" if value is not None and value == best else "")
