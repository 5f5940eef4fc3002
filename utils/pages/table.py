"""The table of all runs, kept in memory; a page that already has it gets only the rows that have changed since."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any

import orjson

from utils.config.fields import FIELDS, field_fact
from utils.config.section import MACHINE, OBSERVATION, TRAJECTORY
from utils.experiments.tables import LIST_COLUMNS
from utils.pages.keys import key_of
from utils.runs.duration import seconds_of
from utils.runs.identity import differing_settings
from utils.runs.index import FACTS, NOT_RUNS, IndexedRun, add_losses, read_index, read_run
from utils.runs.layout import CONFIG, EVALUATIONS, METRICS_LOG, NOTES, RECORD
from utils.runs.log import read_lines
from utils.runs.run import status_of
from utils.terminal.words import HASH_LENGTH, one_line, printable

WATCHED = (RECORD, NOTES, CONFIG, METRICS_LOG, EVALUATIONS)  # a run is read again when one of these files has changed
NOT_SHOWN = ("id", "status", "problem", "start", "age", "path")  # facts that come first in a row, or not at all
NAMED_TWICE = ("run_tag", "run_note")  # settings that the columns tag and note show
HASHES = ("commit", "config_hash", "corpus_hash")
NOTE_LENGTH = 300  # characters of a note in the table; the page of the run has the whole
FRESH_SECONDS = 0.5  # how long the table is used before the folder is looked at again

Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass
class _Entry:
    """A run as it was last read.

    summary: the summary of a running run, from its log up to `offset`.
    values: the row of the run, without its key.
    version: the version of the table in which the row last changed.
    """

    run: IndexedRun
    signature: Signature
    summary: dict[str, float]
    offset: int = 0
    values: tuple[Any, ...] = ()
    version: int = 0


class RunRows:
    """All runs of a folder.

    Args:
        runs_dir: holds the run directories.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._entries: dict[str, _Entry] = {}
        self._columns: list[str] = []
        self._default: list[str] = []
        self._columns_version = 0
        self._removed: list[tuple[int, str]] = []
        self._version = 0
        self._begun = secrets.token_hex(4)
        self._read_at = -math.inf
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------- for the pages

    def runs(self) -> list[IndexedRun]:
        """All runs: first those that cannot be read, then the others, oldest first."""
        with self._lock:
            self._refresh()
            return sorted(
                (entry.run for entry in self._entries.values()), key=lambda run: (run.record.get("start") or "", run.id)
            )

    def run(self, key: str) -> IndexedRun | None:
        """The run that a request names; None if there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or time.monotonic() - self._read_at > FRESH_SECONDS:
                self._refresh()
                entry = self._entries.get(key)
            return None if entry is None else entry.run

    def changes(self, since: str | None) -> dict[str, Any]:
        """The rows that have changed since the answer with the version `since`; None: all rows.

        rows: [key, id, status, problem, start in seconds since the epoch, *values of columns].
        """
        with self._lock:
            self._refresh()
            begun, _, number = (since or "").partition("-")
            is_delta = begun == self._begun and number.isdecimal() and int(number) <= self._version
            known = int(number) if is_delta else -1
            answer: dict[str, Any] = {"version": f"{self._begun}-{self._version}", "all": not is_delta}
            if not is_delta or known < self._columns_version:
                answer |= {"all": True, "columns": self._columns, "default": self._default, "now": time.time()}
                answer["folder"] = printable(os.fspath(self.runs_dir))
                known = -1
            rows = ((key, entry) for key, entry in self._entries.items() if entry.version > known)
            answer["rows"] = [[key, *entry.values] for key, entry in rows]
            if not answer["all"]:
                answer["removed"] = [key for version, key in self._removed if version > known]
            return answer

    # ------------------------------------------------------------------------------------------------------- updates

    def forget(self, key: str) -> None:
        """Read the run again at the next request, because we changed it, perhaps within one tick of the clock."""
        with self._lock:
            if key in self._entries:
                self._entries[key].signature = ()
            self._read_at = -math.inf

    def _refresh(self) -> None:
        if time.monotonic() - self._read_at < FRESH_SECONDS:
            return
        changed = self._read_all() if not self._entries else self._read_changed()
        if changed:
            self._version += 1
            self._removed += [(self._version, key) for key in changed if key not in self._entries]
            has_new_columns = any(starmap(self._shape_changes, changed.items())) and self._choose_columns()
            for key in self._entries if has_new_columns else changed.keys() & self._entries.keys():
                self._renew(self._entries[key])
        self._read_at = time.monotonic()

    def _read_all(self) -> dict[str, IndexedRun | None]:
        """Fill an empty table from the index, which may have a cache of its own."""
        signatures = {key_of(name): _signature(self.runs_dir / name) for name in self._names()}
        for run in read_index(self.runs_dir):
            self._entries[key_of(run.id)] = _Entry(run, signatures.get(key_of(run.id), ()), {})
        return dict.fromkeys(self._entries)

    def _read_changed(self) -> dict[str, IndexedRun | None]:
        """Read new and changed runs; returns the keys of new, changed and removed runs, each with the run before."""
        changed: dict[str, IndexedRun | None] = {}
        names = {key_of(name): name for name in self._names()}
        for key in [key for key in self._entries if key not in names]:
            changed[key] = self._entries.pop(key).run
        for key, name in names.items():
            path, entry = self.runs_dir / name, self._entries.get(key)
            signature = _signature(path)
            if entry is None:
                self._entries[key] = _Entry(read_run(path), signature, {})
                changed[key] = None
            elif entry.signature != signature or _status_has_changed(entry.run):
                changed[key] = entry.run
                entry.run, entry.signature = read_run(path), signature
        return changed

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.runs_dir) if not name.startswith(".") and name not in NOT_RUNS]
        except OSError:
            return []

    def _shape_changes(self, key: str, before: IndexedRun | None) -> bool:
        """Whether a change of this run may change the columns."""
        entry = self._entries.get(key)
        if entry is None or before is None:
            return True
        now = entry.run
        return (
            now.settings != before.settings
            or now.record.get("resolved") != before.record.get("resolved")
            or bool(now.evaluations) != bool(before.evaluations)
            or bool(now.notes["note"]) != bool(before.notes["note"])
        )

    def _choose_columns(self) -> bool:
        """Choose the columns; returns True if they have changed."""
        runs = [entry.run for entry in self._entries.values()]
        differing = [
            key
            for key in differing_settings(runs, (TRAJECTORY, OBSERVATION, MACHINE))
            if key not in FACTS and key not in NAMED_TWICE
        ]
        of_numbers = [key for key in differing if key not in FIELDS or field_fact(key, "kind") == TRAJECTORY]
        columns = [*(name for name in FACTS if name not in NOT_SHOWN), *differing]
        evaluated = ["evaluated"] if any(run.evaluations for run in runs) else []
        noted = ["note"] if any(run.notes["note"] for run in runs) else []
        tagged = ["tags"] if any(run.notes["tags"] for run in runs) else []
        facts = [name for name in LIST_COLUMNS if name not in NOT_SHOWN]
        default = ["status", "age", *facts, *evaluated, *of_numbers, *tagged, *noted]
        if (columns, default) == (self._columns, self._default):
            return False
        self._columns, self._default, self._columns_version = columns, default, self._version
        return True

    def _renew(self, entry: _Entry) -> None:
        row = _row(entry)
        start = seconds_of(row.get("start"))
        texts = (one_line(row["id"]), row["status"], printable(row["problem"] or "") or None)
        values = (*texts, start, *(_cell(column, row.get(column)) for column in self._columns))
        if values != entry.values:
            entry.values, entry.version = values, self._version


def _signature(path: Path) -> Signature:
    """Times, sizes and inodes of the files in WATCHED, to see whether one has changed."""
    found: list[tuple[int, int, int] | None] = []
    for name in WATCHED:
        try:
            facts = os.stat(f"{path}/{name}")
            found.append((facts.st_mtime_ns, facts.st_size, facts.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)


def _status_has_changed(run: IndexedRun) -> bool:
    """Whether a run has stopped or started to train without a change of its record, as after a crash."""
    return run.readable and run.record.get("status") == "running" and status_of(run.path, run.record) != run.status


def _row(entry: _Entry) -> dict[str, Any]:
    """The row of a run. Of the log of a running one, only the new part is read."""
    run = entry.run
    if run.status != "running":
        return run.row()
    _read_on(entry)
    steps = entry.summary.get("steps")
    record = {**run.record, "summary": entry.summary, "best_step": entry.summary.get("best_step")}
    record |= {} if steps is None else {"last_step": int(steps)}
    row = replace(run, status="completed", record=record).row()  # so that it does not read the log
    return {**row, "status": run.status, "duration": run.duration()}


def _read_on(entry: _Entry) -> None:
    """Extend the summary of a run to the end of its log; `summary_of_log` makes the same from the whole log."""
    log = entry.run.path / METRICS_LOG
    try:
        if log.stat().st_size < entry.offset:
            entry.summary, entry.offset = {}, 0
        while lines := read_lines(log, entry.offset):
            entry.offset += sum(map(len, lines))
            for line in lines:
                if b'"val/loss"' in line:
                    add_losses(entry.summary, orjson.loads(line))
            entry.summary["steps"] = orjson.loads(lines[-1])["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the log is gone, or that of another program
        return


def _cell(column: str, value: Any) -> Any:
    """A value as JSON that is safe to show: texts without control characters, no longer than a table needs."""
    if isinstance(value, str):
        if column in HASHES:
            return one_line(value[:HASH_LENGTH])
        return printable(value if len(value) <= NOTE_LENGTH else value[:NOTE_LENGTH] + "…")
    if isinstance(value, Sequence):
        return [printable(str(item)[:NOTE_LENGTH]) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int | None):
        return value if value is None or isinstance(value, bool) or abs(value) < 2**53 else str(value)
    return printable(str(value)[:NOTE_LENGTH])
