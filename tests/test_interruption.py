"""Real signals to a real process: the status, the logs and the views that it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, wait_until_trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.runs.log import read_metrics
from utils.runs.run import read_record, read_status

DEADLINE_SECONDS = 60.0


@pytest.fixture
def training(train_command: Callable[..., list[str]], runs_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process in the middle of an endless training, and its run directory."""
    flags = ("--max-iters", "1000000", "--eval-interval", "1000000", "--flush-interval", "5")
    process = subprocess.Popen(train_command(*flags), stdout=subprocess.DEVNULL)
    try:
        run = wait_until_trained(process, runs_dir)
        yield process, run
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize(("signum", "exit_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_after_the_step(
    signum: signal.Signals, exit_status: int, training: tuple[subprocess.Popen[bytes], Path]
) -> None:
    process, run = training
    assert read_status(run) == "running"
    process.send_signal(signum)
    assert process.wait(timeout=DEADLINE_SECONDS) == exit_status
    record = read_record(run)
    assert (record["status"], record["exit_reason"]) == ("interrupted", signum.name)
    losses = read_metrics(run / "logs", "train/loss")
    assert [step for step, _ in losses] == list(range(record["last_step"]))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(s, pytest.approx(v)) for s, v in losses]


def test_sigkill_is_seen_as_crashed_at_once(training: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, run = training
    process.kill()
    process.wait(timeout=DEADLINE_SECONDS)
    assert read_record(run)["status"] == "running"
    assert read_status(run) == "crashed"


@pytest.mark.usefixtures("warm_processes")
def test_sigterm_stops_a_waiting_start(tiny_argv: Callable[..., list[str]], only_run: Callable[[], Path]) -> None:
    """Before the first step there is nothing to finish: the first signal stops at once."""
    reader, writer = os.pipe()
    program = str(ROOT / "tests" / "troubled_training.py")
    process = subprocess.Popen(
        [sys.executable, program, "wait", "0", *tiny_argv()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        env={**os.environ, "PAUSE_FD": str(writer)},
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as paused:
            assert paused.readline() == "paused\n"
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert read_status(only_run()) == "interrupted"
