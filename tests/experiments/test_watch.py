"""experiments.py watch: the display while a run trains and when it ends."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_runs import held_lock, log_lines, make_run, training_records

import experiments
from utils.errors import UserError
from utils.experiments.watch import Watch, watch
from utils.runs.log import METRICS_FILE
from utils.terminal.console import PrintableConsole


def watched(path: Path, *, terminal: bool, looks: int = 3) -> tuple[str, str]:
    """Watch a run that makes 10 steps before each of the looks and then ends; returns the output and its status."""
    console = PrintableConsole(
        file=io.StringIO(), force_terminal=terminal, width=80, height=24, color_system=None, legacy_windows=False
    )
    records = training_records([3.0, 2.5, 2.25, 2.125, 2.0])
    with ExitStack() as stack:
        stack.enter_context(held_lock(path))
        seconds = []

        def sleep(wait: float) -> None:
            seconds.append(wait)
            log = path / "logs" / METRICS_FILE
            log.write_text(log_lines(records[: len(seconds)]))
            if len(seconds) == looks:
                record = json.loads((path / "run.json").read_text())
                (path / "run.json").write_text(json.dumps(record | {"status": "completed"}))
                stack.close()

        run = watch(Watch(path), console, 0.5, sleep)
    assert min(seconds) >= 0.5
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), run.status


def test_the_curves_grow_until_the_run_ends(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", tag="hello", status="running")
    shown, status = watched(path, terminal=True)
    assert status == "completed"
    assert "nothing is logged yet" in shown
    assert "hello  running  step 10  val/loss 2.5000" in shown
    assert "⠒⠒ val/loss" in shown  # a terminal without colours


def test_without_a_terminal_a_line_is_printed_now_and_then(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", tag="hello", status="running")
    shown, _ = watched(path, terminal=False)
    assert shown.count("\n") == 1  # ten seconds have not passed
    assert shown.startswith("hello  running")


@pytest.mark.parametrize(
    ("status", "expected"), [("completed", 0), ("interrupted", 0), ("diverged", 1), ("running", 1)]
)
def test_a_run_that_has_ended_is_drawn_once(
    status: str, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "run", status=status, metrics=training_records([3.0, 2.5]))
    assert experiments.main(["watch", "run", "--runs-dir", str(tmp_path)]) == expected
    out = capsys.readouterr().out
    assert ("crashed" if status == "running" else status) in out
    assert out.count("val/loss") == 3  # in the line, above the picture and in the legend
    assert "train/loss" not in out  # it was not logged
    assert experiments.main(["watch", "run", "--runs-dir", str(tmp_path), "--json"]) == expected
    assert json.loads(capsys.readouterr().out)["run"] == "run"


def test_a_run_that_failed_before_its_first_loss_has_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "run", status="failed", metrics=[])
    assert experiments.main(["watch", "run", "--runs-dir", str(tmp_path)]) == 1
    assert "failed" in (out := capsys.readouterr().out)
    assert "no finite loss in its log" in out


def test_a_run_that_is_deleted_while_it_is_watched_is_said_to_be_gone(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", status="running", metrics=training_records([3.0, 2.0]))
    shown = Watch(path)
    with held_lock(path):
        assert shown.refresh()
        shutil.rmtree(path)
    assert not shown.refresh()
    assert "damaged: it is gone: no such run directory" in shown.line


def test_val_loss_is_smoothed_where_it_is_the_metric_that_was_asked_for(tmp_path: Path) -> None:
    records = [{**record, "train/loss": record["val/loss"]} for record in training_records([4.0, 1.0])]
    path = make_run(tmp_path, "run", metrics=records)
    lines = []
    for metrics in (["val/loss"], ["train/loss", "val/loss"]):
        shown = Watch(path, metrics, smooth=0.5)
        watch(shown, None)
        lines.append(shown.line)
    assert "  val/loss 2.0000" in lines[0]
    assert "  train/loss 2.0000  val/loss 1.0000" in lines[1]


def test_a_metric_that_was_never_logged_is_an_error_once_the_run_has_ended(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", metrics=training_records([3.0]))
    with pytest.raises(UserError, match="no run has logged val/los; did you mean val/loss"):
        watch(Watch(path, ["val/los"]), None)
