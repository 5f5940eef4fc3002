"""A run directory in use: its id, its creation, run.json, its status and its lock.

The training process holds a lock for as long as it lives (utils/runs/lock.py), so that a reader can tell `running` from
`crashed` without any help from a process that died. utils/runs/layout.py lists what a run directory contains.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from utils.config.tags import check_tag
from utils.errors import UserError
from utils.files import change_json, read_json, unwritable, write_json
from utils.folders import links_out, remove
from utils.runs.layout import ARTIFACTS, LOCK, LOGS, META, METRICS_LOG, NOTES, RECORD, WANDB, fed_note
from utils.runs.lock import (
    HEARTBEAT_SECONDS,
    STALE_HEARTBEAT_SECONDS,
    RunLock,
    heart_beats,
    heartbeat_of,
    holder_words,
    is_elsewhere,
    is_held,
    wait_until_silent,
)

SCHEMA_VERSION = 1
REPRODUCTION = "reproduction"  # relation of a run to the parent that it repeats
GLANCE_SECONDS = 0.2  # a process that looks whether the lock is free holds it for a moment
NO_NOTES = {"tags": [], "note": "", "pinned": False}  # notes.json of a new run
IN_TRACKERS = {"aim", "wandb"}  # views whose data is not in the run directory

Change = Callable[[dict[str, Any]], dict[str, Any]]  # of run.json
Status = Literal["running", "completed", "interrupted", "failed", "diverged"]


class RunError(UserError):
    """A run directory that does not exist, is not the only match, or cannot be used."""


class RunLockedError(RunError):
    """A run directory that another process is training in."""


def utc_now() -> str:
    """The time in UTC with milliseconds, as run.json records it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def run_ids(tag: str | None = None, now: datetime | None = None) -> Iterator[str]:
    """Ids to try: `YYYYMMDD_HHMMSS[_tag]` in local time, then the same with `_2`, `_3`, ... appended."""
    base = (now or datetime.now()).strftime("%Y%m%d_%H%M%S") + (f"_{tag}" if tag else "")
    yield base
    for attempt in itertools.count(2):
        yield f"{base}_{attempt}"


def create_run_directory(runs_dir: Path, tag: str | None = None, now: datetime | None = None) -> Path:
    """Create an empty directory that belongs to no other process: where another one was faster, under the next id.

    Raises:
        RunError: the tag is not valid, or `runs_dir` cannot be written.
        OSError: its disk is full or fails.
    """
    if tag is not None:
        try:
            check_tag(tag)
        except ValueError as error:
            raise RunError(str(error)) from None
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        for run_id in run_ids(tag, now):
            try:
                (runs_dir / run_id).mkdir()
            except FileExistsError:
                continue
            return runs_dir / run_id
    except OSError as error:
        mistake = RunError(f"cannot create a run directory in {runs_dir}: {error.strerror}")
        raise unwritable(runs_dir, error, mistake) from None
    raise AssertionError("run_ids never ends")


