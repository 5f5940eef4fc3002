"""A run directory in use: its id, creation, run.json, status and lock.

The training process holds a lock as long as it lives (utils/runs/lock.py), so that readers can tell `running` from
`crashed` even though a killed process records nothing. utils/runs/layout.py lists the content of a run directory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
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
from utils.runs.duration import duration_of
from utils.runs.layout import ARTIFACTS, LOCK, LOGS, META, NOTES, RECORD, WANDB, fed_note
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
REPRODUCTION = "reproduction"  # the relation of a run to the parent that it repeats
GLANCE_SECONDS = 0.2  # a process that checks whether the lock is free holds it for a moment
NO_NOTES = {"tags": [], "note": "", "pinned": False}  # notes.json of a new run
IN_TRACKERS = {"aim", "wandb"}  # views that store their data outside the run directory

Change = Callable[[dict[str, Any]], dict[str, Any]]  # maps the content of run.json to the new content
Status = Literal["running", "completed", "interrupted", "failed", "diverged"]


class RunError(UserError):
    """A run directory does not exist, is not the only match, or cannot be used."""


class RunLockedError(RunError):
    """Another process is training in the run directory."""


def utc_now() -> str:
    """The current time in UTC with milliseconds, in the format of run.json."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def run_ids(tag: str | None = None, now: datetime | None = None) -> Iterator[str]:
    """Yield ids to try: `YYYYMMDD_HHMMSS[_tag]` in local time, then the same with `_2`, `_3`, ... appended."""
    base = (now or datetime.now()).strftime("%Y%m%d_%H%M%S") + (f"_{tag}" if tag else "")
    yield base
    for attempt in itertools.count(2):
        yield f"{base}_{attempt}"


def create_run_directory(runs_dir: Path, tag: str | None = None, now: datetime | None = None) -> Path:
    """Create an empty run directory; if another process has taken an id already, under the next id.

    Raises:
        RunError: the tag is invalid, or `runs_dir` cannot be written.
        OSError: the disk is full or fails.
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

    Call `run = Run.create(...)` or `Run.resume(...)`, then `run.update(...)` any number of times, and at the end
    `run.finish(status, reason)` and `run.release()`, once each.

    has_flock: whether the file system supports flock; otherwise the lock file alone tells who trains the run.
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
        self._silent_since = silent_since  # last sign of life of the previous process; None once this process trains
        self.has_flock = lock.has_flock
        self._record = record
        self._lock = lock
        self._mutex = threading.Lock()
        self._unwritten: list[Change] = []  # changes that could not be written to run.json yet (a full disk)
        self._ended = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()

    @classmethod
    def create(cls, runs_dir: Path, tag: str | None = None, **facts: Any) -> Run:
        """Create a run directory, take its lock, and write a run.json with the status `running`.

        Args:
            runs_dir: the folder of runs.
            tag: becomes part of the id.
            facts: further fields of run.json (argv, resolved, parent, ...).

        Raises:
            RunError: the directory cannot be created; nothing is left behind.
            OSError: the disk is full or fails; nothing is left behind.
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
        """Take over a run directory whose process has ended; run.json is not changed yet.

        Args:
            report: gets one line before this call waits, for up to a minute, to see whether a process of another
                machine is still alive. Without it, the call raises RunLockedError instead of waiting.

        Raises:
            RunLockedError: the run is being trained; the message names the process and its host.
            RunError: `path` is not a run directory, cannot be written, or contains a link that leads out of it.
            OSError: the disk is full or fails.
        """
        record, patience = read_record(path), 0.0
        seconds, last = duration_of(path, record, alive=False), heartbeat_of(path)  # before this process signs the lock
        if is_elsewhere(path, record) and heart_beats(path):
            if report is None or not wait_until_silent(path, lambda: read_record(path), report):
                raise _being_trained(path, record)
            patience = STALE_HEARTBEAT_SECONDS  # until the server of a network disk frees the lock of a dead machine
        check_links(path)
        lock = _take_lock(path, record, patience)
        return cls(path, {**record, **read_record(path)}, lock, seconds, last)

    def restart(self, argv: Sequence[str], step: int, **facts: Any) -> None:
        """Record in run.json that this process continues training at `step`, and how the previous session ended.

        Args:
            facts: further facts about the new session, such as git.
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
        """Record the place and id of the run directory; a copy forgets what the trackers have of the original.

        Returns:
            The id of the original if this run is a copy, otherwise None.
        """
        record = self.record
        original = str(record.get("id")) if is_copy(self.path, record) else None
        views: dict[str, Any] = record.get("views") or {}
        if original is not None:
            for name in IN_TRACKERS & views.keys():
                (self.path / fed_note(name)).unlink(missing_ok=True)  # the copy's own entry is fed from the start
                # We choose the id by which W&B finds a run, and the copy may have the same name as the original.
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
        """Change run.json as it is on the disk now, since the user may have edited it, for example its tag."""
        with self._mutex:
            self._record = change(self._record)
            if self._ended.is_set():  # a view that hung may return after another process has taken the directory
                return
            self._unwritten.append(change)
            self._record = change_json(self.path / RECORD, self._with_unwritten, self._on_disk)
            self._unwritten.clear()

    def _with_unwritten(self, record: dict[str, Any] | None) -> dict[str, Any]:
        return functools.reduce(lambda changed, change: change(changed), self._unwritten, record or self._record)

    def _on_disk(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_record(path.parent)
        except RunError:  # deleted or damaged during training: it is rewritten from the record in memory
            return None

    def _heartbeat(self) -> None:
        """Touch the lock file at intervals, as a sign of life for readers on other hosts, which cannot see the lock."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network disk may be unavailable for a while
                os.utime(self.path / LOCK)

    def finish(self, status: Status, reason: str | None = None, **facts: Any) -> None:
        """Record how the run ended. The lock is held until `release`."""
        seconds = self.record.get("seconds", 0.0) + time.monotonic() - self._began
        self.update(status=status, exit_reason=reason, end=utc_now(), seconds=round(seconds, 3), **facts)

    def release(self) -> None:
        """Release the lock; after this call, `update` no longer writes to the directory."""
        with self._mutex:
            self._ended.set()
        self._lock.release(self._silent_since)


