"""The index of runs: the content of a row, and damaged entries, which neither raise nor hide the good ones."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_runs import PARENT, held_lock, indexed, make_run, record_of, training_records, write

from utils.errors import UserError
from utils.experiments.sql import RunDatabase
from utils.runs.identity import code_identity, differing_settings, non_default_settings
from utils.runs.index import DAMAGED, FACTS, IndexedRun, read_index, read_run, resolved_setting
from utils.runs.run import read_status, status_of

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture
def good(runs_dir: Path) -> IndexedRun:
    """A run without any damage."""
    return indexed(runs_dir, "good")


def use(run: IndexedRun, good: IndexedRun) -> None:
    """Use a run in every way that a list of runs, a filter or a comparison does."""
    assert {*FACTS} <= {*run.row()}
    run.summary()
    differing_settings([run, good])
    non_default_settings(run)
    code_identity(run)
    database = RunDatabase([run, good])
    assert good.row()["val_loss"] == 2.0
    (id_, *_), (*of_good, seed) = database.select("SELECT id, val_loss, seed FROM runs").rows
    assert (id_, *of_good, float(seed)) == (run.id, good.id, 2.0, 1337.0)
    database.select("SELECT * FROM metrics")


def test_a_row_holds_the_facts_and_the_settings(runs_dir: Path) -> None:
    run = indexed(
        runs_dir,
        settings={"seed": 5},
        tag="wide",
        parent={**PARENT, "run": "mother"},
        notes={"tags": ["a", "b"], "note": "why", "pinned": True},
        resolved={"parameters": 7, "threads": 2, "corpus_hash": "k", "device": "cpu", "seed": 99},
    )
    row = run.row()
    assert (run.status, run.problem, run.readable) == ("completed", None, True)
    assert [row[key] for key in ("id", "tag", "status", "steps", "val_loss", "last_val_loss", "train_loss")] == [
        *("run", "wide", "completed", 100, 2.0, 2.5, 2.25)
    ]
    assert [row[key] for key in ("parent", "tags", "note", "pinned", "duration", "best_step", "parameters")] == [
        *("mother", ["a", "b"], "why", True, 10.5, 50, 7)
    ]
    assert [row[key] for key in ("commit", "dirty", "branch", "corpus_hash")] == ["c" * 40, False, "main", "k"]
    assert row["path"] == str(run.path)
    assert row["age"] == pytest.approx(time.time() - 1769869501, abs=5)
    assert (row["seed"], row["threads"], row["device"]) == (5, 2, "cpu")  # a seed is never replaced


def test_a_setting_that_is_none_or_auto_shows_its_resolved_value(runs_dir: Path) -> None:
    run = indexed(runs_dir, settings={"min_lr": 1e-5}, resolved={"n_kv_head": 4, "min_lr": 3.0, "dtype": "bfloat16"})
    assert resolved_setting(run, "n_kv_head") == 4
    assert resolved_setting(run, "min_lr") == 1e-5
    assert resolved_setting(run, "dtype") == "bfloat16"
    assert resolved_setting(run, "head_dim") is None
    assert resolved_setting(run, "nonsense") is None


def test_runs_are_listed_by_start_after_the_damaged_ones(runs_dir: Path) -> None:
    make_run(runs_dir, "b", start="2026-01-02T00:00:00+00:00")
    make_run(runs_dir, "a", start="2026-01-02T00:00:00+00:00")
    make_run(runs_dir, "z", start="2026-01-01T00:00:00+00:00")
    (runs_dir / "empty").mkdir()
    write(runs_dir / "models.json", {})
    write(runs_dir / ".hidden" / "run.json", {})
    assert [run.id for run in read_index(runs_dir)] == ["empty", "z", "a", "b"]


def test_a_missing_folder_has_no_runs_and_a_file_in_its_place_is_reported(runs_dir: Path) -> None:
    assert read_index(runs_dir) == []
    write(runs_dir, "")
    with pytest.raises(UserError, match="this folder of runs cannot be read: Not a directory"):
        read_index(runs_dir)


def make_damaged(path: Path, kind: str) -> None:
    """An entry of the folder of runs that is not a run."""
    if kind == "a file":
        write(path, "")
        return
    path.mkdir(parents=True)
    contents: dict[str, Any] = {
        "no run.json": None,
        "an older schema": record_of("x", schema_version=0),
        "a newer schema": record_of("x", schema_version=2),
        "no schema": {"status": "completed"},
        "half a run.json": '{"schema_version": 1, "status": "comp',
        "empty run.json": "",
        "binary run.json": b"\xff\xfe\x00",
        "a list": [1],
        "null": None,
        "deep": DEEP,
        "a huge number": b'{"schema_version": 1' + b"0" * 5000 + b"}",
        "status is a number": record_of("x", status=1),
        "start is a number": record_of("x", start=1),
        "start is null": record_of("x", start=None),
        "tag is a list": record_of("x", tag=["a"]),
    }
    if kind == "run.json is a folder":
        (path / "run.json").mkdir()
    elif kind == "run.json is a broken link":
        (path / "run.json").symlink_to("nowhere")
    elif kind == "run.json links to itself":
        (path / "run.json").symlink_to("run.json")
    elif kind == "no run.json":
        write(path / "logs" / "metrics.jsonl", "")
    elif kind != "empty":
        write(path / "run.json", contents[kind])


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("a file", "a file, where a run directory was expected"),
        ("empty", "an empty folder"),
        ("no run.json", "no run.json"),
        ("an older schema", "schema_version 0, this workbench reads 1"),
        ("a newer schema", "schema_version 2, this workbench reads 1"),
        ("no schema", "schema_version None"),
        ("half a run.json", "run.json cannot be read"),
        ("empty run.json", "run.json cannot be read"),
        ("binary run.json", "run.json cannot be read"),
        ("a list", "not the record of a run"),
        ("null", "not the record of a run"),
        ("deep", "run.json cannot be read"),
        ("a huge number", "run.json cannot be read"),
        ("status is a number", "not the record of a run"),
        ("start is a number", "not the record of a run"),
        ("start is null", "not the record of a run"),
        ("tag is a list", "not the record of a run"),
        ("run.json is a folder", "Is a directory"),
        ("run.json is a broken link", "no run.json"),
        ("run.json links to itself", "run.json"),
    ],
)
def test_an_entry_that_is_not_a_run_is_listed_with_the_reason(runs_dir: Path, kind: str, problem: str) -> None:
    make_run(runs_dir, "good")
    make_damaged(runs_dir / "bad", kind)
    bad, good = read_index(runs_dir)
    assert (bad.id, bad.status, bad.readable) == ("bad", DAMAGED, False)
    assert problem in (bad.problem or "")
    assert str(runs_dir) not in (bad.problem or "")
    assert (good.id, good.status, good.problem) == ("good", "completed", None)
    use(bad, good)


def test_a_run_that_was_deleted_is_reported_as_gone(runs_dir: Path) -> None:
    assert read_run(runs_dir / "x") == IndexedRun(runs_dir / "x", problem="it is gone: no such run directory")


def test_a_run_directory_that_cannot_be_opened_is_listed(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, "good")
    (runs_dir / "bad").mkdir()

    def refuse(self: Path, *_: object) -> Any:
        if self.name == "bad":
            raise PermissionError(13, "Permission denied")
        return iter(os.scandir(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    bad, good = read_index(runs_dir)
    assert (bad.status, good.status) == (DAMAGED, "completed")
    assert "Permission denied" in (bad.problem or "")


def test_a_name_that_is_not_utf_8_is_listed_and_hides_nothing(runs_dir: Path) -> None:
    make_run(runs_dir, "good")
    os.mkdir(os.fsencode(runs_dir) + b"/\xff")
    bad, good = read_index(runs_dir)
    assert (bad.status, good.status) == (DAMAGED, "completed")
    assert ("good",) in RunDatabase([bad, good]).select("SELECT id FROM runs").rows


WRONG_TYPES: list[tuple[str, Any]] = [
    *[(key, value) for key in ("summary", "resolved", "git", "parent") for value in ("x", 3, True, ["a"])],
    ("summary", {"val/loss": None}),
    ("summary", {"best_val_loss": "low"}),
    ("summary", {"train/eval_loss": [1.0]}),
    ("summary", {"val/loss": 10**400}),
    ("host", 5),
    ("last_step", "x"),
    ("last_step", [1]),
    ("last_step", 2**70),
    ("best_step", {}),
    ("config_hash", 10**30),
    ("git", {"commit": ["a"]}),
    ("parent", {}),
    ("parent", {"run": 3}),
    ("resolved", {"torch": 2**70}),
    ("resolved", {"parameters": "many"}),
    ("resumes", [{"before": "x"}]),
    ("resumes", [{"before": ["x"]}]),
    ("resumes", [{"step": "x", "git": {"commit": "x", "code": None}}]),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES, ids=lambda value: str(value)[:30])
def test_a_field_of_the_wrong_type_is_a_problem_but_raises_nothing(
    runs_dir: Path, good: IndexedRun, key: str, value: Any
) -> None:
    bad = indexed(runs_dir, "bad", **{key: value})
    use(bad, good)
    assert bad.problem


@pytest.mark.parametrize(
    ("key", "value"),
    [*[(key, None) for key in ("summary", "resolved", "git", "parent", "host", "last_step", "end")], ("summary", {})],
)
def test_an_empty_field_is_not_a_problem(runs_dir: Path, good: IndexedRun, key: str, value: Any) -> None:
    run = indexed(runs_dir, "run", **{key: value})
    use(run, good)
    assert run.problem is None


@pytest.mark.parametrize("start", ["yesterday", "", "0001-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "2026-01-31"])
def test_a_run_with_an_odd_start_has_a_numeric_age_or_none(runs_dir: Path, good: IndexedRun, start: str) -> None:
    run = indexed(runs_dir, start=start)
    use(run, good)
    assert isinstance(run.row()["age"], float | None)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"3", b'{"data": 3}', None, "folder", DEEP])
def test_a_run_with_damaged_settings_is_listed_with_the_problem(runs_dir: Path, good: IndexedRun, content: Any) -> None:
    path = make_run(runs_dir, "bad") / "meta" / "full_config.json"
    replace(path, content)
    bad = read_run(runs_dir / "bad")
    assert bad.status == "completed"
    assert "full_config.json" in (bad.problem or "")
    assert bad.settings == {}
    use(bad, good)


@pytest.mark.parametrize(
    "content",
    [
        b'{"data": {"id": "zzz", "path": 3, "status": [1]}}',
        b'{"data": {"old_setting": {"a": [1]}}, "train": {"seed": "many"}}',
        b'{"train": {"seed": 18446744073709551616}}',
        b'{"data": {"dataset": "\\ud800"}}',
        b'{"train": {"Seed": 4}}',
        b'{"train": {"STATUS": 4}}',
        b'{"": {"": 1}}',
        b'{"optimizer": {"learning_rate": Infinity, "beta1": NaN}}',
        b'{"data": {"a b\\"c\'d": 1}}',
        b"{}",
    ],
)
def test_strange_settings_hide_no_run(runs_dir: Path, good: IndexedRun, content: bytes) -> None:
    path = make_run(runs_dir, "bad")
    write(path / "meta" / "full_config.json", content)
    bad = read_run(path)
    use(bad, good)
    assert bad.row()["id"] == "bad"
    assert bad.row()["status"] == "completed"


def replace(path: Path, content: Any) -> None:
    """Replace a file; with None it is deleted, and with "folder" a folder takes its place."""
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        write(path, content)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b'{"tags": "a"}', "folder", DEEP])
def test_a_run_with_damaged_notes_is_listed_with_the_problem(runs_dir: Path, good: IndexedRun, content: Any) -> None:
    replace(make_run(runs_dir, "bad") / "notes.json", content)
    bad = read_run(runs_dir / "bad")
    assert bad.status == "completed"
    assert "notes.json" in (bad.problem or "")
    use(bad, good)


@pytest.mark.parametrize(
    "notes",
    [{"tags": [1, None]}, {"tags": [["a"]]}, {"note": 5}, {"note": 2**70}, {"pinned": "yes"}, {"pinned": [1]}],
)
def test_notes_of_the_wrong_type_are_a_problem(runs_dir: Path, good: IndexedRun, notes: dict[str, Any]) -> None:
    bad = indexed(runs_dir, "bad", notes=notes)
    use(bad, good)
    assert "notes.json" in (bad.problem or "")


def test_a_run_without_notes_has_empty_ones(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run")
    (run / "notes.json").unlink()
    row = read_run(run).row()
    assert (row["tags"], row["note"], row["pinned"], row["problem"]) == ([], "", False, None)


TORN_LOGS = {
    "torn": b'{"step": 10, "time": 1.0, "val/loss": 2.0}\n{"step": 20, "val/lo',
    "empty": b"",
    "one torn line": b'{"step": 10',
}
BROKEN_LOGS = {
    "binary": b"\xff\xfe\n",
    "binary with a loss": b'\xff"val/loss"\n',
    "not JSON": b'{"step": NaN}\n',
    "not a record": b'[1]\n"val/loss"\nnull\n',
    "no step": b'{"val/loss": 1.0}\n',
    "a loss that is not a number": b'{"step": 1, "time": 1.0, "val/loss": "low"}\n',
    "a loss that is a list": b'{"step": 1, "time": 1.0, "val/loss": [1]}\n',
    "a step that is not a number": b'{"step": "x", "time": 1.0, "val/loss": 1.0}\n',
    "deep": DEEP + b"\n",
    "a huge number": b'{"step": 1, "time": 1.0, "val/loss": 1' + b"0" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", [*TORN_LOGS, *BROKEN_LOGS])
@pytest.mark.parametrize("status", ["completed", "running"])
def test_a_damaged_log_raises_nothing(runs_dir: Path, good: IndexedRun, name: str, status: str) -> None:
    ended = status == "completed"
    path = make_run(runs_dir, "bad", status=status, **({} if ended else {"last_step": None, "summary": {}}))
    write(path / "logs" / "metrics.jsonl", {**TORN_LOGS, **BROKEN_LOGS}[name])
    use(read_run(path), good)


def test_a_long_last_line_of_a_log_is_not_a_problem(runs_dir: Path) -> None:
    path = indexed(runs_dir, "run").path
    metrics = {f"grad_norm/blocks.{number}.attention.qkv.weight": 0.125 for number in range(200)}
    with (path / "logs" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 30, "time": 3.0, **metrics}) + "\n")
    assert read_run(path).problem is None


def test_a_log_that_is_missing_or_a_folder_raises_nothing(runs_dir: Path, good: IndexedRun) -> None:
    path = make_run(runs_dir, "bad", status="running", last_step=None, summary={})
    (path / "logs" / "metrics.jsonl").unlink()
    use(read_run(path), good)
    (path / "logs" / "metrics.jsonl").mkdir()
    use(read_run(path), good)


def test_the_losses_of_a_crashed_run_come_from_its_log(runs_dir: Path) -> None:
    run = indexed(runs_dir, status="running", last_step=None, summary={}, end=None, metrics=training_records([3, 1, 2]))
    write(run.path / "logs" / "metrics.jsonl", (run.path / "logs" / "metrics.jsonl").read_bytes() + b'{"step": 99')
    row = run.row()
    assert [row[key] for key in ("status", "steps", "val_loss", "last_val_loss", "duration")] == [
        *("crashed", 20, 1.0, 2.0, None)
    ]


def test_the_best_loss_of_a_crashed_run_is_not_nan(runs_dir: Path) -> None:
    run = indexed(runs_dir, status="running", last_step=None, summary={}, metrics=training_records([3.0, 2.0, "nan"]))
    summary = run.summary()
    assert math.isnan(summary["val/loss"])
    assert summary["best_val_loss"] == 2.0


def test_a_resumed_run_shows_the_results_of_its_log_not_of_its_first_session(runs_dir: Path) -> None:
    metrics = training_records([4.0, 1.0, 3.0], 450)
    run = make_run(runs_dir, "run", status="running", last_step=10, best_step=10, metrics=metrics)
    with held_lock(run):
        row = read_run(run).row()
    crashed = read_run(run).row()
    facts = ("status", "steps", "val_loss", "best_step", "last_val_loss")
    assert [row[key] for key in facts] == ["running", 900, 1.0, 450, 3.0]
    assert [crashed[key] for key in facts] == ["crashed", 900, 1.0, 450, 3.0]


def test_nonfinite_losses_of_the_summary_become_floats(runs_dir: Path) -> None:
    row = indexed(runs_dir, status="diverged", summary={"val/loss": "nan", "best_val_loss": "inf"}).row()
    assert math.isnan(row["last_val_loss"])
    assert row["val_loss"] == math.inf
    assert row["train_loss"] is None


def test_a_clock_that_was_set_back_gives_no_negative_times(runs_dir: Path) -> None:
    row = indexed(runs_dir, "a", start="2126-01-31T14:25:01+00:00", end="2126-01-31T14:00:00+00:00").row()
    assert (row["age"], row["duration"]) == (0.0, 0.0)
    sessions = [{"time": "2026-01-31T15:00:00+00:00", "before": {"end": "2026-01-31T14:25:11+00:00"}}]
    resumed = indexed(runs_dir, "b", end="2026-01-31T14:59:00+00:00", resumes=sessions)
    assert resumed.row()["duration"] == 10.0  # the second session counts as 0 s, not as less than that


@pytest.mark.parametrize(("logged", "seconds"), [(8.0, 8.0), (-5.0, 2.0), ("nan", 2.0), (1e9, 2.0), (None, 2.0)])
def test_the_duration_of_a_killed_run_goes_up_to_its_last_sign_of_life(
    logged: Any, seconds: float, runs_dir: Path
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    moment = logged if logged in (None, "nan") else start.timestamp() + logged
    facts = {"start": start.isoformat(), "end": None, "status": "running", "seconds": 0.0}
    path = make_run(runs_dir, "killed", metrics=[{"step": 1, "time": moment}], **facts)
    os.utime(path / "lock", (start.timestamp() + 2,) * 2)
    run = read_run(path)
    assert (run.status, run.duration()) == ("crashed", seconds)


def test_the_duration_of_a_running_run_grows(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run", status="running", end=None, last_step=None)
    with held_lock(run):
        row = read_run(run).row()
    assert row["status"] == "running"
    assert row["duration"] == pytest.approx(row["age"], abs=1)


def test_a_run_recorded_as_running_has_crashed_unless_its_lock_is_held(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run", status="running")
    record = json.loads((run / "run.json").read_text())
    assert status_of(run, record) == read_status(run) == "crashed"
    with held_lock(run):
        assert status_of(run, record) == read_status(run) == "running"
    assert status_of(run, {**record, "status": "failed"}) == "failed"