class Run:
    """A run directory whose lock this process holds. Safe to use from several threads.

    has_flock: False on a file system without it, where the lock file alone says who trains the run.

    Use: `run = Run.create(...)` or `Run.resume(...)`; then `run.update(...)` any number of times; at the end
    `run.finish(status, reason)` and `run.release()`, once each.
    """

    def __init__(
        self,
        path: Path,
        record: dict[str, Any],
        lock: RunLock,
        seconds_before: float = 0.0,
        silent_since: float | None = None,
    ) -> None:
        self.path = path
        self.seconds_before = seconds_before
        self._silent_since = silent_since  # the last sign of life of the previous process, until this one trains
        self.has_flock = lock.has_flock
        self._record = record
        self._lock = lock
        self._mutex = threading.Lock()
        self._unwritten: list[Change] = []  # what a full disk, say, has kept out of run.json
        self._ended = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()

    @classmethod
    def create(cls, runs_dir: Path, tag: str | None = None, **facts: Any) -> Run:
        """Create a run directory, hold its lock and write a run.json with the status `running`.

        Args:
            runs_dir: the folder of all runs.
            tag: part of the id.
            facts: further fields of run.json (argv, resolved, parent, ...).

        Raises:
            RunError: the directory cannot be created; nothing is left behind.
            OSError: likewise, as the disk is full or fails.
        """
        path = create_run_directory(runs_dir, tag)
        try:
            lock = RunLock(path)
            lock.sign()
            record = new_record(path, tag, **facts)
            for folder in (META, LOGS, ARTIFACTS):
                (path / folder).mkdir()
            write_json(path / NOTES, NO_NOTES)
            write_json(path / RECORD, record)
        except BaseException as error:
            remove(path)
            if isinstance(error, OSError):
                mistake = RunError(f"cannot write the run directory {path}: {error.strerror}")
                raise unwritable(path, error, mistake) from None
            raise
        return cls(path, record, lock)

    @classmethod
    def resume(cls, path: Path, report: Callable[[str], None] | None = None) -> Run:
        """Take over a run directory whose process has ended; run.json does not change yet.

        Args:
            report: gets one line before this call waits, up to a minute, for a process of another machine that may
                have died a moment ago; None: it does not wait.

        Raises:
            RunLockedError: the run is being trained; the message names process and host.
            RunError: `path` is not a run directory, cannot be written, or has a link that leads out of it.
            OSError: its disk is full or fails.
        """
        record, patience = read_record(path), 0.0
        seconds, last = duration_of(path, record, alive=False), heartbeat_of(path)  # before this process signs the lock
        if is_elsewhere(path, record) and heart_beats(path):
            if report is None or not wait_until_silent(path, lambda: read_record(path), report):
                raise _being_trained(path, record)
            patience = STALE_HEARTBEAT_SECONDS  # for the server of a network disk to free the lock of a dead machine
        check_links(path)
        lock = _take_lock(path, record, patience)
        return cls(path, {**record, **read_record(path)}, lock, seconds, last)

    def restart(self, argv: Sequence[str], step: int, **facts: Any) -> None:
        """Record in run.json that this process continues training at `step`, and how the previous session ended.

        Args:
            facts: further facts about the new session (git, say).
        """
        record, self._silent_since = self.record, None
        previous = {key: record.get(key) for key in ("status", "exit_reason", "end", "last_step", "pid", "host")}
        if previous["status"] == "running":
            previous["status"] = "crashed"
        now = utc_now()
        session = {"time": now, "step": step, "argv": list(argv), "before": previous, **facts}
        self.update(
            status="running",
            exit_reason=None,
            end=None,
            seconds=round(self.seconds_before, 3),
            pid=os.getpid(),
            host=socket.gethostname(),
            resumes=[*record.get("resumes", []), session],
        )

    def settle(self) -> str | None:
        """Record where this run directory is, and its id there. A copy forgets what the trackers have of the original.

        Returns:
            The id of the run that this one is a copy of; None if it is not one.
        """
        record = self.record
        original = str(record.get("id")) if is_copy(self.path, record) else None
        views: dict[str, Any] = record.get("views") or {}
        if original is not None:
            for name in IN_TRACKERS & views.keys():
                (self.path / fed_note(name)).unlink(missing_ok=True)  # its own entry is fed from the start
                # W&B finds a run by an id that we choose: the copy may have the name of the original.
                views[name] = {"id": f"{self.id}-{secrets.token_hex(3)}"} if name == "wandb" else {}
        copied = {"copied_from": original} if original is not None else {}
        self.update(id=self.id, place=_place(self.path), views=views, **copied)
        return original

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def record(self) -> dict[str, Any]:
        """A copy of run.json."""
        with self._mutex:
            return json.loads(json.dumps(self._record))

    def update(self, **facts: Any) -> None:
        """Replace fields of run.json atomically; does nothing once the lock is released.

        Raises:
            OSError: run.json cannot be written; the next call tries again.
        """
        self._change(lambda record: {**record, **facts})

    def update_view(self, name: str, **facts: Any) -> None:
        """Merge facts about one view (its state, its id in the tracker) into run.json."""

        def change(record: dict[str, Any]) -> dict[str, Any]:
            views = record.get("views") or {}
            return {**record, "views": {**views, name: {**views.get(name, {}), **facts}}}

        self._change(change)

    def _change(self, change: Change) -> None:
        """Change run.json as it is on the disk: a person may have given the run another tag meanwhile."""
        with self._mutex:
            self._record = change(self._record)
            if self._ended.is_set():  # a view that hung may return when the directory has another owner
                return
            self._unwritten.append(change)
            self._record = change_json(self.path / RECORD, self._with_unwritten, self._on_disk)
            self._unwritten.clear()

    def _with_unwritten(self, record: dict[str, Any] | None) -> dict[str, Any]:
        return functools.reduce(lambda changed, change: change(changed), self._unwritten, record or self._record)

    def _on_disk(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_record(path.parent)
        except RunError:  # deleted or damaged while it trains: what this process knows is written again
            return None

    def _heartbeat(self) -> None:
        """Touch the lock file at intervals: a sign of life for readers on other hosts, which cannot see the lock."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network disk may be unavailable for a while
                os.utime(self.path / LOCK)

    def finish(self, status: Status, reason: str | None = None, **facts: Any) -> None:
        """Record how the run ended; the lock is held until `release`."""
        seconds = self.record.get("seconds", 0.0) + time.monotonic() - self._began
        self.update(status=status, exit_reason=reason, end=utc_now(), seconds=round(seconds, 3), **facts)

    def release(self) -> None:
        """Release the lock; this process no longer uses the directory."""
        with self._mutex:
            self._ended.set()
        self._lock.release(self._silent_since)


def new_record(path: Path, tag: str | None, **facts: Any) -> dict[str, Any]:
    """The content of run.json of a run that starts now in the directory `path`, which has its lock already.

    Args:
        facts: further fields, or other values.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "id": path.name,
        "tag": tag,
        "status": "running",
        "exit_reason": None,
        "start": utc_now(),
        "end": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "last_step": None,
        "summary": {},
        "parent": None,
        "resumes": [],
        "views": {},
        "place": _place(path),
        "seconds": 0.0,
        **facts,
    }


