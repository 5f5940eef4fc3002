"""The first signal is a request, the second one strikes at once, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from utils.signals import StopRequest, stop_on_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_sets_the_request(signum: signal.Signals) -> None:
    with stop_on_signals() as stop:
        assert not stop
        assert (stop.signum, stop.name) == (None, "")
        os.kill(os.getpid(), signum)
        assert stop
        assert (stop.signum, stop.name) == (signum, signum.name)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_interrupts_where_it_strikes(second: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert stop.name == "SIGTERM"


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_previous_handlers_come_back_however_it_ends(error: type[BaseException] | None) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) not in before
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_handled_and_nothing_fails() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[tuple[StopRequest, object]] = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((stop, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((stop, handler),) = seen
    assert not stop
    assert handler is before
