"""Signals: the first is a request, the second interrupts at once, and the handlers are restored; and the time limit."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from utils.machine import signals
from utils.machine.signals import Deadline, StopRequest, stop_on_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_sets_the_request(signum: signal.Signals) -> None:
    with stop_on_signals() as stop:
        assert not stop
        assert (stop.signum, stop.reason) == (None, None)
        os.kill(os.getpid(), signum)
        assert stop
        assert (stop.signum, stop.reason) == (signum, signum.name)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_interrupts_at_once(second: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert stop.reason == "SIGTERM"


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_second_sighup_does_not_interrupt(first: signal.Signals) -> None:
    """A terminal that is closed sends it twice, from its shell and from the kernel."""
    with stop_on_signals() as stop:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.signum, stop.reason) == (first, first.name)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_previous_handlers_are_restored_however_the_block_ends(error: type[BaseException] | None) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) not in before
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_handles_no_signals_and_does_not_fail() -> None:
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


def test_sigusr1_requests_a_checkpoint_and_not_a_stop() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.save
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)  # any number of times
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_the_first_reason_to_stop_counts() -> None:
    stop = StopRequest()
    stop.stop("max_minutes are over")
    stop.stop("another")
    assert stop.reason == "max_minutes are over"
    assert stop.signum is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.monotonic, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def test_the_deadline_is_near_if_another_step_and_the_reserve_do_not_fit(clock: list[float]) -> None:
    deadline = Deadline(minutes=1.0)
    clock[0] += 10  # a slow start is not a step
    deadline.step_done()
    assert not deadline.is_near(reserve=49)
    clock[0] += 20  # a step of 20 s: 30 s are left
    deadline.step_done()
    assert not deadline.is_near(reserve=9)
    assert deadline.is_near(reserve=11)
    assert deadline.seconds_left == 30
    clock[0] += 5  # a shorter step; the longest one counts
    deadline.step_done()
    assert not deadline.is_near(reserve=4)
    assert deadline.is_near(reserve=6)


def test_asking_whether_the_deadline_is_near_changes_no_later_answer(clock: list[float]) -> None:
    deadline = Deadline(minutes=1.0)
    deadline.step_done()
    clock[0] += 10
    assert not deadline.is_near(reserve=0)
    clock[0] += 10  # this step has taken 20 s, and the next may too; 20 s are left after that
    assert not deadline.is_near(reserve=19)
    assert deadline.is_near(reserve=21)


def test_time_while_the_process_was_suspended_does_not_count_as_a_step(clock: list[float]) -> None:
    deadline, calls = Deadline(minutes=2.0), []
    with stop_on_signals() as stop:
        stop.on_continue += [deadline.continued, lambda: calls.append(1)]
        os.kill(os.getpid(), signal.SIGCONT)  # before the first step there is nothing to correct
        deadline.step_done()
        clock[0] += 1
        deadline.step_done()
        clock[0] += 45  # suspended in the middle of a step
        os.kill(os.getpid(), signal.SIGCONT)
        assert not deadline.is_near(reserve=70)
        clock[0] += 2
        deadline.step_done()
    assert not deadline.is_near(reserve=69)  # 72 s are left, and a step takes 2
    assert deadline.is_near(reserve=71)
    assert len(calls) == 2
    assert not stop
    os.kill(os.getpid(), signal.SIGCONT)  # no longer handled
    assert len(calls) == 2


def test_without_a_limit_no_deadline_is_near(clock: list[float]) -> None:
    deadline = Deadline(None)
    deadline.step_done()
    clock[0] += 1e9
    deadline.step_done()
    assert not deadline.is_near(reserve=1e9)
    assert deadline.seconds_left is None
