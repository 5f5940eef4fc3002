"""A run whose process was killed while its trackers closed is listed as such, and can be finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import held_lock, make_run

import experiments
import train
from utils.runs.index import read_run
from utils.runs.layout import CURVES, LOGS, METRIC_REGISTRY, METRICS_LOG, MODEL_SUMMARY, NOTES, SEAL, fed_note
from utils.runs.run import read_record

pytestmark = pytest.mark.usefixtures("warm_processes")
Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]


def test_a_run_killed_while_it_closed_can_be_finished(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(ROOT / "tests" / "killed_training.py")
    result = subprocess.run([sys.executable, program, "closing", "0", *tiny_argv()], capture_output=True, timeout=120)
    assert result.returncode == -signal.SIGKILL
    run = only_run()
    words = ["--runs-dir", str(run.parent)]
    assert read_record(run)["status"] == "completed"
    hint = f"python experiments.py finish {run.name}"
    for command in (["list"], ["show", run.name]):
        assert experiments.main([*command, *words]) == 0
        assert hint in capsys.readouterr().out
    assert experiments.main(["finish", run.name, *words]) == 0
    assert (run / CURVES).is_file()
    assert read_record(run)["views"]["tensorboard"]["state"] == "complete"
    assert read_run(run).problem is None
    assert experiments.main(["check", run.name, *words]) == 0


def test_a_run_that_is_still_closing_is_not_reported_as_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", views={"tensorboard": {"state": "on"}}, metrics=[{"step": 1}])
    assert "finish" in str(read_run(run).problem)
    with held_lock(run):
        assert read_run(run).problem is None


def test_a_run_that_cannot_be_finished_is_not_sealed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "run", views={"tensorboard": {"state": "on"}})
    (run / METRICS_LOG).unlink(missing_ok=True)
    assert experiments.main(["finish", "run", "--runs-dir", str(tmp_path)]) == 2
    assert "is missing" in capsys.readouterr().err
    assert not (run / SEAL).exists()


def test_a_run_that_has_not_ended_cannot_be_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "run", status="running")
    assert experiments.main(["finish", "run", "--runs-dir", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err


def folder(path: Path) -> None:
    path.mkdir()


def nonsense(path: Path) -> None:
    path.write_bytes(b'{"tags": \xff')


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


def wrong_types(path: Path) -> None:
    path.write_text('[{"tags": 1, "offsets": 2}]')


AUXILIARY = (  # files that training does not need
    NOTES,
    METRIC_REGISTRY,
    MODEL_SUMMARY,
    SEAL,
    CURVES,
    LOGS / "train.log",
    fed_note("tensorboard"),
)


@pytest.mark.parametrize("spoil", [folder, nonsense, loop, nested, wrong_types])
def test_damaged_auxiliary_files_do_not_prevent_a_resume(
    spoil: Callable[[Path], None], tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tag = ("--run-tag", "one")
    assert train.main(tiny_argv(*tag, "--stop-at-step", "3")) == 0
    run = only_run()
    for name in AUXILIARY:
        (run / name).unlink(missing_ok=True)
        spoil(run / name)
    assert train.main(tiny_argv(*tag, "--resume", "auto")) == 0
    assert only_run() == run
    record = read_record(run)
    assert (record["status"], record["last_step"]) == ("completed", 6)
    assert record["views"]["tensorboard"]["state"] == "complete"
    assert "notes.json.damaged" in capsys.readouterr().out
    assert json.loads((run / NOTES).read_text())["pinned"] is True
    assert read_run(run).problem is None


@pytest.mark.parametrize("spoil", [folder, nonsense, loop, nested, wrong_types])
def test_damaged_auxiliary_files_do_not_prevent_a_rebuild(
    spoil: Callable[[Path], None], tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv()) == 0
    run = only_run()
    for name in AUXILIARY:
        (run / name).unlink(missing_ok=True)
        spoil(run / name)
    assert experiments.main(["rebuild", str(run)]) == 0
    assert "notes.json.damaged" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["not json", '{"step": 1}', '{"time": 1.0}', "[1]", '{"step": "x", "time": 1}'])
def test_a_rebuild_reports_a_damaged_line_with_its_number(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "run", settings={"aim_logging": False})
    (run / LOGS / "metrics.jsonl").write_text(f'{{"step":0,"time":1.0,"val/loss":3.0}}\n{line}\n')
    assert experiments.main(["rebuild", "run", "--tensorboard", "--runs-dir", str(tmp_path)]) == 1
    assert "logs/metrics.jsonl:2: the log is damaged: this line is not a record" in capsys.readouterr().err
