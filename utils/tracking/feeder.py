"""Feeders: threads that read a run's logs as they grow and write the views, within a budget of processor time."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.errors import typed_line
from utils.files import put_aside, read_json, write_json
from utils.runs.layout import fed_note
from utils.runs.log import LOG_FILES, offset_of_step, read_from, read_lines, record_at
from utils.tracking import RunEnd, View

POLL_SECONDS = 0.5
FLUSH_SECONDS = 2.0
CHUNK_BYTES = 65_536
SLICE_SECONDS = 0.005  # of work between rests; equals the switch interval of Python's threads
BURST_SECONDS = 2.0  # unused budget expires after this
RETRY_SECONDS = (0.5, 1.0, 2.0)  # waits between attempts, after which the view is switched off
PROGRESS_SECONDS = 2.0  # between the lines that report a backlog when training has ended
REPORT_SECONDS = 0.1  # between the progress reports of a rebuild
HANGING_SECONDS = 30.0  # in one call of a view, after which a warning is printed


class Budget:
    """Processor time that all feeders of a run may use together: a share of the wall time.

    t seconds of work use up t / share seconds of wall time, for the rest of which the feeders pause. Processor time
    counts, including that of a tracker's own threads, and in each slice a little of the time spent waiting for the
    interpreter, which the training loop needs at the same time.

    Args:
        share: of one processor, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._free_at = time.monotonic()
        self._mutex = threading.Lock()

    def spend(self, seconds: float) -> None:
        """Record time that a feeder has used."""
        with self._mutex:
            self._free_at = max(self._free_at, time.monotonic() - BURST_SECONDS) + seconds / self.share

    def lift(self) -> None:
        """Remove the limit from now on."""
        with self._mutex:
            self.share, self._free_at = float("inf"), time.monotonic()

    def seconds_to_rest(self) -> float:
        """How long the feeders must wait before they may work again."""
        return max(0.0, self._free_at - time.monotonic())


