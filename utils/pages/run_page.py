"""The data of the page of one run: what `show` prints, settings with sources, samples, histograms, metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from utils.config.fields import FIELDS, SECTION_OF
from utils.experiments.explain import settings_with_sources
from utils.experiments.tables import EVALUATIONS_SHOWN, number_cell, provenance_facts, result_facts
from utils.files import open_regular
from utils.pages.keys import key_of
from utils.runs.environment import read_environment
from utils.runs.evaluations import NUMBERS, newest_evaluations
from utils.runs.identity import non_default_settings
from utils.runs.index import DAMAGED, IndexedRun, resolved_setting
from utils.runs.layout import ENVIRONMENT, HISTOGRAMS_LOG, METRICS_LOG, SAMPLES_LOG
from utils.runs.metrics import NOT_METRICS
from utils.runs.names import names_of_run
from utils.terminal.words import one_line, printable, setting_text

# The errors of reading a file that this workbench may not have written.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
ENDS = 1 << 17  # bytes at each end of a log, which contain all of its metrics
TEXTS = 50  # newest samples that a page shows
TEXT_LENGTH = 20_000  # characters of one sample
TIMES = 60  # histograms of one tensor that a page shows
NEWEST_BYTES = 64 << 20  # at the end of a log of samples or histograms
LONGEST_FACT = 20_000  # characters


def describe(run: IndexedRun, others: Iterable[IndexedRun]) -> dict[str, Any]:
    """The facts on the page of a run, as JSON: everything except curves, samples, histograms and files."""
    problems = [run.problem] if run.problem else []
    if not run.readable:
        return {
            "id": one_line(run.id),
            "key": key_of(run.id),
            "status": DAMAGED,
            "problems": [printable(p) for p in problems],
        }

    def attempt(what: str, make: Any, otherwise: Any) -> Any:
        try:
            return make()
        except UNREADABLE as error:
            problems.append(f"{what} cannot be read: {type(error).__name__}: {error}")
            return otherwise

    names, problem = attempt("names of models", lambda: names_of_run(run.path), ([], None))
    problems += [problem] if problem else []
    children = [other for other in others if (other.record.get("parent") or {}).get("run") == run.id]
    parent = (run.record.get("parent") or {}).get("run")
    ids = [child.id for child in children]
    return {
        "id": one_line(run.id),
        "key": key_of(run.id),
        "status": run.status,
        "tag": run.record.get("tag"),
        "notes": {"tags": list(run.notes["tags"]), "note": run.notes["note"], "pinned": run.notes["pinned"]},
        "results": attempt("its results", lambda: _texts(result_facts(run)), []),
        "provenance": attempt("its provenance", lambda: _texts(provenance_facts(run, ids, names)), []),
        "relatives": [{"key": key_of(name), "id": one_line(name)} for name in [*([parent] if parent else []), *ids]],
        "evaluations": attempt("its evaluations", lambda: _evaluations(run), {"columns": [], "rows": []}),
        "settings": attempt("its settings", lambda: _settings(run), []),
        "environment": printable(attempt(str(ENVIRONMENT), lambda: read_environment(run.path), "")),
        "metrics": attempt("its log", lambda: logged_names(run), []),
        "problems": [printable(problem) for problem in problems],
    }


def _texts(facts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, printable(text[:LONGEST_FACT])) for name, text in facts if text]


def _evaluations(run: IndexedRun) -> dict[str, Any]:
    found = newest_evaluations(run.evaluations)[:EVALUATIONS_SHOWN]
    numbers = [name for name in NUMBERS if any(evaluation.get(name) is not None for evaluation in found)]
    rows = [
        [
            one_line(str(evaluation["data"])),
            one_line(str(evaluation.get("weights") or "")),
            one_line(str(evaluation.get("step", ""))),
            *(number_cell(name, evaluation.get(name)) for name in numbers),
            one_line(evaluation["time"][:10]),
        ]
        for evaluation in found
    ]
    columns = ["data", "weights", "step", *(name.replace("bits_per_byte", "bits/byte") for name in numbers), "date"]
    return {"columns": columns, "rows": rows}


def _settings(run: IndexedRun) -> list[dict[str, Any]]:
    """Every setting with its value, the source of the value, and its meaning."""
    sources, own = settings_with_sources(run), non_default_settings(run)
    found = []
    for key, value in run.settings.items():
        resolved = resolved_setting(run, key)
        facts = {
            "key": one_line(str(key)),
            "section": SECTION_OF.get(key, "no longer a setting"),
            "value": printable(setting_text(value)[:LONGEST_FACT]),
            "source": one_line(sources.get(key, "")),
            "own": key in own,
        }
        if resolved != value:
            facts["resolved"] = printable(setting_text(resolved)[:LONGEST_FACT])
        if key in FIELDS:
            facts["meaning"] = FIELDS[key].description or ""
        found.append(facts)
    return found


def logged_names(run: IndexedRun) -> list[str]:
    """The metrics of a run, found at both ends of its log, sorted: val/loss and train/loss first."""
    names: set[str] = set()
    try:
        with open_regular(run.path / METRICS_LOG, run.path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(ENDS).split(b"\n")
            file.seek(max(len(b"\n".join(head)), size - ENDS))
            tail = file.read(ENDS).split(b"\n")
    except OSError:
        return []
    for line in (*head, *tail):
        try:
            names |= orjson.loads(line).keys()
        except (ValueError, AttributeError):  # an incomplete line
            continue
    first = {"val/loss": 0, "train/loss": 1}
    return sorted(names - NOT_METRICS, key=lambda name: (first.get(name, 2), name.startswith("system/"), name))


def samples(run: IndexedRun) -> list[dict[str, Any]]:
    """The newest sample texts of a run, newest first."""
    found = []
    for record in _newest(run.path, SAMPLES_LOG, NEWEST_BYTES)[-TEXTS:]:
        if isinstance(record.get("text"), str) and isinstance(record.get("step"), int):
            found.append({"step": record["step"], "text": printable(record["text"][:TEXT_LENGTH])})
    return found[::-1]


def histograms(run: IndexedRun, name: str | None) -> dict[str, Any]:
    """The names of the tensors that have histograms, and the histograms of one of them over time.

    Args:
        name: the tensor; None: the first one.
    """
    names: dict[str, None] = {}
    steps = []
    for record in _newest(run.path, HISTOGRAMS_LOG, NEWEST_BYTES):
        tensor = record.get("name")
        if isinstance(tensor, str):
            names.setdefault(tensor)
            if tensor == (next(iter(names)) if name is None else name) and (facts := _histogram(record)):
                steps.append(facts)
    chosen = next(iter(names), None) if name is None else name
    stride = max(1, -(-len(steps) // TIMES))
    return {"names": list(names), "name": chosen, "steps": steps[::-1][::stride][::-1]}


def _histogram(record: Mapping[str, Any]) -> dict[str, Any] | None:
    counts, step = record.get("counts"), record.get("step")
    low, high = record.get("min"), record.get("max")
    is_sound = isinstance(counts, list) and all(isinstance(count, int) for count in counts)
    if not (is_sound and isinstance(step, int) and isinstance(low, int | float) and isinstance(high, int | float)):
        return None
    lost = record.get("nonfinite")
    return {"step": step, "min": low, "max": high, "counts": counts, "nonfinite": lost if isinstance(lost, int) else 0}


def _newest(run: Path, log: Path, limit: int) -> list[dict[str, Any]]:
    """The records in the last `limit` bytes of a log; lines that are not records are left out."""
    path = run / log
    try:
        with open_regular(path, run) as file:
            start = max(0, os.fstat(file.fileno()).st_size - limit)
            file.seek(start)
            lines: Sequence[bytes] = file.read(limit).split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines[int(start > 0) :]:
        try:
            record = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
