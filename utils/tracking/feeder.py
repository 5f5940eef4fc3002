"""The feeder: threads that tail a run's logs and write the views, within a budget of processor time."""

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

from utils.files import write_json
from utils.runs.layout import fed_note
from utils.runs.log import LOG_FILES, offset_of_step, read_from, read_lines
from utils.tracking import RunEnd, View

POLL_SECONDS = 0.5
FLUSH_SECONDS = 2.0
CHUNK_BYTES = 65_536
SLICE_SECONDS = 0.005  # of one turn: Python's threads take turns of that length too
BURST_SECONDS = 2.0  # time that was not used stays free for so long
RETRY_SECONDS = (0.5, 1.0, 2.0)  # waits between attempts; then the view is off
TOLD_EVERY_SECONDS = 2.0
REPORT_SECONDS = 0.1
HANGING_SECONDS = 30.0  # with one record; then the user is told


class Budget:
    """The processor time that all feeders of a run may take together: a share of the wall time.

    Time taken is paid for in advance of the next turn: after t seconds of work there are t / share
    seconds of rest. What counts is processor time, that of threads which a tracker keeps for itself too, and
    in each turn a little of waiting for the interpreter, which the loop wanted at the same time.

    Args:
        share: of one processor, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._free_at = time.monotonic()
        self._mutex = threading.Lock()

    def spend(self, seconds: float) -> None:
        """Note time that a feeder has taken."""
        with self._mutex:
            self._free_at = max(self._free_at, time.monotonic() - BURST_SECONDS) + seconds / self.share

    def lift(self) -> None:
        """No limit from now on."""
        with self._mutex:
            self.share, self._free_at = float("inf"), time.monotonic()

    def seconds_to_rest(self) -> float:
        """How long the feeders must wait before they may take more."""
        return max(0.0, self._free_at - time.monotonic())


class Feeder(threading.Thread):
    """Feeds one view from one run's logs until `finish`.

    Opening a view imports its package, which takes up to a second of the processor once; it is not part of
    the budget.

    Args:
        view: the tracker.
        logs_dir: the folder of the logs.
        budget: of processor time while training runs, shared with the other feeders.
        record: stores facts about the view in run.json.
        warn: tells the user one line.
        rebuild: the command that feeds the view anew.
        resumed_step: the step from which an earlier session of the run goes on; None: a new run.
    """

    def __init__(
        self,
        view: View,
        logs_dir: Path,
        budget: Budget,
        record: Callable[..., None],
        warn: Callable[[str], None],
        rebuild: str,
        resumed_step: int | None = None,
    ) -> None:
        super().__init__(name=f"feed-{view.name}", daemon=True)
        self.view = view
        self.logs_dir = logs_dir
        self.budget = budget
        self.rebuild = rebuild
        self.resumed_step = resumed_step
        # Of the logs that are kept: what is beyond was cut off, and new records do not end where the old ones did.
        self._sizes_at_start = {name: _size(logs_dir / name) for name in LOG_FILES}
        self.last_step = -1  # that was fed in this session,
        self.last_step_before = -1  # and in those before, which may be later than where the run was resumed
        self.offsets = dict.fromkeys(LOG_FILES, 0)
        self._record, self._warn = record, warn
        self._waiting: dict[str, deque[bytes]] = {name: deque() for name in LOG_FILES}  # read, not fed
        self._unflushed, self._flushed_at = False, 0.0
        self._background = 0.0  # seconds of the view's own threads
        self.busy_since: float | None = None  # with one action of the view
        self._wake = threading.Event()
        self._end: RunEnd | None = None

    def run(self) -> None:
        try:
            first_step = self._pick_up()
            facts = self._attempt(lambda: self.view.open(first_step))
            self._record(self.view.name, state="on", reason=None, **facts)
            self._background = self.view.background_seconds()
            self._tail()
            if self.last_step < self.last_step_before and not self.view.rolls_back:
                self.feed_again()
            assert self._end is not None
            self.close(self._end)
        except Exception as error:  # the boundary: whatever a tracker does, training goes on
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            self._record(self.view.name, state="off", reason=reason)
            self._warn(f"{self.view.name} is off: {reason}; later: {self.rebuild}")
            self.view.abandon()

    def _tail(self) -> None:
        """Feed what the logs hold, and what is added, until training has ended and all of it is fed."""
        while True:
            ending = self._end is not None  # read before the logs: what is there now is all there will be
            started, worked = time.perf_counter(), time.thread_time()
            done = self.feed_slice()
            self._flush(now=done and ending)
            if done and ending:
                return
            self.budget.spend(min(time.perf_counter() - started, time.thread_time() - worked + SLICE_SECONDS))
            if not ending:
                self.rest(max(self.budget.seconds_to_rest(), POLL_SECONDS if done else 0.0))

    def rest(self, seconds: float) -> None:
        """Wait, unless training ends."""
        self._wake.wait(seconds)
        self._wake.clear()  # the end itself is in _end

    def wake(self) -> None:
        """End a rest."""
        self._wake.set()

    def feed_slice(self, seconds: float = SLICE_SECONDS) -> bool:
        """Feed for about so long; True if everything that is in the logs is fed."""
        end = time.perf_counter() + seconds
        while True:
            for name, lines in self._waiting.items():
                if not lines:
                    lines.extend(read_lines(self.logs_dir / name, self.offsets[name], CHUNK_BYTES))
            ready = [name for name, lines in self._waiting.items() if lines]
            if not ready:
                return True
            records = {name: json.loads(self._waiting[name][0]) for name in ready}
            while ready:
                # In the order of steps over all logs, as they were written.
                name = min(ready, key=lambda name: records[name]["step"])
                self._attempt(functools.partial(self.view.feed, name, records[name]))
                self._unflushed = True
                self.last_step = max(self.last_step, records[name]["step"])
                self.offsets[name] += len(self._waiting[name].popleft())
                if not self._waiting[name]:
                    break
                if time.perf_counter() >= end:
                    return False
                records[name] = json.loads(self._waiting[name][0])

    def feed_again(self, report: Callable[[], None] = lambda: None) -> None:
        """Empty the view and feed it from offset 0."""
        self._record(self.view.name, **self._attempt(self.view.forget))
        for name in LOG_FILES:
            self.offsets[name] = 0
            self._waiting[name].clear()
        while not self.feed_slice(REPORT_SECONDS):
            report()
        self._flush(now=True)

    def feed_anew(self, end: RunEnd, report: Callable[[], None]) -> None:
        """Do it all in this thread, for a run that has ended; `report` is called now and then.

        Raises:
            Exception: the view has failed.
        """
        self._record(self.view.name, **self._attempt(lambda: self.view.open(0)))
        self.feed_again(report)
        self.close(end)

    def close(self, end: RunEnd) -> None:
        """Show how the run ended; the view is complete."""
        self._attempt(lambda: self.view.close(end))
        self._record(self.view.name, state="complete", reason=None)

    @property
    def _state_path(self) -> Path:
        return self.logs_dir / fed_note(self.view.name).name

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

    def _flush(self, *, now: bool) -> None:
        """Make what was fed visible, and note how far the view has come, for a session after a crash."""
        if not self._unflushed or not (now or time.monotonic() >= self._flushed_at + FLUSH_SECONDS):
            return
        self._attempt(self.view.flush)
        self._unflushed, self._flushed_at = False, time.monotonic()
        taken_before, self._background = self._background, self.view.background_seconds()
        self.budget.spend(self._background - taken_before)
        state = {"offsets": self.offsets, "last_step": max(self.last_step, self.last_step_before)}
        temporary = self._state_path.with_suffix(".tmp")  # not synced: an old note only costs time
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self._state_path)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, tried again after each of RETRY_SECONDS; a missing package is final."""
        self.busy_since = time.monotonic()
        try:
            for wait in RETRY_SECONDS:
                try:
                    return action()
                except ImportError:
                    raise
                except Exception:  # the boundary: counted by this loop, reported by run()
                    time.sleep(wait)
            return action()
        finally:
            self.busy_since = None

    def finish(self, end: RunEnd) -> None:
        """Training has ended: feed the rest without a budget, then close the view. Returns at once."""
        self._end = end
        self.wake()

    def backlog_bytes(self) -> int:
        """Bytes of the logs that are not fed yet."""
        return sum(_size(self.logs_dir / name) - self.offsets[name] for name in LOG_FILES)