class Feeder(threading.Thread):
    """Feeds one view from one run's logs until `finish`.

    Opening a view imports its package, which takes up to a second of processor time once and does not count towards
    the budget.

    Args:
        view: the tracker.
        logs_dir: the folder of the logs.
        budget: the processor time during training, shared with the other feeders.
        record: stores facts about the view in run.json.
        warn: prints a line for the user.
        rebuild_command: the command that rebuilds the view.
        resumed_step: the step at which a resumed run continues; None: a new run.
    """

    def __init__(
        self,
        view: View,
        logs_dir: Path,
        budget: Budget,
        record: Callable[..., None],
        warn: Callable[[str], None],
        rebuild_command: str,
        resumed_step: int | None = None,
    ) -> None:
        super().__init__(name=f"feed-{view.name}", daemon=True)
        self.view = view
        self.logs_dir = logs_dir
        self.budget = budget
        self.rebuild_command = rebuild_command
        self.resumed_step = resumed_step
        # A resume cuts the logs back to its checkpoint. New records need not end where the removed ones did, so saved
        # offsets beyond these sizes may point into the middle of a record.
        self._sizes_at_start = {name: _size(logs_dir / name) for name in LOG_FILES}
        self.last_step = -1  # last step fed in this session
        self.last_step_before = -1  # last step fed in earlier sessions, perhaps beyond the step that the run resumed at
        self.offsets = dict.fromkeys(LOG_FILES, 0)
        self._record, self._warn = record, warn
        self._waiting: dict[str, deque[bytes]] = {name: deque() for name in LOG_FILES}  # lines read, but not fed yet
        self._unflushed, self._flushed_at = False, 0.0
        self._background = 0.0  # seconds used by the view's own threads
        self.busy_since: float | None = None  # when the current call of the view began
        self._wake = threading.Event()
        self._end: RunEnd | None = None

    def run(self) -> None:
        try:
            first_step = self._pick_up()
            facts = self._attempt(lambda: self.view.open(first_step))
            self._record(self.view.name, state="on", reason=None, **facts)
            if self.view.starts_empty:
                self.offsets, self.last_step_before = dict.fromkeys(LOG_FILES, 0), -1
            self._background = self.view.background_seconds()
            self._tail()
            if self.last_step < self.last_step_before and not self.view.rolls_back:
                self.feed_from_start()
            assert self._end is not None
            self.close(self._end)
        except Exception as error:  # the tracker boundary: whatever fails there, training continues
            reason = typed_line(error)
            message = f"{self.view.name} is off: {reason}; to feed it later: {self.rebuild_command}"
            # The tracker first, because its open files and connections can delay the end of the process.
            attempt_each(
                self.view.abandon,
                lambda: self._record(self.view.name, state="off", reason=reason),
                lambda: self._warn(message),
            )

    def _tail(self) -> None:
        """Feed the logs, and everything that is appended to them, until training has ended."""
        while True:
            ending = self._end is not None  # checked before reading the logs, which do not grow any more once it is set
            started, worked = time.perf_counter(), time.thread_time()
            done = self.feed_slice()
            self._flush(now=done and ending)
            if done and ending:
                return
            self.budget.spend(min(time.perf_counter() - started, time.thread_time() - worked + SLICE_SECONDS))
            if not ending:
                self.rest(max(self.budget.seconds_to_rest(), POLL_SECONDS if done else 0.0))

    def rest(self, seconds: float) -> None:
        """Wait for this long, or until `wake` is called."""
        self._wake.wait(seconds)
        self._wake.clear()  # the end is not lost: it is in _end

    def wake(self) -> None:
        """End the current rest."""
        self._wake.set()

    def feed_slice(self, seconds: float = SLICE_SECONDS) -> bool:
        """Feed for about `seconds`; return True once everything in the logs is fed."""
        end = time.perf_counter() + seconds
        while True:
            for name, lines in self._waiting.items():
                if not lines:
                    lines.extend(read_lines(self.logs_dir / name, self.offsets[name], CHUNK_BYTES))
            ready = [name for name, lines in self._waiting.items() if lines]
            if not ready:
                return True
            records = {name: self._next_record(name) for name in ready}
            while ready:
                # In the order of steps across all logs, as the records were written.
                name = min(ready, key=lambda name: records[name]["step"])
                self._attempt(functools.partial(self.view.feed, name, records[name]))
                self._unflushed = True
                self.last_step = max(self.last_step, records[name]["step"])
                self.offsets[name] += len(self._waiting[name].popleft())
                if not self._waiting[name]:
                    break
                if time.perf_counter() >= end:
                    return False
                records[name] = self._next_record(name)

    def _next_record(self, name: str) -> dict[str, Any]:
        return record_at(self.logs_dir / name, self.offsets[name], self._waiting[name][0])

    def feed_from_start(self, report: Callable[[], None] = lambda: None) -> None:
        """Empty the view and feed the whole logs to it; call `report` every REPORT_SECONDS."""
        self._record(self.view.name, **self._attempt(self.view.clear))
        for name in LOG_FILES:
            self.offsets[name] = 0
            self._waiting[name].clear()
        while not self.feed_slice(REPORT_SECONDS):
            report()
        self._flush(now=True)

    def rebuild(self, end: RunEnd, report: Callable[[], None]) -> None:
        """Empty, feed and close the view of a run that has ended, in the calling thread.

        Raises:
            Exception: the view failed.
        """
        self._record(self.view.name, **self._attempt(lambda: self.view.open(0)))
        self.feed_from_start(report)
        self.close(end)

    def close(self, end: RunEnd) -> None:
        """Close the view and record that it is complete."""
        self._attempt(lambda: self.view.close(end))
        self._record(self.view.name, state="complete", reason=None)

    @property
    def _state_path(self) -> Path:
        return self.logs_dir / fed_note(self.view.name).name

    def _pick_up(self) -> int:
        """Set the offsets at which to continue after earlier sessions; return the first step that will be fed."""
        if self.resumed_step is None:
            return 0
        try:
            state = read_json(self._state_path)
            fed = {name: int(state["offsets"][name]) for name in LOG_FILES}
            self.last_step_before = int(state["last_step"])
        except (OSError, ValueError, KeyError, TypeError):  # nothing was fed, or the note is damaged: feed everything
            return 0
        first_step = self.resumed_step
        for name in LOG_FILES:
            if fed[name] < self._sizes_at_start[name]:
                unfed, _ = read_from(self.logs_dir / name, fed[name], CHUNK_BYTES)
                first_step = min([first_step, *(record["step"] for record in unfed[:1])])
        self.offsets = {name: offset_of_step(self.logs_dir / name, first_step) for name in LOG_FILES}
        return first_step

    def _flush(self, *, now: bool) -> None:
        """Make the fed records visible, and save the progress for a session after a crash."""
        if not self._unflushed or not (now or time.monotonic() >= self._flushed_at + FLUSH_SECONDS):
            return
        self._attempt(self.view.flush)
        self._unflushed, self._flushed_at = False, time.monotonic()
        taken_before, self._background = self._background, self.view.background_seconds()
        self.budget.spend(self._background - taken_before)
        state = {"offsets": self.offsets, "last_step": max(self.last_step, self.last_step_before)}
        temporary = self._state_path.with_suffix(".tmp")  # not synced: if it is lost, records are fed again
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self._state_path)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Return the result of `action`, which is retried after each of RETRY_SECONDS unless a package is missing."""
        self.busy_since = time.monotonic()
        try:
            for wait in RETRY_SECONDS:
                try:
                    return action()
                except ImportError:
                    raise
                except Exception:  # the tracker boundary: counted by this loop, reported by run()
                    time.sleep(wait)
            return action()
        finally:
            self.busy_since = None

    def finish(self, end: RunEnd) -> None:
        """Make the thread feed the rest and close the view, now that training has ended. Returns at once."""
        self._end = end
        self.wake()

    def backlog_bytes(self) -> int:
        """The number of bytes of the logs that are not fed yet."""
        return sum(_size(self.logs_dir / name) - self.offsets[name] for name in LOG_FILES)


def cut_progress(logs_dir: Path) -> None:
    """Limit the saved progress of each view to the lengths of the logs, after they were cut back to a checkpoint."""
    for path in logs_dir.glob(fed_note("*").name):
        try:
            progress = read_json(path)
            progress["offsets"] = {name: min(fed, _size(logs_dir / name)) for name, fed in progress["offsets"].items()}
            write_json(path, progress)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            with contextlib.suppress(OSError):  # damaged: without it, everything is fed again
                put_aside(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def attempt_each(*actions: Callable[[], object]) -> None:
    """Call each action even if others raise: the handling of a failure may fail too, for example on a full disk."""
    for action in actions:
        with contextlib.suppress(Exception):  # the tracker boundary: only the first failure is reported
            action()


class Feeders:
    """The feeders of one run, started, watched and finished together."""

    def __init__(
        self, feeders: Sequence[Feeder] = (), warn: Callable[[str], None] = print, record: Callable[..., None] = print
    ) -> None:
        self.feeders = feeders
        self._warn, self._record = warn, record
        self._started = False
        self._reported: list[Feeder] = []  # those reported as hanging

    def start(self) -> None:
        """Begin to feed, once: after the first steps, because importing trackers takes a second or two."""
        if not self._started:
            self._started = True
            for feeder in self.feeders:
                feeder.start()

    def watch(self) -> None:
        """Begin to feed, and warn once of each view that hangs; called at each write of the log."""
        self.start()
        for feeder in self.feeders:
            since = feeder.busy_since
            if feeder not in self._reported and since is not None and time.monotonic() - since > HANGING_SECONDS:
                self._reported.append(feeder)
                reason = f"no answer for {HANGING_SECONDS:g} s"
                self._report(feeder, f"hangs ({reason}); training continues without it", state="hangs", reason=reason)

    def lift_budget(self) -> None:
        """Feed without a limit from now on, since training has ended."""
        self.start()
        for feeder in self.feeders:
            feeder.budget.lift()
            feeder.wake()

    def finish(self, end: RunEnd, progress: Callable[[str], None], seconds: float) -> None:
        """Feed the rest and close the views. A view that takes longer than `seconds` is abandoned with a warning.

        Args:
            progress: prints a line for the user; called every PROGRESS_SECONDS.
        """
        self.start()
        deadline = time.monotonic() + seconds
        for feeder in self.feeders:
            feeder.finish(end)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the wait
            for feeder in self.feeders:
                while feeder.is_alive() and (left := deadline - time.monotonic()) > 0:
                    feeder.join(timeout=min(PROGRESS_SECONDS, left))
                    if feeder.is_alive() and (backlog := feeder.backlog_bytes()):
                        words = f"feeding {feeder.view.name}: {backlog / 1024:,.0f} KiB of the log left, "
                        words += f"for at most {max(deadline - time.monotonic(), 0):.0f} s more"
                        attempt_each(functools.partial(progress, words))
        for feeder in self.feeders:
            if feeder.is_alive():
                attempt_each(feeder.view.abandon)
                words = f"is incomplete: {feeder.backlog_bytes():,} bytes of the log were not fed within {seconds:g} s"
                words += f"; the log itself is complete; to feed it later: {feeder.rebuild_command}"
                self._report(feeder, words, state="incomplete", reason=f"not fed within {seconds:g} s")

    def _report(self, feeder: Feeder, words: str, **facts: Any) -> None:
        """Warn about a view and record its state; a full disk must not stop the training thread."""
        name = feeder.view.name
        attempt_each(lambda: self._warn(f"{name} {words}"), lambda: self._record(name, **facts))
