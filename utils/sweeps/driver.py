"""The driver of a sweep: claims trials, carries out several at a time, and records how they ended.

Several drivers, on one machine or many, may work on the same sweep. Each waits at the end until the trials of the
others are done: if another driver is killed, this one continues its trials.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from utils.errors import UserError
from utils.machine.signals import StopRequest, StopSignal, stop_on_signals
from utils.runs.lock import HEARTBEAT_SECONDS
from utils.sweeps.folder import Sweep
from utils.sweeps.study import NoWork, Study, Work
from utils.sweeps.trial import DiskFullError, Outcome, TrialRunner, record

MAX_FAILURES = 5  # in a row, by default
WAIT_SECONDS = 0.5  # between attempts to claim work while other drivers hold all of it
TICK_SECONDS = 0.2  # between updates of the display

Show = Callable[[], None]
Report = Callable[[int, Outcome], None]


@dataclass
class Ending:
    """Why a driver ended.

    problem: a line for the user if the sweep could not go on.
    signum: the number of the signal that stopped it.
    """

    problem: str | None = None
    signum: int | None = None

    @property
    def exit_status(self) -> int:
        if self.signum is not None:
            return 128 + self.signum
        return 1 if self.problem else 0


def disk_full_message(error: DiskFullError) -> str:
    return f"the disk is full: {error}; make room, then continue the sweep with --resume"


def too_many_failures_message(failures: int, last: Outcome) -> str:
    return f"{failures} trials in a row have failed (--max-failures); the last one: {last.reason}"


class Driver:
    """Works on a sweep with `jobs` trials at a time until there is nothing left to do.

    Args:
        total: number of trials of the sweep, including those that exist already.
        max_failures: trials in a row that may fail before the driver ends.
        report: called with each trial that this driver has finished.
    """

    def __init__(
        self, sweep: Sweep, study: Study, total: int, jobs: int, max_failures: int, report: Report = lambda *_: None
    ) -> None:
        self.sweep, self.study, self.total, self.jobs = sweep, study, total, jobs
        self.runner = TrialRunner(sweep, study)
        self.ending = Ending()
        self._max_failures, self._report = max_failures, report
        self._failures_in_a_row = 0
        self._mutex = threading.Lock()
        self._works: dict[int, Work] = {}
        self._unexpected: BaseException | None = None

    def run(self, show: Show = lambda: None) -> Ending:
        """Carry out trials until none is left, a signal comes, or the sweep cannot go on.

        Args:
            show: updates the display; called several times a second.
        """
        with stop_on_signals() as stop:
            slots = [threading.Thread(target=self._slot, name=f"trial {n}") for n in range(self.jobs)]
            for slot in slots:
                slot.start()
            try:
                self._wait(slots, stop, show)
            except StopSignal:
                self.runner.stop(signal.SIGTERM)  # the second SIGTERM: training stops at once
                for slot in slots:
                    slot.join()
            self.ending.signum = stop.signum
        if self._unexpected is not None:
            raise self._unexpected
        return self.ending

    def _wait(self, slots: list[threading.Thread], stop: StopRequest, show: Show) -> None:
        """Wait until all slots have ended; pass a signal on to the training processes, once."""
        passed_on, next_beat = False, time.monotonic() + HEARTBEAT_SECONDS
        while any(slot.is_alive() for slot in slots):
            if stop and not passed_on:
                passed_on = True
                self.runner.stop(signal.SIGTERM)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                self._beat()
            show()
            next((slot for slot in slots if slot.is_alive()), slots[0]).join(TICK_SECONDS)
        show()

    def _beat(self) -> None:
        """Touch the locks, as a sign of life for drivers on other machines, which may not see flock."""
        with self._mutex:
            works = list(self._works.values())
        for work in works:
            os.utime(work.lock.fd)

    def _slot(self) -> None:
        """Claim and carry out one trial after the other, in a thread of its own."""
        try:
            while not self.runner.stopping.is_set():
                work = self.study.claim(self.total)
                if isinstance(work, NoWork):
                    if work.finished:
                        return
                    self.runner.stopping.wait(WAIT_SECONDS)
                    continue
                with self._mutex:
                    self._works[work.number] = work
                try:
                    self._record(work, self.runner.carry_out(work))
                finally:
                    with self._mutex:
                        del self._works[work.number]
                    work.release()
        except DiskFullError as error:
            self._end(disk_full_message(error))
        except UserError as error:
            self._end(str(error))
        except BaseException as error:
            self._unexpected = self._unexpected or error
            self._end(str(error))

    def _end(self, problem: str) -> None:
        """End the sweep because of a problem; the other slots stop with a checkpoint."""
        with self._mutex:
            self.ending.problem = self.ending.problem or problem
        self.runner.stop(signal.SIGTERM)

    def _record(self, work: Work, outcome: Outcome) -> None:
        """Write into the journal how a piece of work ended."""
        record(self.study, work, outcome)
        if outcome.was_stopped:
            return
        self._report(work.number, outcome)
        with self._mutex:
            self._failures_in_a_row = self._failures_in_a_row + 1 if outcome.failed else 0
            too_many = self._failures_in_a_row > self._max_failures
        if too_many:
            self._end(too_many_failures_message(self._failures_in_a_row, outcome))
