"""Signals and the time limit, as requests that the training loop checks between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE_SIGNAL = signal.SIGUSR1


class StopSignal(KeyboardInterrupt):
    """Raised by a signal that stops the program at once, wherever it is.

    signum: the number of the first signal, which decides the exit status.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


@dataclass
class StopRequest:
    """Set by the first stop signal, or by `stop`; a second signal other than SIGHUP raises StopSignal at once.

    reason: why to stop; None: training continues.
    signum: the signal that asked to stop.
    save: a checkpoint is requested (SIGUSR1) while training continues.
    save_due: such a request, on any rank, must be met at this step; the loop clears both.
    patient: False once there is no step left to finish: from then on even the first signal raises.
    signum_of_others: the signal by which another rank was asked to stop.
    silent: print nothing, because another process does.
    deaf: ignore signals: torchrun sends one to all ranks once one has ended, and this one is ending already.
    on_continue: called when the process goes on after it was suspended (SIGSTOP, Ctrl-Z, a batch system), so that
        clocks do not count that time as work.
    """

    reason: str | None = None
    signum: int | None = None
    save: bool = False
    save_due: bool = False
    patient: bool = True
    on_continue: list[Callable[[], None]] = field(default_factory=list)
    signum_of_others: int | None = None
    silent: bool = False
    deaf: bool = False

    def __bool__(self) -> bool:
        return self.reason is not None

    def stop(self, reason: str) -> None:
        """Stop after this step."""
        self.reason = self.reason or reason

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.deaf:
            return
        name = signal.Signals(signum).name
        if signum == SAVE_SIGNAL:
            self.save = True
            self._print(f"\n{name}: saving a checkpoint after this step\n")
            return
        first = self.signum is None
        self.signum = self.signum or signum
        self.stop(name)
        if signum == signal.SIGHUP and not first:
            return  # not a second request: for a closed terminal, the shell and the kernel both send it
        if not (first and self.patient):
            raise StopSignal(self.signum)
        self._print(f"\n{name}: stopping after this step; a second signal stops at once\n")

    def _print(self, message: str) -> None:
        if not self.silent:
            _write(message)

    def handle_continue(self, _signum: int, _frame: FrameType | None) -> None:
        for call in self.on_continue:
            call()


def _write(message: str) -> None:
    """Write to stderr by os.write, because a handler may interrupt code that holds the lock of a stream."""
    with contextlib.suppress(OSError):  # the terminal or the pipe may be gone
        os.write(2, message.encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle STOP_SIGNALS, SAVE_SIGNAL and SIGCONT inside the block; restores the previous handlers on exit.

    Only the main thread can handle signals; in another thread the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    wanted = [s for s in (*STOP_SIGNALS, SAVE_SIGNAL) if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {signum: signal.signal(signum, request.handle) for signum in wanted}
    previous[signal.SIGCONT] = signal.signal(signal.SIGCONT, request.handle_continue)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise StopSignal at SIGTERM and SIGHUP inside the block, so that half-written files are removed as after Ctrl-C.

    Only the main thread can handle signals; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise StopSignal(signum)

    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]  # nohup
    previous = {signum: signal.signal(signum, stop) for signum in wanted}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Deadline:
    """A limit on wall time, checked between steps.

    Args:
        minutes: from now on; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = time.monotonic() + 60 * minutes if minutes is not None else None
        self._last: float | None = None  # when step_done was last called
        self._longest_step = 0.0

    @property
    def seconds_left(self) -> float | None:
        return None if self.end is None else self.end - time.monotonic()

    def step_done(self) -> None:
        """Measure the step since the previous call. The first call, before the first step, only starts the clock."""
        now = time.monotonic()
        if self._last is not None:
            self._longest_step = max(self._longest_step, now - self._last)
        self._last = now

    def continued(self) -> None:
        """The process was suspended for a while: the step in progress is timed from now on."""
        if self._last is not None:
            self._last = time.monotonic()

    def is_near(self, reserve: float) -> bool:
        """Whether another step, as long as the longest so far, would leave less than `reserve` seconds."""
        now = time.monotonic()
        longest = max(self._longest_step, now - self._last if self._last is not None else 0.0)
        return self.end is not None and now + longest + reserve > self.end
