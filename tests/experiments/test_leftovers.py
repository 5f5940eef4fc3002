"""Files left by killed processes: prune removes them, and a killed reproduce leaves none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_runs import held_lock, make_run, write

import experiments

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 30.0


def make_leftovers(runs_dir: Path, run: Path) -> list[Path]:
    """Write leftovers of 100 bytes each."""
    return [
        write(path, b"x" * 100)
        for path in (
            runs_dir / ".gone.pruned" / "artifacts" / "model",
            runs_dir / ".models.json.abc.tmp",
            run / ".run.json.abc.tmp",
            run / "meta" / ".git.txt.abc.tmp",
            run / "logs" / ".fed_aim.json.abc.tmp",
            run / "artifacts" / ".checkpoints.pruned" / "step_000001" / "model",
            run / "artifacts" / ".seal.json.abc.tmp",
            run / "artifacts" / "checkpoints" / ".step_000002.tmp" / "model",
            run / "artifacts" / "checkpoints" / ".step_000001.old" / "model",
        )
    ]


def test_prune_counts_and_removes_what_killed_processes_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "run", checkpoints={3: 1000})
    left = make_leftovers(tmp_path, run)
    words = ["prune", "--keep-last", "1", "--runs-dir", str(tmp_path)]
    assert experiments.main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] == 100 * len(left)
    assert all(path.exists() for path in left)
    assert experiments.main([*words, "--yes"]) == 0
    assert not any(path.exists() for path in left)
    assert ".gone.pruned" in capsys.readouterr().out
    assert (run / "artifacts" / "checkpoints" / "step_000003").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_prune_leaves_the_files_that_a_training_is_writing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    left = make_leftovers(tmp_path, run)
    with held_lock(run):
        assert experiments.main(["prune", "--keep-last", "1", "--yes", "--runs-dir", str(tmp_path)]) == 0
    assert [path.exists() for path in left] == [False, False, *[True] * (len(left) - 2)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_killing_a_watched_process_ends_its_child_and_removes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    code = "import subprocess, sys, time; from pathlib import Path; from utils.machine.watchdog import watched\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += "with watched(child.pid, Path(sys.argv[1])): print(child.pid, flush=True); time.sleep(600)\n"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + WAIT_SECONDS
    while (is_alive(child) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    assert not folder.exists()