def new_record(path: Path, tag: str | None, **facts: Any) -> dict[str, Any]:
    """The content of run.json for a run that starts now in the directory `path`, where the lock file already exists.

    Args:
        facts: further fields, and values that replace those here.
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
    """Raise RunError if a link in the run directory `path` leads out of it: writing through it would go elsewhere.

    The directory itself may be a link. The folder of Weights & Biases is skipped, because it has links of its own.
    """
    if links := [link for link in links_out(path) if path / WANDB not in link.parents]:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        raise RunError(
            f"{links[0]} is a link that leads out of the run, to {os.path.realpath(links[0])}{more}: nothing is "
            "written through it; replace it with the file or folder itself"
        )


def _place(path: Path) -> dict[str, Any]:
    """The place of a run directory, recorded only to recognise copies; a run may be moved."""
    return {"path": os.path.abspath(path), "inode": (path / LOCK).stat().st_ino, "host": socket.gethostname()}


def is_copy(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run directory `path` was copied from another one.

    A run that was moved, or is reached through a link, is not a copy: its old place is empty, or leads to it. On
    another host, where the old place cannot be seen, the inode of the lock file tells: only a copy has a new one.
    """
    place = record.get("place")
    if not isinstance(place, dict) or not isinstance(place.get("path"), str):  # older records have only the id
        original = path.parent / str(record.get("id") or path.name)
    elif place["path"] == os.path.abspath(path):
        return False
    else:
        original = Path(place["path"])
        if place.get("host") != socket.gethostname() and place.get("inode") != (path / LOCK).stat().st_ino:
            return True
    try:
        return (original / RECORD).is_file() and not original.samefile(path)
    except OSError:  # the old place cannot be read
        return False


def _take_lock(path: Path, record: Mapping[str, Any], patience: float) -> RunLock:
    """Take and sign the lock of a run directory; while another process holds it, retry for `patience` seconds.

    Raises:
        RunLockedError: another process holds the lock.
        RunError: the lock file cannot be written.
        OSError: the disk is full or fails.
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
    """Read run.json of the run directory `path`.

    Raises:
        RunError: the file is missing, damaged, or has another schema version.
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
    from utils.runs.record import wrong_fields  # here, because pydantic takes a third of a second to import

    if wrong := wrong_fields(record):
        raise RunError(f"{path / RECORD} has invalid fields: {', '.join(wrong)}")
    return record


def change_record(path: Path, **facts: Any) -> None:
    """Replace fields of run.json in the run directory `path`; other processes may change other fields meanwhile.

    Raises:
        RunError: run.json is missing, damaged, or cannot be written.
        OSError: the disk is full or fails.
    """
    try:
        change_json(path / RECORD, lambda record: {**record, **facts}, lambda place: read_record(place.parent))
    except OSError as error:
        mistake = RunError(f"{path / RECORD} cannot be written: {error.strerror}")
        raise unwritable(path / RECORD, error, mistake) from None


def read_status(path: Path) -> str:
    """The status in run.json, or `crashed` for a run whose status is `running` while no process trains it.

    Raises:
        RunError: run.json is missing or damaged.
    """
    return status_of(path, read_record(path))


def status_of(path: Path, record: Mapping[str, Any]) -> str:
    """Like `read_status`, for a run.json that has been read already."""
    if record["status"] != "running":
        return str(record["status"])
    return "running" if is_held(path, record) else "crashed"