def check_links(path: Path) -> None:
    """Raises RunError if a link in the run directory `path` leads out of it: what is written there would go elsewhere.

    The directory itself may be one. Weights & Biases looks after the links in its own folder.
    """
    if links := [link for link in links_out(path) if path / WANDB not in link.parents]:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        raise RunError(
            f"{links[0]} is a link that leads out of the run, to {os.path.realpath(links[0])}{more}: nothing is "
            "written through it; put the file or folder itself there"
        )


def _place(path: Path) -> dict[str, Any]:
    """Where a run directory is: only to recognise a copy of it, so another place is no mistake."""
    return {"path": os.path.abspath(path), "inode": (path / LOCK).stat().st_ino, "host": socket.gethostname()}


def is_copy(path: Path, record: Mapping[str, Any]) -> bool:
    """True if the run directory `path` was copied from another one, which may still exist.

    A run that was moved, or is reached through a link, is none: its old place is empty, or leads to it. On another
    host, where the old place cannot be seen, the file that holds the lock tells: it moves along, a copy has a new one.
    """
    place = record.get("place")
    if not isinstance(place, dict) or not isinstance(place.get("path"), str):  # older records have the id only
        original = path.parent / str(record.get("id") or path.name)
    elif place["path"] == os.path.abspath(path):
        return False
    else:
        original = Path(place["path"])
        if place.get("host") != socket.gethostname() and place.get("inode") != (path / LOCK).stat().st_ino:
            return True
    try:
        return (original / RECORD).is_file() and not original.samefile(path)
    except OSError:  # it cannot be seen
        return False


def _take_lock(path: Path, record: Mapping[str, Any], patience: float) -> RunLock:
    """Take and sign the lock of a run directory; while another process holds it, try again for `patience` seconds.

    Raises:
        RunLockedError: another process holds it.
        RunError: it cannot be written.
        OSError: its disk is full or fails.
    """
    began = time.monotonic()
    try:
        while True:
            try:
                lock = RunLock(path)
                break
            except BlockingIOError:
                waited = time.monotonic() - began
                if waited >= max(patience, GLANCE_SECONDS):
                    raise _being_trained(path, record) from None
                time.sleep(0.01 if waited < GLANCE_SECONDS else 0.5)
        lock.sign()
    except OSError as error:
        raise unwritable(path, error, RunError(f"{path}: the run cannot be resumed: {error.strerror}")) from None
    return lock


def _being_trained(path: Path, record: Mapping[str, Any]) -> RunLockedError:
    return RunLockedError(f"run {path.name} is being trained by {holder_words(path, record)}")


