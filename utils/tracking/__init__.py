"""The feeder: threads that tail a run's logs and write the views (TensorBoard, Aim).

A view never touches the training loop: it reads what the loop has appended to the log, at its own
pace, within a budget. If it is slow it lags, if it fails it is retried a few times and then switched
off, and what is missing can be fed again from the log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from utils.run_log import LOG_FILES, offset_of_step, read_from

POLL_SECONDS = 0.5
CHUNK_BYTES = 16_384  # small enough that one chunk does not hold up the loop for long
RETRY_SECONDS = (0.5, 1.0, 2.0)  # waits between attempts; then the view is off
CLOSING_SECONDS = 30.0  # for what is not fed when training ends


@dataclass(frozen=True)
class RunFacts:
    """What a view shows of a run besides its logs."""

    id: str
    path: Path
    tag: str | None
    experiment: str
    tags: tuple[str, ...]
    note: str
    hparams: Mapping[str, Any]  # the full config, nested by section
    git: Mapping[str, Any]
    model_summary: Mapping[str, Any]


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    status: str
    summary: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


class View(Protocol):
    """A tracker fed from the log. All methods are called from one thread."""

    name: str

    def open(self, first_step: int) -> Mapping[str, Any]:
        """Import the tracker's package and begin; facts for run.json (an id, say).

        Args:
            first_step: what was fed before for this and later steps is fed again; 0 for a new run.
        """

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        """Show one record of one of LOG_FILES."""

    def flush(self) -> None:
        """Make what was fed visible to readers."""

    def close(self, end: RunEnd) -> None:
        """Show how the run ended; nothing is fed afterwards."""

    def restart(self) -> Mapping[str, Any] | None:
        """Forget what was fed, which then is fed again from step 0; facts for run.json.

        None: the view shows no steps that were fed before `first_step` was opened and not again since, so it need not.
        """


class Feeder(threading.Thread):
    """Feeds one view from one run's logs until `finish`.

    Args:
        view: the tracker.
        logs_dir: the folder of the logs.
        budget: share of wall time that the thread may compute while training runs.
        resumed_step: the step from which an earlier session of the run goes on; None: a new run.
        record: stores facts about the view in run.json.
        warn: tells the user one line.
    """

    def __init__(
        self,
        view: View,
        logs_dir: Path,
        budget: float,
        record: Callable[..., None],
        warn: Callable[[str], None],
        resumed_step: int | None = None,
    ) -> None:
        super().__init__(name=f"feed-{view.name}", daemon=True)
        self.view = view
        self.logs_dir = logs_dir
        self.budget = budget
        self.resumed_step = resumed_step
        # Of the logs that are kept: what is beyond was cut off, and new records do not end where the old ones did.
        self._sizes_at_start = {name: _size(logs_dir / name) for name in LOG_FILES}
        self.last_step = -1  # that was fed in this session,
        self.last_step_before = -1  # and in those before, which may be later than where the run was resumed
        self.offsets = dict.fromkeys(LOG_FILES, 0)
        self.failure: str | None = None
        self._record, self._warn = record, warn
        self._wake = threading.Event()
        self._end: RunEnd | None = None

    def run(self) -> None:
        try:
            first_step = self._pick_up()
            facts = self._attempt(lambda: self.view.open(first_step))
            self._record(self.view.name, state="on", **(facts or {}))
            while True:
                ending = self._end is not None  # read before the logs: what is there now is all there will be
                started = time.thread_time()
                fed = self._feed_available(everything=ending)
                if ending:
                    break
                rest = (time.thread_time() - started) / self.budget if fed else POLL_SECONDS
                self._wake.wait(max(rest, POLL_SECONDS))
            if self.last_step < self.last_step_before and (facts := self._attempt(self.view.restart)):
                self._record(self.view.name, **facts)
                self.offsets = dict.fromkeys(LOG_FILES, 0)
                self._feed_available(everything=True)
            assert self._end is not None
            end = self._end
            self._attempt(lambda: self.view.close(end))
            self._record(self.view.name, state="complete")
        except Exception as error:  # the boundary: whatever a tracker does, training goes on
            self.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            self._warn(f"{self.view.name} is off: {self.failure}")
            self._record(self.view.name, state="off", reason=self.failure)

    @property
    def _state_path(self) -> Path:
        return self.logs_dir / f"fed_{self.view.name}.json"

    def _pick_up(self) -> int:
        """Go on after what an earlier session has fed; the step from which everything is fed (again)."""
        if self.resumed_step is None:
            return 0
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            fed = {name: int(state["offsets"][name]) for name in LOG_FILES}
            self.last_step_before = int(state["last_step"])
        except (OSError, ValueError, KeyError, TypeError):  # nothing fed, or not known: everything is fed again
            return 0
        first_step = self.resumed_step
        for name in LOG_FILES:
            if fed[name] < self._sizes_at_start[name]:
                unfed, _ = read_from(self.logs_dir / name, fed[name], CHUNK_BYTES)
                first_step = min([first_step, *(record["step"] for record in unfed[:1])])
        self.offsets = {name: offset_of_step(self.logs_dir / name, first_step) for name in LOG_FILES}
        return first_step

    def _remember(self) -> None:
        """Note how far the view has come, for a session after a crash. Not synced: an old note only costs time."""
        state = {"offsets": self.offsets, "last_step": max(self.last_step, self.last_step_before)}
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self._state_path)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, tried again after each of RETRY_SECONDS; a missing package is final."""
        for wait in RETRY_SECONDS:
            try:
                return action()
            except ImportError:
                raise
            except Exception:  # the boundary: counted by this loop, reported by run()
                time.sleep(wait)
        return action()

    def _feed_available(self, *, everything: bool) -> bool:
        """Feed a chunk of each log, or all there is; True if there was anything."""
        fed = False
        for log_file in LOG_FILES:
            while True:
                path = self.logs_dir / log_file
                records, end = read_from(path, self.offsets[log_file], CHUNK_BYTES)
                for record in records:
                    self._attempt(functools.partial(self.view.feed, log_file, record))
                    self.last_step = max(self.last_step, record["step"])
                fed |= bool(records)
                self.offsets[log_file] = end
                if not (everything and records):
                    break
        if fed:
            self._attempt(self.view.flush)
            self._remember()
        return fed

    def finish(self, end: RunEnd) -> None:
        """Training has ended: feed the rest without a budget, then close the view. Returns at once."""
        self._end = end
        self._wake.set()

    def backlog_bytes(self) -> int:
        """Bytes of the logs that are not fed yet."""
        sizes = {name: _size(self.logs_dir / name) for name in LOG_FILES}
        return sum(sizes[name] - self.offsets[name] for name in LOG_FILES)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Feeders:
    """The feeders of one run."""

    def __init__(self, feeders: Sequence[Feeder], warn: Callable[[str], None], record: Callable[..., None]) -> None:
        self.feeders = feeders
        self._warn, self._record = warn, record
        self._started = False

    def start(self) -> None:
        """Begin to feed; once. Called after the first steps: importing the trackers takes a second or two."""
        if not self._started:
            self._started = True
            for feeder in self.feeders:
                feeder.start()

    def finish(self, end: RunEnd, progress: Callable[[str], None], seconds: float = CLOSING_SECONDS) -> None:
        """Feed the rest and close the views, within `seconds`; a view that is not done by then is left, and said so.

        Args:
            progress: tells the user one line while it takes long.
        """
        self.start()
        deadline = time.monotonic() + seconds
        for feeder in self.feeders:
            feeder.finish(end)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: do not wait any longer
            for feeder in self.feeders:
                while feeder.is_alive() and time.monotonic() < deadline:
                    feeder.join(timeout=min(2.0, max(deadline - time.monotonic(), 0)))
                    if feeder.is_alive() and (backlog := feeder.backlog_bytes()):
                        progress(f"feeding {feeder.view.name}: {backlog / 1024:,.0f} KiB of the log left")
        for feeder in self.feeders:
            if feeder.is_alive():
                self._warn(
                    f"{feeder.view.name} is incomplete: {feeder.backlog_bytes():,} bytes of the log were not fed "
                    f"within {seconds:g} s; the log itself is complete"
                )
                self._record(feeder.view.name, state="incomplete", offsets=feeder.offsets)
