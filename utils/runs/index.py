"""The index of a folder of runs: one row per run, with the reason if an entry cannot be read."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from utils.errors import UserError
from utils.files import open_regular, read_json
from utils.runs.duration import duration_of, seconds_of
from utils.runs.evaluations import evaluations_text, read_evaluations
from utils.runs.index_cache import IndexCache
from utils.runs.layout import CONFIG, GATE, METRICS_LOG, MODELS, NOTES, RECORD, SEAL
from utils.runs.lock import is_held
from utils.runs.log import last_record, read_lines
from utils.runs.metrics import decode_number
from utils.runs.run import NO_NOTES, RunError, read_record, status_of

STARTING = "starting"  # state of a tracker in run.json before it is open
DAMAGED = "damaged"  # the status of an entry that cannot be read as a run
NOT_RUNS = (MODELS.name, GATE.name)  # other files in the folder of runs
FACTS = {  # column -> SQL type; the settings are further columns
    "id": "VARCHAR",
    "tag": "VARCHAR",
    "status": "VARCHAR",
    "problem": "VARCHAR",
    "start": "TIMESTAMP",
    "age": "DOUBLE",
    "duration": "DOUBLE",
    "steps": "BIGINT",
    "val_loss": "DOUBLE",
    "bits_per_byte": "DOUBLE",
    "best_step": "BIGINT",
    "last_val_loss": "DOUBLE",
    "train_loss": "DOUBLE",
    "evaluated": "VARCHAR",
    "parameters": "BIGINT",
    "commit": "VARCHAR",
    "dirty": "BOOLEAN",
    "branch": "VARCHAR",
    "host": "VARCHAR",
    "parent": "VARCHAR",
    "sweep": "VARCHAR",
    "trial": "BIGINT",
    "tags": "VARCHAR[]",
    "note": "VARCHAR",
    "pinned": "BOOLEAN",
    "config_hash": "VARCHAR",
    "corpus_hash": "VARCHAR",
    "torch": "VARCHAR",
    "processor": "VARCHAR",
    "path": "VARCHAR",
}
# The metrics of an evaluation during training.
LOSSES = ("val/loss", "train/eval_loss", "val/bits_per_byte", "train/eval_bits_per_byte", "val/accuracy")
CACHED = ("record", "settings", "notes", "evaluations")  # cached fields of a settled run; the others follow from them
LOG_END = 4096  # bytes at the end of a log in which its last line is looked for


class _Notes(BaseModel, strict=True):
    """The fields of notes.json, with their types."""

    tags: list[str] = []
    note: str = ""
    pinned: bool = False


@dataclass(frozen=True)
class IndexedRun:
    """One entry of the folder of runs.

    problem: why it cannot be read as a run, or which part of it is damaged; None if all is well.
    record: the content of run.json.
    settings: the settings in meta/full_config.json, by leaf name.
    notes: the content of notes.json.
    notes_are_lost: whether notes.json is damaged, so that it is unknown whether the run was pinned.
    evaluations: the results of evaluate.py, oldest first.
    """

    path: Path
    status: str = DAMAGED
    problem: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=lambda: NO_NOTES)
    notes_are_lost: bool = False
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def readable(self) -> bool:
        return self.status != DAMAGED

    def row(self, settings: Collection[str] | None = None) -> dict[str, Any]:
        """The row of the run by column: FACTS, then settings, with the values that none and "auto" resolved to.

        Args:
            settings: the settings to include, by default all.
        """
        record, resolved, git = self.record, self.record.get("resolved") or {}, self.record.get("git") or {}
        start = seconds_of(record.get("start"))
        summary = self.summary()
        facts = {
            "id": self.id,
            "tag": record.get("tag"),
            "status": self.status,
            "problem": self.problem,
            "start": record.get("start"),
            "age": None if start is None else max(0.0, round(time.time() - start, 1)),
            "duration": self.duration(),
            "val_loss": summary.get("best_val_loss"),
            "bits_per_byte": summary.get("best_bits_per_byte"),
            "last_val_loss": summary.get("val/loss"),
            "train_loss": summary.get("train/eval_loss"),
            "steps": summary.get("steps"),
            "evaluated": evaluations_text(self.evaluations) or None,
            "best_step": summary.get("best_step"),
            "commit": git.get("commit"),
            "dirty": git.get("dirty"),
            "branch": git.get("branch"),
            "host": record.get("host"),
            "parent": (record.get("parent") or {}).get("run"),
            "sweep": (record.get("sweep") or {}).get("name"),
            "trial": (record.get("sweep") or {}).get("number"),
            "tags": list(self.notes["tags"]),
            "note": self.notes["note"],
            "pinned": self.notes["pinned"],
            "config_hash": record.get("config_hash"),
            **{key: resolved.get(key) for key in ("parameters", "corpus_hash", "torch", "processor")},
            "path": os.fspath(self.path),
        }
        columns = {column: facts[column] for column in FACTS}
        wanted = self.settings if settings is None else [key for key in self.settings if key in settings]
        return {**columns, **{key: resolved_setting(self, key) for key in wanted if key not in columns}}

    def duration(self) -> float | None:
        """Seconds that all sessions took together; None if unknown."""
        ended, alive = seconds_of(self.record.get("end")) is not None, self.status == "running"
        if seconds_of(self.record.get("start")) is None or not (ended or alive or "seconds" in self.record):
            return None
        return round(duration_of(self.path, self.record, alive=alive), 1)

    def summary(self) -> dict[str, float]:
        """Losses, steps and best_step at the end of the run; from its log while it runs and after a crash."""
        recorded = {key: decode_number(value) for key, value in (self.record.get("summary") or {}).items()}
        if self.status not in ("running", "crashed"):
            steps = {"steps": self.record.get("last_step"), "best_step": self.record.get("best_step")}
            return {**recorded, **{name: step for name, step in steps.items() if step is not None}}
        try:  # the recorded summary is from the previous session
            return summary_of_log(self.path / METRICS_LOG)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a damaged log
            return recorded


def resolved_setting(run: IndexedRun, key: str) -> Any:
    """The value of a setting; if it is none or "auto", the value that it resolved to."""
    value = run.settings.get(key)
    resolved = run.record.get("resolved") or {}
    return resolved.get(key, value) if value in (None, "auto") else value


def summary_of_log(path: Path) -> dict[str, float]:
    """The last step and the losses in a log, in the form in which run.json records them when a run ends."""
    if not path.is_file():
        return {}
    summary: dict[str, float] = {}
    offset = 0
    while lines := read_lines(path, offset):
        offset += sum(map(len, lines))
        for line in lines:
            if b'"val/loss"' in line:
                add_losses(summary, json.loads(line))
    last = last_record(path)
    return {**summary, **({"steps": int(last["step"])} if last else {})}


def add_losses(summary: dict[str, float], record: Mapping[str, Any]) -> None:
    """Update the last and best losses of `summary` with the record of a later evaluation."""
    losses = {name: decode_number(record[name]) for name in LOSSES if name in record}
    summary |= losses
    if losses["val/loss"] < summary.setdefault("best_val_loss", math.inf):
        summary |= {"best_val_loss": losses["val/loss"], "best_step": int(record["step"])}
        if (bits := losses.get("val/bits_per_byte")) is not None:
            summary["best_bits_per_byte"] = bits


def read_run(path: Path) -> IndexedRun:
    """Read one entry of the folder of runs. Raises nothing: a damaged entry has a `problem`."""
    try:
        if not os.path.lexists(path):
            return IndexedRun(path, problem="it is gone: no such run directory")
        if not path.is_dir():
            return IndexedRun(path, problem="a file, where a run directory was expected")
        if not (path / RECORD).exists():
            empty = not any(path.iterdir())
            return IndexedRun(path, problem="an empty folder" if empty else f"no {RECORD}")
        record = read_record(path)
        status = status_of(path, record)
    except (RunError, OSError) as error:
        return IndexedRun(path, problem=str(error).replace(f"{path}{os.sep}", "").removeprefix(f"{path}: "))
    problems = []
    settings, notes, notes_are_lost = {}, NO_NOTES, False
    try:
        settings = read_settings(path)
    except FileNotFoundError:
        problems.append(f"no {CONFIG}: it ended before its first step")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{CONFIG} cannot be read: {error}")
    try:
        notes = read_notes(path)
    except (OSError, ValueError, RecursionError) as error:
        notes_are_lost = True
        reason = "a field has the wrong type" if isinstance(error, ValidationError) else error
        problems.append(f"notes.json cannot be read: {reason}")
    evaluations, problem = read_evaluations(path)
    problems += [problem] if problem else []
    if status != "running" and (problem := _log_problem(path / METRICS_LOG)):
        problems.append(problem)
    if is_unfinished(path, record, status):
        problems.append(f"it was killed while it closed: python experiments.py finish {path.name}")
    return IndexedRun(path, status, "; ".join(problems) or None, record, settings, notes, notes_are_lost, evaluations)


def is_unfinished(path: Path, record: Mapping[str, Any], status: str) -> bool:
    """Whether a run has ended, but its process was killed before it had fed the trackers and written the seal."""
    return _lacks_its_end(path, record, status) and not is_held(path, record)


def _lacks_its_end(path: Path, record: Mapping[str, Any], status: str) -> bool:
    """Whether a run has ended, but its process is still closing it or was killed while closing it."""
    views = record.get("views") or {}
    if status in ("running", "crashed") or not views:
        return False
    open_views = any(facts.get("state") in (STARTING, "on", "hangs") for facts in views.values())
    return open_views or not (path / SEAL).exists()


def is_settled(run: IndexedRun) -> bool:
    """Whether a run can only change by a change of its files: no process has it, and nothing is wrong with it."""
    ended = run.readable and run.record["status"] != "running"
    return ended and run.problem is None and not _lacks_its_end(run.path, run.record, run.status)


def _log_problem(path: Path) -> str | None:
    """What is wrong with the end of a log; None if nothing is. Only its last bytes are read."""
    try:
        with open_regular(path, path.parent.parent) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_END))
            *lines, torn = file.read().split(b"\n")
        if len(lines) == 1:  # perhaps only the end of a long line
            last_record(path)
        elif lines and not isinstance(orjson.loads(lines[-1]), dict):
            raise ValueError
    except FileNotFoundError:
        return f"no {path.parent.name}/{path.name}"
    except OSError as error:
        return f"{path.parent.name}/{path.name} cannot be read: {error.strerror}"
    except ValueError:
        return f"{path.parent.name}/{path.name} is damaged: its last line is not a record"
    return f"the last line of {path.parent.name}/{path.name} is incomplete" if torn else None


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in meta/full_config.json of the run `path`, by leaf name, even those that no longer exist.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    sections = read_json(path / CONFIG, path)
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ValueError("not a configuration")
    return {key: value for section in sections.values() for key, value in section.items()}


def read_notes(path: Path) -> dict[str, Any]:
    """Read notes.json of the run `path`; if the file does not exist, the notes of a new run.

    Raises:
        OSError, ValueError: the file is damaged.
    """
    try:
        notes = read_json(path / NOTES, path)
    except FileNotFoundError:
        return dict(NO_NOTES)
    return {**_Notes.model_validate(notes).model_dump(), **{key: notes[key] for key in notes if key not in NO_NOTES}}


def read_index(runs_dir: Path) -> list[IndexedRun]:
    """Read every entry of the folder of runs; unreadable ones come first, then the runs from oldest to newest.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(runs_dir) if not name.startswith(".") and name not in NOT_RUNS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{runs_dir}: this folder of runs cannot be read: {error.strerror}") from None
    with _collection_paused():
        cache = IndexCache(runs_dir)
        runs = [_read_or_cached(runs_dir / name, cache) for name in names]
        cache.write()
    return sorted(runs, key=lambda run: (run.record.get("start") or "", run.id))


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the garbage collector: nothing read is garbage, and scanning it takes a third of the time (docs/LOG.md)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_or_cached(path: Path, cache: IndexCache) -> IndexedRun:
    facts, stamp = cache.look(path.name)
    if facts is not None:
        return IndexedRun(path, facts["record"]["status"], **facts)
    run = read_run(path)
    if is_settled(run):
        cache.keep(path.name, stamp, {name: getattr(run, name) for name in CACHED})
    return run
