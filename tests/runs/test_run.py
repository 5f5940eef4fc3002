"""Run directories: unique ids, run.json from start to end, running or crashed, and finding a run by name."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from conftest import FORK, in_child

import train
from utils.runs import run as run_manager
from utils.runs.find import list_run_paths, resolve_run, resolve_runs
from utils.runs.lock import STALE_HEARTBEAT_SECONDS, lock_is_free
from utils.runs.run import (
    Run,
    RunError,
    RunLockedError,
    create_run_directory,
    read_record,
    read_status,
    run_ids,
)

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 1, 31, 14, 25, 1)


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A folder that every user can open, unlike those of pytest."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_nobody(action: Callable[[], object]) -> Any:
    """What `action` returns or raises in a process without the rights of root."""

    def give_up_rights() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

    return in_child(give_up_rights, action)


def make(runs_dir: Path, run_id: str, **facts: Any) -> Path:
    """Write a completed run."""
    path = runs_dir / run_id
    path.mkdir(parents=True)
    record = {"schema_version": 1, "id": run_id, "status": "completed", "start": f"2026-01-01T00:00:00.{run_id}"}
    (path / "run.json").write_text(json.dumps(record | facts))
    return path


def test_an_id_is_the_local_time_and_the_tag() -> None:
    assert next(run_ids(None, NOW)) == "20260131_142501"
    assert next(run_ids("base.line-1", NOW)) == "20260131_142501_base.line-1"
    before = datetime.now().replace(microsecond=0)
    made = datetime.strptime(next(run_ids()), "%Y%m%d_%H%M%S")
    assert before <= made <= datetime.now()


def test_further_ids_of_the_same_second_end_in_2_3_4() -> None:
    ids = run_ids("a", NOW)
    assert [next(ids) for _ in range(4)] == [f"20260131_142501_a{end}" for end in ("", "_2", "_3", "_4")]


def test_runs_of_the_same_second_and_tag_have_numbered_directories(runs_dir: Path) -> None:
    names = [create_run_directory(runs_dir, "a", NOW).name for _ in range(3)]
    assert names == ["20260131_142501_a", "20260131_142501_a_2", "20260131_142501_a_3"]
    assert create_run_directory(runs_dir, None, NOW).name == "20260131_142501"
    assert create_run_directory(runs_dir, None, NOW).name == "20260131_142501_2"
    assert all(not list(path.iterdir()) for path in runs_dir.iterdir())


@pytest.mark.parametrize("tag", ["a/b", "../a", "..", ".", "", "latest", "auto", "x" * 65, "a b", "a\0b"])
def test_a_bad_tag_is_refused_and_nothing_is_made(runs_dir: Path, tag: str) -> None:
    with pytest.raises(RunError, match="tag"):
        Run.create(runs_dir, tag)
    with pytest.raises(RunError, match="tag"):
        create_run_directory(runs_dir, tag)
    assert not runs_dir.exists()


def make_one(runs_dir: Path, barrier: Barrier) -> None:
    barrier.wait(60)
    create_run_directory(runs_dir, "same", NOW)


def test_50_processes_in_the_same_second_get_50_directories(runs_dir: Path) -> None:
    barrier = FORK.Barrier(50)
    processes = [FORK.Process(target=make_one, args=(runs_dir, barrier)) for _ in range(50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 50
    expected = {f"20260131_142501_same{end}" for end in ("", *(f"_{n}" for n in range(2, 51)))}
    assert {path.name for path in runs_dir.iterdir()} == expected


def test_a_new_run_has_its_record_notes_and_folders(runs_dir: Path) -> None:
    run = Run.create(runs_dir, "a", argv=["train.py", "--seed", "1"])
    record = json.loads((run.path / "run.json").read_text())
    assert record == run.record
    assert run.id == run.path.name == record["id"]
    assert re.fullmatch(r"\d{8}_\d{6}_a", run.id)
    facts = ("schema_version", "tag", "status", "argv", "pid", "host", "end", "exit_reason", "parent", "views")
    assert [record[key] for key in facts] == [
        *(1, "a", "running", ["train.py", "--seed", "1"], os.getpid(), socket.gethostname(), None, None, None, {})
    ]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record["start"])).total_seconds() < 60
    assert datetime.fromisoformat(record["start"]).utcoffset() is not None
    assert json.loads((run.path / "notes.json").read_text()) == {"tags": [], "note": "", "pinned": False}
    assert all((run.path / name).is_dir() for name in ("meta", "logs", "artifacts"))
    run.finish("completed")
    run.release()


def test_run_json_records_updates_and_the_end_of_the_run(runs_dir: Path) -> None:
    run = Run.create(runs_dir)
    run.update(last_step=5)
    run.update_view("aim", state="on")
    run.update_view("aim", hash="abc")
    run.update_view("tensorboard", state="off")
    assert read_status(run.path) == "running"
    assert read_record(run.path)["views"] == {"aim": {"state": "on", "hash": "abc"}, "tensorboard": {"state": "off"}}
    run.finish("interrupted", "SIGINT", summary={"val/loss": 2.5})
    assert not lock_is_free(run.path)
    run.release()
    record = read_record(run.path)
    assert [record[key] for key in ("status", "exit_reason", "last_step")] == ["interrupted", "SIGINT", 5]
    assert record["summary"] == {"val/loss": 2.5}
    assert datetime.fromisoformat(record["end"]) >= datetime.fromisoformat(record["start"])
    assert lock_is_free(run.path)
    assert sorted(path.name for path in run.path.iterdir()) == sorted(
        ["run.json", "notes.json", "lock", "meta", "logs", "artifacts"]
    )


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "diverged"])
def test_a_finished_status_is_final_whatever_the_lock_says(runs_dir: Path, status: Any) -> None:
    run = Run.create(runs_dir)
    run.finish(status, "why")
    run.release()
    assert read_status(run.path) == status
    (run.path / "lock").unlink()
    assert read_status(run.path) == status


def test_changing_the_returned_record_does_not_change_the_run(runs_dir: Path) -> None:
    run = Run.create(runs_dir)
    run.record["views"]["aim"] = {}
    assert run.record["views"] == {}
    run.finish("completed")
    run.release()


def test_a_failure_while_creating_leaves_nothing_behind(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_manager, "write_json", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*_a'"):  # an OSError, not a user error
        Run.create(runs_dir, "a")
    assert list(runs_dir.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 1), (errno.EROFS, 1), (errno.EACCES, 2)])
def test_a_full_or_read_only_disk_fails_with_1_and_missing_permission_with_2(
    number: int, status: int, tiny_argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_manager, "write_json", fail)
    assert train.main(tiny_argv()) == status


def test_a_record_that_is_not_json_leaves_nothing_behind(runs_dir: Path) -> None:
    with pytest.raises(TypeError):
        Run.create(runs_dir, "a", argv=object())
    assert list(runs_dir.iterdir()) == []


def test_an_argument_that_is_not_utf_8_is_recorded(runs_dir: Path) -> None:
    run = Run.create(runs_dir, "a", argv=["train.py", "--config", "\udcff.yaml"])  # a file name that is not UTF-8
    assert read_record(run.path)["argv"][2] == "\udcff.yaml"


def test_a_file_in_place_of_the_runs_folder_is_reported(runs_dir: Path) -> None:
    runs_dir.write_text("")
    with pytest.raises(RunError, match=r"cannot create a run directory in .*runs"):
        Run.create(runs_dir)


def test_a_read_only_runs_folder_is_reported(public_dir: Path) -> None:
    public_dir.chmod(0o555)
    for runs in (public_dir, public_dir / "new"):
        error = as_nobody(functools.partial(Run.create, runs, "a"))
        assert isinstance(error, RunError)
        assert str(error) == f"cannot create a run directory in {runs}: Permission denied"
    public_dir.chmod(0o755)
    assert list(public_dir.iterdir()) == []


def test_other_users_may_read_the_status_of_a_run(public_dir: Path) -> None:
    run = Run.create(public_dir / "runs", "a")
    assert as_nobody(lambda: read_status(run.path)) == "running"
    assert as_nobody(lambda: resolve_run("a", public_dir / "runs")) == run.path
    os.close(run._lock.fd)
    assert as_nobody(lambda: read_status(run.path)) == "crashed"


def test_a_run_whose_process_lost_its_lock_has_crashed(runs_dir: Path) -> None:
    run = Run.create(runs_dir)
    assert not lock_is_free(run.path)
    assert read_status(run.path) == "running"
    os.close(run._lock.fd)
    assert lock_is_free(run.path)
    assert read_status(run.path) == "crashed"
    (run.path / "lock").unlink()
    assert read_status(run.path) == "crashed"


def test_a_killed_process_leaves_a_run_that_has_crashed_at_once(runs_dir: Path) -> None:
    code = "import sys; from pathlib import Path; from utils.runs.run import Run\n"
    code += "print(Run.create(Path(sys.argv[1]), 'a').path, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(runs_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        path = Path(process.stdout.readline().strip())
        assert read_status(path) == "running"
        assert read_record(path)["pid"] == process.pid
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert read_status(path) == "crashed"
    assert read_record(path)["status"] == "running"  # the reader infers the crash


def test_a_run_on_another_host_is_judged_by_its_heartbeat(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.runs.run.HEARTBEAT_SECONDS", 1e9)
    run = Run.create(runs_dir, host="elsewhere")
    assert read_status(run.path) == "running"
    past = time.time() - STALE_HEARTBEAT_SECONDS
    os.utime(run.path / "lock", (past - 1, past - 1))
    assert read_status(run.path) == "crashed"
    os.utime(run.path / "lock", (past + 10, past + 10))
    assert read_status(run.path) == "running"
    (run.path / "lock").unlink()
    assert read_status(run.path) == "crashed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run directory: it has no run.json"),
        (b"", "cannot be read"),
        (b'{"status": "comp', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "is not the record of a run"),
        (b"{}", "is not the record of a run"),
    ],
)
def test_a_damaged_record_is_reported(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    for read in (read_record, read_status):
        with pytest.raises(RunError, match=message):
            read(tmp_path)


def test_runs_are_listed_by_start_then_id(runs_dir: Path) -> None:
    make(runs_dir, "20260103_000000", start="2026-01-01T09:00:00.000+00:00")  # its id is from a wrong clock
    make(runs_dir, "20260102_000000_b", start="2026-01-02T09:00:00.000+00:00")
    make(runs_dir, "20260102_000000_a", start="2026-01-02T09:00:00.000+00:00")
    (runs_dir / "no_run").mkdir()
    (runs_dir / ".gitkeep").touch()
    names = [path.name for path in list_run_paths(runs_dir)]
    assert names == ["20260103_000000", "20260102_000000_a", "20260102_000000_b"]
    assert list_run_paths(runs_dir / "nowhere") == []
    (runs_dir / names[-1]).rename(runs_dir / f".{names[-1]}.pruned")
    assert [path.name for path in list_run_paths(runs_dir)] == names[:-1]


@pytest.fixture
def five_runs(runs_dir: Path) -> Path:
    make(runs_dir, "20260101_000000_wide", tag="wide")
    make(runs_dir, "20260102_000000_wide", tag="wide")
    make(runs_dir, "20260103_000000_wider", tag="wider")
    make(runs_dir, "20260104_000000_deep", tag="deep")
    make(runs_dir, "20260105_000000")
    return runs_dir


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("20260103_000000_wider", "20260103_000000_wider"),
        ("20260101_000000_wide", "20260101_000000_wide"),  # an exact id, although a newer run has the tag
        ("20260105_000000", "20260105_000000"),
        ("latest", "20260105_000000"),
        ("wide", "20260102_000000_wide"),  # the newest with the exact tag, although "wider" contains it too
        ("deep", "20260104_000000_deep"),
        ("ider", "20260103_000000_wider"),
        ("20260104", "20260104_000000_deep"),
    ],
)
def test_a_run_is_found_by_id_latest_tag_or_part_of_an_id(five_runs: Path, name: str, run_id: str) -> None:
    assert resolve_run(name, five_runs) == five_runs / run_id


def test_a_path_takes_precedence_over_ids_and_tags(
    five_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = make(tmp_path, "wide", tag="other")
    assert resolve_run(str(elsewhere), five_runs) == elsewhere
    assert resolve_run(f"{five_runs}/20260104_000000_deep/", five_runs) == five_runs / "20260104_000000_deep"
    monkeypatch.chdir(tmp_path)
    assert resolve_run("wide", five_runs).resolve() == elsewhere
    (tmp_path / "deep").mkdir()  # a folder that is not a run is never found
    assert resolve_run("deep", five_runs).name == "20260104_000000_deep"


def test_the_name_of_a_sweep_stands_for_all_its_runs(runs_dir: Path) -> None:
    paths = []
    for number in (1, 2):
        sweep = {"name": "grid", "id": "a1", "number": number, "place": 0}
        paths.append(make(runs_dir, f"2026010{number}_000000_grid-{number}", tag=f"grid-{number}", sweep=sweep))
    assert resolve_runs("grid", runs_dir) == paths
    assert resolve_runs("grid-2", runs_dir) == paths[1:]
    with pytest.raises(RunError, match=r"^grid is a sweep of 2 runs: name one of them: 20260101_000000_grid-1"):
        resolve_run("grid", runs_dir)
    tagged = make(runs_dir, "20260103_000000_grid", tag="grid")
    assert resolve_runs("grid", runs_dir) == [tagged]


def test_an_exact_id_takes_precedence_over_an_equal_tag(five_runs: Path) -> None:
    make(five_runs, "20260106_000000_x", tag="20260101_000000_wide")
    assert resolve_run("20260101_000000_wide", five_runs).name == "20260101_000000_wide"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2026010", "run 2026010 is ambiguous, 5 ids contain it: 20260101_000000_wide, 20260102_000000_wide"),
        ("_wid", "run _wid is ambiguous, 3 ids contain it"),
        ("depe", "; did you mean deep?"),
        ("20260104_000000_dep", "; did you mean 20260104_000000_deep?"),
        ("zzz", "no run zzz in "),
        ("", "no run "),
        ("../runs/x", "no run ../runs/x in "),
        ("a\0b", "no run "),
        ("x" * 300, "no run xxx"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_unknown_or_ambiguous_run_is_reported_in_one_line(five_runs: Path, name: str, message: str) -> None:
    with pytest.raises(RunError) as caught:
        resolve_run(name, five_runs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["latest", "wide", "20260101"])
def test_an_empty_folder_of_runs_is_reported(runs_dir: Path, name: str) -> None:
    with pytest.raises(RunError, match=f"no run {name}: .*runs has no runs yet"):
        resolve_run(name, runs_dir)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"status": "running"}', '{"status": "x", "start": 5}', '{"status": "x", "tag": ["wide"]}']
    + ['{"status": "x", "start": null, "tag": null}', '{"status": 5, "host": []}', "[" * 100_000],
    ids=lambda content: content[:40],
)
def test_a_damaged_record_never_hides_the_good_runs(five_runs: Path, content: str) -> None:
    (five_runs / "20260109_000000_bad").mkdir()
    (five_runs / "20260109_000000_bad" / "run.json").write_text(content)
    assert resolve_run("wide", five_runs).name == "20260102_000000_wide"
    assert resolve_run("deep", five_runs).name == "20260104_000000_deep"
    assert resolve_run("latest", five_runs).name == "20260105_000000"
    assert resolve_run("20260104", five_runs).name == "20260104_000000_deep"
    assert len(list_run_paths(five_runs)) == 6


def test_a_record_that_is_a_folder_never_hides_the_good_runs(five_runs: Path) -> None:
    (five_runs / "20260109_000000_bad" / "run.json").mkdir(parents=True)
    assert resolve_run("wide", five_runs).name == "20260102_000000_wide"


# ------------------------------------------------------------------------------------- resuming a run


def ended(runs_dir: Path, status: Any = "interrupted", **facts: Any) -> Path:
    """A run whose lock was released; with status `running` it counts as crashed."""
    run = Run.create(runs_dir, "a", **facts)
    if status != "running":
        run.finish(status, "why", last_step=7)
    run.release()
    return run.path


def test_resuming_takes_the_lock_and_changes_no_record(runs_dir: Path) -> None:
    path = ended(runs_dir)
    before = (path / "run.json").read_bytes()
    run = Run.resume(path)
    assert (path / "run.json").read_bytes() == before
    assert (run.path, run.id, run.record) == (path, path.name, read_record(path))
    assert not lock_is_free(path)
    run.release()
    assert lock_is_free(path)


def test_a_resumed_run_is_running_again_and_records_how_it_ended_before(runs_dir: Path) -> None:
    path = ended(runs_dir, argv=["train.py"], pid=1, resolved={"dtype": "float32"})
    old = read_record(path)
    run = Run.resume(path)
    run.restart(["train.py", "--resume", "a"], 5, git={"commit": "abc"})
    assert read_status(path) == "running"
    record = read_record(path)
    assert [record[key] for key in ("status", "exit_reason", "end", "pid", "host")] == [
        *("running", None, None, os.getpid(), socket.gethostname())
    ]
    for key in ("start", "id", "argv", "resolved", "parent", "views"):
        assert record[key] == old[key]
    (session,) = record["resumes"]
    assert datetime.fromisoformat(session.pop("time")) >= datetime.fromisoformat(old["end"])
    assert session == {
        "step": 5,
        "argv": ["train.py", "--resume", "a"],
        "before": {key: old[key] for key in ("status", "exit_reason", "end", "last_step", "pid", "host")},
        "git": {"commit": "abc"},
    }
    assert session["before"]["exit_reason"] == "why"
    run.finish("completed")
    run.release()
    assert read_status(path) == "completed"


def test_a_resumed_run_records_that_it_had_crashed(runs_dir: Path) -> None:
    path = ended(runs_dir, "running")
    run = Run.resume(path)
    run.restart([], 0)
    run.release()
    (session,) = read_record(path)["resumes"]
    assert (session["before"]["status"], session["before"]["end"]) == ("crashed", None)


def test_each_session_is_kept_in_order(runs_dir: Path) -> None:
    path = ended(runs_dir)
    for step in (5, 9, 12):
        run = Run.resume(path)
        run.restart(["train.py", str(step)], step)
        run.finish("interrupted", f"stopped after {step}")
        run.release()
    sessions = read_record(path)["resumes"]
    assert [session["step"] for session in sessions] == [5, 9, 12]
    assert [session["before"]["exit_reason"] for session in sessions] == ["why", "stopped after 5", "stopped after 9"]


def test_a_record_without_the_field_resumes_can_be_resumed(runs_dir: Path) -> None:
    path = ended(runs_dir)
    record = read_record(path)
    del record["resumes"]
    (path / "run.json").write_text(json.dumps(record))
    run = Run.resume(path)
    run.restart([], 3)
    run.release()
    assert len(read_record(path)["resumes"]) == 1


def test_resuming_a_run_that_is_being_trained_is_refused_with_process_and_host(runs_dir: Path) -> None:
    first = Run.create(runs_dir, "a")
    before = (first.path / "run.json").read_bytes()
    for _ in range(3):
        with pytest.raises(RunLockedError) as caught:
            Run.resume(first.path)
        assert str(caught.value) == (
            f"run {first.id} is being trained by process {os.getpid()} on {socket.gethostname()}"
        )
    assert (first.path / "run.json").read_bytes() == before
    assert read_status(first.path) == "running"
    first.release()
    Run.resume(first.path).release()


def test_a_reader_that_briefly_holds_the_lock_does_not_block_resuming(runs_dir: Path) -> None:
    path = ended(runs_dir)
    with open(path / "lock") as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (glance, fcntl.LOCK_UN)).start()
        run = Run.resume(path)
    assert run.id == path.name
    run.release()


def test_a_second_resume_is_refused_as_well(runs_dir: Path) -> None:
    path = ended(runs_dir)
    run = Run.resume(path)
    with pytest.raises(RunLockedError):  # even before run.json names the process
        Run.resume(path)
    run.release()


def take_over(path: Path, barrier: Barrier, done: Barrier, queue: Any) -> None:
    barrier.wait(60)
    try:
        Run.resume(path)
        queue.put("taken")
    except RunLockedError:
        queue.put("refused")
    done.wait(60)


def test_only_one_of_many_processes_resumes_the_run(runs_dir: Path) -> None:
    path = ended(runs_dir)
    barrier, done, queue = FORK.Barrier(8), FORK.Barrier(8), FORK.SimpleQueue()
    processes = [FORK.Process(target=take_over, args=(path, barrier, done, queue)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(queue.get() for _ in range(8)) == ["refused"] * 7 + ["taken"]
    assert lock_is_free(path)


def test_a_run_on_another_host_is_not_resumed_while_its_heartbeat_is_fresh(runs_dir: Path) -> None:
    path = ended(runs_dir, "running", host="elsewhere", pid=5)
    with pytest.raises(RunLockedError, match=f"run {path.name} is being trained by process 5 on elsewhere"):
        Run.resume(path)
    past = time.time() - STALE_HEARTBEAT_SECONDS - 1
    os.utime(path / "lock", (past, past))
    run = Run.resume(path)
    run.restart([], 3)
    assert read_record(path)["host"] == socket.gethostname()
    assert read_status(path) == "running"
    run.release()


def test_a_run_without_its_lock_file_can_be_resumed(runs_dir: Path) -> None:
    path = ended(runs_dir)
    (path / "lock").unlink()
    run = Run.resume(path)
    assert not lock_is_free(path)
    run.release()


def test_a_folder_that_is_not_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        Run.resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_user_cannot_be_resumed(public_dir: Path) -> None:
    path = ended(public_dir / "runs")
    error = as_nobody(functools.partial(Run.resume, path))
    assert isinstance(error, RunError)
    assert str(error) == f"{path}: the run cannot be resumed: Permission denied"
    assert lock_is_free(path)