def read_record(path: Path) -> dict[str, Any]:
    """run.json of the run directory `path`.

    Raises:
        RunError: it is missing, damaged, or of another schema version.
    """
    try:
        record = read_json(path / RECORD, path)
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory: it has no {RECORD}") from None
    except OSError as error:
        raise RunError(f"{path / RECORD} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path / RECORD} cannot be read: {error}") from None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("status"), str)
        or not isinstance(record.get("start", ""), str)
        or not isinstance(record.get("tag"), str | None)
    ):
        raise RunError(f"{path / RECORD} is not the record of a run")
    if record.get("schema_version") != SCHEMA_VERSION:
        version = record.get("schema_version")
        raise RunError(f"{path / RECORD} has schema_version {version!r}, this workbench reads {SCHEMA_VERSION}")
    from utils.runs.record import wrong_fields  # pydantic: a third of a second, which --help does not need

    if wrong := wrong_fields(record):
        raise RunError(f"{path / RECORD}: not as this workbench writes it: {', '.join(wrong)}")
    return record


def change_record(path: Path, **facts: Any) -> None:
    """Replace fields of run.json in the run directory `path`, whoever else changes other ones.

    Raises:
        RunError: it is missing, damaged, or cannot be written.
        OSError: its disk is full or fails.
    """
    try:
        change_json(path / RECORD, lambda record: {**record, **facts}, lambda place: read_record(place.parent))
    except OSError as error:
        mistake = RunError(f"{path / RECORD} cannot be written: {error.strerror}")
        raise unwritable(path / RECORD, error, mistake) from None


def seconds_of(moment: Any) -> float | None:
    """A time of run.json in seconds since the epoch; None if it is not a time."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None


def resume_times(record: Mapping[str, Any]) -> list[float]:
    """When the run was resumed, in seconds since the epoch: what lies before each is a pause."""
    starts = (seconds_of(session.get("time")) for session in _resumes(record))
    return [start for start in starts if start is not None]


def _resumes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [session for session in record.get("resumes") or [] if isinstance(session, dict)]


def duration_of(path: Path, record: Mapping[str, Any], *, alive: bool) -> float:
    """Seconds that all sessions of a run took together; a session that is alive counts until now.

    A session adds what a monotonic clock says when it ends. Where that is missing (it was killed, or the record is
    older), the clock of the wall gives it, from its start to its end or last sign of life, and never less than zero.
    """
    resumes = _resumes(record)
    starts = [seconds_of(record.get("start")), *(seconds_of(session.get("time")) for session in resumes)]
    befores = (session.get("before") or {} for session in resumes)
    ends = [*(seconds_of(before.get("end")) for before in befores), seconds_of(record.get("end"))]
    total, recorded = 0.0, record.get("seconds")
    if isinstance(recorded, int | float) and math.isfinite(recorded):
        if record.get("status") != "running":
            return float(recorded)
        total, starts, ends = float(recorded), starts[-1:], ends[-1:]
    if ends[-1] is None and record.get("status") == "running":
        ends[-1] = time.time() if alive else _last_sign_of_life(path)
    spans = (end - start for start, end in zip(starts, ends, strict=True) if start is not None and end is not None)
    return total + sum(max(0.0, span) for span in spans)


def _last_sign_of_life(path: Path) -> float | None:
    """The later of the heartbeat, which may be HEARTBEAT_SECONDS old, and the last record of the log."""
    from utils.runs.log import last_record  # orjson, which --help does not need

    times = []
    with contextlib.suppress(OSError):
        times.append((path / LOCK).stat().st_mtime)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # not written by us
        logged = float((last_record(path / METRICS_LOG) or {})["time"])
        if logged < time.time():  # not nan, and of no other clock
            times.append(logged)
    return max(times, default=None)


def read_status(path: Path) -> str:
    """The status in run.json, or `crashed` for a run whose status is `running` while no process trains it.

    Raises:
        RunError: run.json is missing or damaged.
    """
    return status_of(path, read_record(path))


def status_of(path: Path, record: Mapping[str, Any]) -> str:
    """As `read_status`, for a run.json that was read already."""
    if record["status"] != "running":
        return str(record["status"])
    return "running" if is_held(path, record) else "crashed"
