"""The lock of a run where flock does not help: other machines, machines that died, file systems without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from conftest import FORK
from fake_runs import make_run

import train
from utils import locks
from utils.errors import UserError
from utils.experiments.notes import edit
from utils.experiments.prune import plan_pruning, remove_all
from utils.files import change_json
from utils.locks import LOCK_FILE, RELEASED, Holder, boot_id, folder_lock
from utils.runs import lock
from utils.runs.layout import LOCK, METRICS_LOG, RECORD
from utils.runs.lock import holder_of, lock_is_free
from utils.runs.origin import resumable_runs
from utils.runs.run import Run, RunLockedError, read_record, read_status

ELSEWHERE = "5 elsewhere another-boot\n"
HOST = socket.gethostname()


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> float:
    """The silence in seconds after which a process on another machine counts as dead."""
    monkeypatch.setattr(lock, "STALE_HEARTBEAT_SECONDS", 0.3)
    return 0.3


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def flock(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def crashed_elsewhere(runs_dir: Path, run_id: str = "run", **facts: Any) -> Path:
    """A run whose process on another machine was alive a moment ago."""
    path = make_run(runs_dir, run_id, **{"status": "running", "host": "elsewhere", "pid": 5, "tag": "a", **facts})
    (path / LOCK).write_text(ELSEWHERE)
    return path


# ------------------------------------------------------------------------------------------------- another machine


@pytest.mark.parametrize("clock", [0.0, 3600.0])  # a disk whose clock is an hour ahead
def test_a_run_of_another_machine_is_continued_after_a_silence(
    runs_dir: Path, short_silence: float, clock: float
) -> None:
    path = crashed_elsewhere(runs_dir)
    os.utime(path / LOCK, (time.time() + clock,) * 2)
    lines: list[str] = []
    began = time.monotonic()
    run = Run.resume(path, lines.append)
    assert time.monotonic() - began >= short_silence - 0.1
    said = (
        "run: process 5 on elsewhere gave its last sign of life 0 s ago; if it gives none in the next 0 s, it has died,"
    )
    assert lines == [f"{said} and this process continues the run"]
    assert holder_of(path) == (os.getpid(), HOST, boot_id())
    run.release()


def test_a_live_process_on_another_machine_keeps_its_run(runs_dir: Path, short_silence: float) -> None:
    path, ended = crashed_elsewhere(runs_dir), threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunLockedError, match="run run is being trained by process 5 on elsewhere"):
        Run.resume(path, lambda line: None)
    ended.set()
    thread.join()
    assert (path / LOCK).read_text() == ELSEWHERE


def test_resuming_waits_for_a_process_elsewhere_that_closes_its_trackers(runs_dir: Path, short_silence: float) -> None:
    path = crashed_elsewhere(runs_dir, status="interrupted")
    with pytest.raises(RunLockedError):
        Run.resume(path)
    assert plan_pruning(runs_dir, unfinished=True).kept == {"run": "running"}
    timers = [
        threading.Timer(0.1, os.utime, [path / LOCK]),
        threading.Timer(0.2, (path / LOCK).write_text, [f"5 elsewhere {RELEASED}\n"]),
    ]
    for timer in timers:
        timer.start()
    Run.resume(path, lambda line: None).release()
    assert not timers[1].is_alive()


def test_a_run_that_was_released_elsewhere_is_free_at_once(runs_dir: Path) -> None:
    path = make_run(runs_dir, "run", status="interrupted", host="elsewhere")
    (path / LOCK).write_text(f"5 elsewhere another-boot {RELEASED}\n")
    Run.resume(path).release()
    assert (path / LOCK).read_text() == f"{os.getpid()} {HOST} {boot_id()} released\n"


def test_a_lock_of_another_boot_counts_as_that_of_another_machine(runs_dir: Path, short_silence: float) -> None:
    path = crashed_elsewhere(runs_dir, host=HOST)
    (path / LOCK).write_text(f"{os.getpid()} {HOST} another-boot\n")
    assert read_status(path) == "running"
    Run.resume(path, lambda line: None).release()


def test_time_after_the_last_sign_of_life_does_not_count_as_training(runs_dir: Path) -> None:
    path = make_run(runs_dir, "run", status="running", end=None, start="2026-01-31T14:25:01.000+00:00")
    (path / LOCK).write_text(f"1 {HOST}\n")
    os.utime(path / LOCK, (1769869501 + 30,) * 2)
    run = Run.resume(path)
    run.restart([], 1)
    run.release()
    assert read_record(path)["seconds"] == 30


def test_resume_auto_waits_for_a_run_of_another_machine_and_starts_no_other(
    tiny_argv: Callable[..., list[str]],
    only_run: Callable[[], Path],
    short_silence: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = tiny_argv("--run-tag", "job", "--resume", "auto")
    assert train.main([*command, "--stop-at-step", "4"]) == 0
    path = only_run()
    change_json(path / RECORD, lambda record: {**record, "status": "running", "host": "elsewhere"})
    (path / LOCK).write_text(ELSEWHERE)
    os.utime(path / LOCK, (time.time() + 60,) * 2)  # starting may take longer than `short_silence`
    assert resumable_runs(path.parent, "job") == [path]
    assert train.main(command) == 0
    assert only_run() == path  # no other run was made
    record = read_record(path)
    assert (record["status"], record["last_step"], record["resumes"][-1]["step"]) == ("completed", 6, 4)
    assert "process 5 on elsewhere gave its last sign of life" in capsys.readouterr().out


def test_resume_auto_skips_a_run_that_this_machine_is_training(runs_dir: Path) -> None:
    run, lines = Run.create(runs_dir, "a"), list[str]()
    assert resumable_runs(runs_dir, "a", lines.append) == []
    assert lines == [f"{run.id} is not resumed: it is being trained by process {os.getpid()} on {HOST}"]
    run.release()


@pytest.mark.parametrize("length", range(1, len(HOST) + 8))
def test_a_truncated_signature_is_ignored(length: int, runs_dir: Path) -> None:
    """A host name or boot id that was cut short would otherwise look like that of another machine."""
    path = make_run(runs_dir, "run", status="interrupted")
    (path / LOCK).write_text(f"5 {HOST} {boot_id()}"[:length])
    assert holder_of(path) is None
    Run.resume(path).release()
    assert (path / LOCK).read_text() == f"{os.getpid()} {HOST} {boot_id()} {RELEASED}\n"


# --------------------------------------------------------------------------------------------------- without flock


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_run_is_held_until_it_is_released(runs_dir: Path) -> None:
    run = Run.create(runs_dir, "a")
    assert not run.has_flock
    assert not lock_is_free(run.path)
    with pytest.raises(RunLockedError, match=f"is being trained by process {os.getpid()} on {HOST}"):
        Run.resume(run.path)
    edit(run.path, note="text")
    run.finish("interrupted")
    assert plan_pruning(runs_dir, unfinished=True).kept == {run.id: "running"}
    run.release()
    assert lock_is_free(run.path)
    again = Run.resume(run.path)
    again.restart([], 3)
    assert read_status(run.path) == "running"
    again.finish("completed")
    again.release()
    assert sorted(os.listdir(run.path)) == ["artifacts", "lock", "logs", "meta", "notes.json", "run.json"]


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_killed_process_leaves_a_crashed_run_that_can_be_resumed(runs_dir: Path) -> None:
    def work() -> None:
        Run.create(runs_dir, "a")
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=work)
    process.start()
    process.join()
    (path,) = runs_dir.iterdir()
    assert read_status(path) == "crashed"
    run = Run.resume(path)
    assert holder_of(path) == (os.getpid(), HOST, boot_id())
    run.release()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_newer_process_with_the_same_id_is_not_the_holder(runs_dir: Path) -> None:
    path = make_run(runs_dir, "run", status="running")
    (path / LOCK).write_text(f"{os.getpid()} {HOST} {boot_id()}\n")
    assert read_status(path) == "running"
    before = psutil.Process().create_time() - 60
    os.utime(path / LOCK, (before, before))
    assert read_status(path) == "crashed"


@pytest.mark.usefixtures("no_flock")
def test_without_flock_another_machine_is_judged_by_its_heartbeat(runs_dir: Path, short_silence: float) -> None:
    path = crashed_elsewhere(runs_dir)
    with pytest.raises(RunLockedError, match="process 5 on elsewhere"):
        Run.resume(path)
    Run.resume(path, lambda line: None).release()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_prune_deletes_what_nobody_holds(runs_dir: Path) -> None:
    path = make_run(runs_dir, "run", checkpoints={1: 10})
    (removal,) = plan_pruning(runs_dir, whole_runs=True).removals
    (path / LOCK).write_text(f"{Holder.this().signature}\n")
    assert remove_all([removal]) == {removal: "another process holds its lock"}
    (path / LOCK).write_text("")
    assert remove_all([removal]) == {}
    assert list(runs_dir.iterdir()) == []


@pytest.mark.usefixtures("no_flock")
def test_without_flock_training_warns_once(
    tiny_argv: Callable[..., list[str]], only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--max-iters", "2", "--sample-tokens", "0")) == 0
    path = only_run()
    assert capsys.readouterr().out.count("this file system has no flock") == 1
    assert (path / METRICS_LOG).stat().st_size
    assert holder_of(path) is None


def count_to(path: Path, times: int) -> None:
    for _ in range(times):
        change_json(path, lambda value: (value or 0) + 1)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_no_change_is_lost(tmp_path: Path) -> None:
    processes = [FORK.Process(target=count_to, args=(tmp_path / "a.json", 25)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert json.loads((tmp_path / "a.json").read_text()) == 100
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)


@pytest.mark.usefixtures("no_flock", "short_wait")
@pytest.mark.parametrize("content", ["", "rubbish", "5 elsewhere boot", f"4194304000 {HOST} {boot_id()}"])
def test_without_flock_the_lock_of_a_dead_process_is_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    count_to(tmp_path / "a.json", 1)
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.usefixtures("no_flock", "short_wait")
def test_without_flock_a_lock_that_is_never_released_is_reported(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run")
    with folder_lock(run), pytest.raises(UserError, match=f"process {os.getpid()} on {HOST} holds its lock"):
        edit(run, note="text")
    edit(run, note="text")


def test_another_failure_of_flock_is_not_taken_for_missing_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), folder_lock(tmp_path):
        pass
