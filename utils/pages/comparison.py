"""A comparison of several runs as JSON: the verdict of `compare` and the differences of `diff`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.experiments.compare import Comparison, compare
from utils.experiments.comparison_tables import group_cells, place_text, title_at, verdict_words
from utils.experiments.diff import Row, RunDiff, diff, result_name
from utils.experiments.plot import names_of
from utils.pages.keys import key_of
from utils.pages.run_page import UNREADABLE
from utils.runs.index import IndexedRun
from utils.terminal.words import column_text, loss_text, one_line, printable, setting_text

SHOWN = 2000  # characters of a value


def compare_runs(runs: Sequence[IndexedRun], metric: str | None, root: Path) -> dict[str, Any]:
    """Groups of seeds, verdicts and differences; `problems` says what could not be determined.

    Args:
        root: the project folder, whose git repository has the commits.
    """
    names = [one_line(name) for name in names_of(runs)]
    answer: dict[str, Any] = {
        "runs": [
            {"key": key_of(run.id), "id": one_line(run.id), "name": name} for run, name in zip(runs, names, strict=True)
        ],
        "problems": [printable(f"{run.id}: {run.problem}") for run in runs if run.problem],
    }
    sound = [run for run in runs if run.readable]
    for part, make in (
        ("comparison", lambda: _comparison(compare(sound, metric))),
        ("diff", lambda: _diff(diff(sound, root))),
    ):
        try:
            answer[part] = make() if len(sound) > 1 or part == "comparison" else None
        except UserError as error:
            answer["problems"].append(printable(str(error)))
        except UNREADABLE as error:
            answer["problems"].append(printable(f"{part}: a file is damaged: {type(error).__name__}: {error}"))
    return answer


def _comparison(found: Comparison) -> dict[str, Any]:
    verdicts = []
    for pair in found.verdicts:
        word, why = verdict_words(pair)
        facts = {"first": printable(pair.first), "second": printable(pair.second), "kind": pair.verdict}
        verdicts.append({**facts, "word": word, "why": why})
    return {
        "metric": printable(found.metric),
        "groups": [[printable(group.name), *group_cells(group)] for group in found.groups],
        "splits": [printable(line) for line in found.splits],
        "verdicts": verdicts,
        "at": [
            {
                "axis": axis,
                "title": printable(title_at(found, axis)),
                "rows": [[place_text(axis, place), *(loss_text(value) for value in values)] for place, values in rows],
            }
            for axis, rows in found.at.items()
        ],
        "left_out": [printable(line) for line in found.left_out],
        "note": found.note,
    }


def _diff(found: RunDiff) -> dict[str, Any]:
    curves = [
        (
            one_line(run),
            "identical" if logs.identical else "problem" if logs.problem else "differs",
            printable(str(logs)),
        )
        for run, logs in found.curves
    ]
    return {
        "sections": [{"title": title, "rows": [_row(row) for row in rows]} for title, rows in found.sections.items()],
        "results": [_row(row, result=True) for row in found.results],
        "commits": [printable(line) for line in found.commits],
        "patch": [printable(line) for line in found.patch],
        "curves": curves,
    }


def _row(row: Row, result: bool = False) -> dict[str, Any]:
    name = result_name(row.name) if result else row.name
    texts = [column_text(row.name, value) if result else setting_text(value) for value in row.values]
    values = ["–" if value is None else printable(text[:SHOWN]) for value, text in zip(row.values, texts, strict=True)]
    return {"name": one_line(name), "values": values, "sources": [one_line(source) for source in row.sources]}