def cut_notes(logs_dir: Path) -> None:
    """Cut what views have noted of their progress to the lengths of the logs, which were cut themselves."""
    for path in logs_dir.glob(fed_note("*").name):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            note["offsets"] = {name: min(fed, _size(logs_dir / name)) for name, fed in note["offsets"].items()}
            write_json(path, note)
        except (ValueError, KeyError, TypeError, AttributeError):  # not known: then everything is fed again
            path.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Feeders:
    """The feeders of one run."""

    def __init__(
        self, feeders: Sequence[Feeder] = (), warn: Callable[[str], None] = print, record: Callable[..., None] = print
    ) -> None:
        self.feeders = feeders
        self._warn, self._record = warn, record
        self._started = False
        self._told: list[Feeder] = []  # that hang

    def start(self) -> None:
        """Begin to feed; once. Called after the first steps: importing the trackers takes a second or two."""
        if not self._started:
            self._started = True
            for feeder in self.feeders:
                feeder.start()

    def watch(self) -> None:
        """Called at each write of the log: begin to feed, and tell of a view that has hung for long."""
        self.start()
        for feeder in self.feeders:
            since = feeder.busy_since
            if feeder not in self._told and since is not None and time.monotonic() - since > HANGING_SECONDS:
                self._told.append(feeder)
                self._warn(f"{feeder.view.name} hangs for {HANGING_SECONDS:g} s now; training goes on without it")
                self._record(feeder.view.name, state="hangs", reason=f"no answer for {HANGING_SECONDS:g} s")

    def hurry(self) -> None:
        """Training has ended: feed without a budget from now on."""
        self.start()
        for feeder in self.feeders:
            feeder.budget.lift()
            feeder.wake()

    def finish(self, end: RunEnd, progress: Callable[[str], None], seconds: float) -> None:
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
                while feeder.is_alive() and (left := deadline - time.monotonic()) > 0:
                    feeder.join(timeout=min(TOLD_EVERY_SECONDS, left))
                    if feeder.is_alive() and (backlog := feeder.backlog_bytes()):
                        progress(
                            f"feeding {feeder.view.name}: {backlog / 1024:,.0f} KiB of the log left, "
                            f"for at most {max(deadline - time.monotonic(), 0):.0f} s"
                        )
        for feeder in self.feeders:
            if feeder.is_alive():
                self._warn(
                    f"{feeder.view.name} is incomplete: {feeder.backlog_bytes():,} bytes of the log were not fed "
                    f"within {seconds:g} s; the log itself is complete; later: {feeder.rebuild}"
                )
                self._record(feeder.view.name, state="incomplete", reason=f"not fed within {seconds:g} s")
                feeder.view.abandon()
