"""Ctrl-C, SIGTERM and a closed terminal as a request that the training loop honours at the next step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """Set by the first signal; the second one raises KeyboardInterrupt where it strikes.

    patient: False once there is no step left to finish: then the first signal raises, too.
    """

    signum: int | None = None
    patient: bool = True

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name if self.signum is not None else ""

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        first, self.signum = self.signum is None, self.signum or signum
        if not (first and self.patient):
            raise KeyboardInterrupt
        # os.write: a handler may interrupt any code, also one that holds the locks of a stream
        os.write(2, f"\n{self.name}: stopping after this step; once more stops at once\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle SIGNALS inside; the handlers of before afterwards.

    Only the main thread may handle signals; in another one the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    wanted = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {signum: signal.signal(signum, request.handle) for signum in wanted}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
