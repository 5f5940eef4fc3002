"""Pipes, devices, links, folders or nonsense in place of the files of a run: nothing hangs or hides the good runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import make_run, training_records, write

import experiments
from utils.files import is_regular, open_regular, read_json
from utils.formats.hub_weights import note_of, noted
from utils.runs.find import parent_path
from utils.runs.log import RunLogError, last_record, read_lines, read_records
from utils.runs.run import Run, RunError

ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECONDS = 20.0


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 36)


HOSTILE: list[Callable[[Path], None]] = [pipe, endless, loop, folder, nested, sparse]
END = "== the answer ends ==\n"
ONE_BY_ONE = f"""\
import json, sys
import experiments
for words in json.loads(sys.argv[1]):
    if status := experiments.main(words):
        sys.exit(status)
    print({END!r}, end="", flush=True)
"""  # all commands in one process, because starting it takes most of the time
NAMES = ("run.json", "notes.json", "lock", "meta/full_config.json", "logs/metrics.jsonl", "meta/metrics.json")


@pytest.mark.parametrize("make", HOSTILE)
def test_reading_a_hostile_json_file_fails_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.json")
    with pytest.raises((OSError, ValueError)):
        read_json(tmp_path / "a.json")


def test_a_link_may_lead_to_a_file_of_the_run_but_not_out_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "logs" / "real.json", 1)
    write(tmp_path / "outside.json", 2)
    (run / "inside.json").symlink_to(run / "logs" / "real.json")
    (run / "out.json").symlink_to(tmp_path / "outside.json")
    (run / "meta").symlink_to(tmp_path)
    assert read_json(run / "inside.json", run) == 1
    for name in ("out.json", "meta/outside.json"):
        with pytest.raises(PermissionError, match="leads out of"):
            open_regular(run / name, run)
    (tmp_path / "moved").symlink_to(run)  # for example a run on another disk
    assert is_regular(tmp_path / "moved" / "logs" / "real.json", tmp_path / "moved")


def test_an_endless_line_is_not_read_into_memory(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "metrics.jsonl"
    log.parent.mkdir()
    sparse(log)
    for read in (read_lines, last_record):
        with pytest.raises(RunLogError, match="a line of more than 16 MiB"):
            read(log)


def test_a_damaged_line_is_reported_with_its_number(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "metrics.jsonl"
    write(log, '{"step":0}\n{"step":1}\n[]\n')
    with pytest.raises(RunLogError, match=r"metrics\.jsonl:3: the log is damaged"):
        list(read_records(log))


@pytest.mark.parametrize("make", HOSTILE)
def test_no_hostile_file_hides_the_good_runs(make: Callable[[Path], None], tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        run = make_run(tmp_path, f"bad_{number}", metrics=training_records([3.0, 2.0]))
        (run / name).unlink(missing_ok=True)
        make(run / name)
    make_run(tmp_path, "good", metrics=training_records([3.0, 2.0]))
    commands = (
        ("list",),
        ("show", "good"),
        ("sql", "SELECT run, count(*) AS n FROM metrics WHERE run = 'good' GROUP BY run"),
        ("prune", "--keep-last", "1"),
    )
    words = json.dumps([[*command, "--runs-dir", str(tmp_path), "--json"] for command in commands])
    result = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=len(commands) * ANSWER_SECONDS,
    )
    assert "Traceback" not in result.stderr
    *answers, rest = result.stdout.split(END)
    assert (len(answers), rest, result.returncode) == (len(commands), "", 0), result.stderr
    for command, answer in zip(commands, answers, strict=True):
        assert "good" in answer or command[0] == "prune", (command, result.stderr)


@pytest.mark.parametrize("make", HOSTILE)
def test_what_a_run_calls_its_parent_is_read_like_a_file_of_a_run(make: Callable[[Path], None], tmp_path: Path) -> None:
    parent = {"run": "gone", "path": str(tmp_path / "there"), "step": 3, "relation": "init", "export": "0123"}
    run = make_run(tmp_path / "runs", "child", parent=parent)
    (tmp_path / "there").mkdir()
    make(tmp_path / "there" / "config.json")
    with pytest.raises(RunError, match="neither beside it"):
        parent_path(run, parent)


@pytest.mark.parametrize("make", HOSTILE)
def test_a_note_of_a_download_is_read_like_a_file_of_a_run(make: Callable[[Path], None], tmp_path: Path) -> None:
    note = note_of(tmp_path, "config.json")
    note.parent.mkdir(parents=True)
    make(note)
    assert noted(tmp_path, "config.json") == (None, None)


def test_a_log_that_is_not_json_does_not_hide_the_others_from_sql(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = make_run(tmp_path, "bad")
    write(bad / "logs" / "metrics.jsonl", bytes(17 << 20))
    make_run(tmp_path, "good", metrics=training_records([3.0, 2.0]))
    query = "SELECT DISTINCT run FROM metrics"
    assert experiments.main(["sql", query, "--runs-dir", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [{"run": "good"}]
    assert "bad" in captured.err


@pytest.mark.parametrize("content", ["{", "[]", '{"m": [{"run": 1}], "fine": [{"version": 1, "run": "good"}]}'])
def test_a_damaged_models_json_hides_no_run(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "good", metrics=training_records([3.0]))
    write(tmp_path / "models.json", content)
    assert experiments.main(["show", "good", "--runs-dir", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["promoted"] == (["fine@v1"] if "fine" in content else [])


@pytest.mark.parametrize(
    "name",
    ["lock", "logs", "logs/train.log", "logs/metrics.jsonl", "meta", "artifacts", "artifacts/checkpoints", "x/y"],
)
def test_nothing_is_written_through_a_link_that_leads_out_of_a_run(tmp_path: Path, name: str) -> None:
    run = Run.create(tmp_path / "runs")
    run.finish("interrupted")
    run.release()
    place = run.path / name
    outside = tmp_path / "outside"
    if place.exists():
        place.rename(outside)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside)
    before = run.path.joinpath("run.json").read_bytes()
    with pytest.raises(RunError, match=f"{name} is a link that leads out of the run, to {outside}"):
        Run.resume(run.path)
    assert run.path.joinpath("run.json").read_bytes() == before
    assert not outside.is_file() or not outside.read_bytes().count(b"\n") > 1


def test_links_within_a_run_and_a_run_that_is_a_link_may_be_resumed(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs")
    run.finish("interrupted")
    run.release()
    big = tmp_path / "big"
    run.path.rename(big)
    run.path.symlink_to(big)
    (big / "inside").symlink_to("meta")
    (big / "logs" / "wandb").mkdir()
    (big / "logs" / "wandb" / "latest-run").symlink_to("/where/it/was")
    again = Run.resume(run.path)
    assert again.path == run.path
    again.release()
