"""The table of runs in memory sends the rows of the index, and later only those that have changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import held_lock, log_lines, make_run, training_records

from utils.pages import table
from utils.pages.keys import key_of
from utils.pages.table import RunRows
from utils.runs.index import read_index
from utils.runs.layout import METRICS_LOG, NOTES, RECORD


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FRESH_SECONDS", -1.0)


def rows_of(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = ("id", "status", "problem", "start", *answer["columns"])
    return {key: dict(zip(names, values, strict=True)) for key, *values in answer["rows"]}


def test_the_table_has_the_rows_of_the_index(tmp_path: Path) -> None:
    make_run(tmp_path, "a", settings={"learning_rate": 0.1}, notes={"tags": ["good"], "note": "n"})
    make_run(tmp_path, "b", settings={"learning_rate": 0.2, "eval_iters": 3}, status="failed")
    (tmp_path / "c").mkdir()
    answer = RunRows(tmp_path).changes(None)
    rows = rows_of(answer)
    assert {"learning_rate", "eval_iters"} <= set(answer["columns"])
    assert "seed" not in answer["columns"]
    assert answer["default"][:2] == ["status", "age"]
    assert {"learning_rate", "tags", "note"} <= set(answer["default"])
    for run in read_index(tmp_path):
        expected, shown = run.row(), rows[run.id]
        for column in ("status", "val_loss", "steps", "tags", "note", "learning_rate", "duration"):
            assert shown[column] == expected.get(column), column
    assert rows["c"]["status"] == "damaged"
    assert rows["c"]["problem"] == "an empty folder"


def test_only_rows_that_have_changed_are_sent_again(tmp_path: Path) -> None:
    for i in range(20):
        make_run(tmp_path, f"run{i}", settings={"seed": i})
    runs = RunRows(tmp_path)
    first = runs.changes(None)
    nothing = runs.changes(first["version"])
    assert (nothing["rows"], nothing["removed"], nothing["version"]) == ([], [], first["version"])

    record = json.loads((tmp_path / "run3" / RECORD).read_text())
    (tmp_path / "run3" / RECORD).write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(tmp_path / "run4")
    second = runs.changes(first["version"])
    assert [row[0] for row in second["rows"]] == ["run3"]
    assert second["removed"] == ["run4"]
    assert len(json.dumps(second)) < 500 < 5000 < len(json.dumps(first))
    assert runs.changes(second["version"])["rows"] == []
    assert [row[0] for row in runs.changes(first["version"])["rows"]] == [
        "run3"
    ]  # for a page that has not seen the second


@pytest.mark.parametrize("since", ["", "x", "0-0", "-", "{begun}-99999", "{begun}-x", "\x00"])
def test_a_version_that_the_server_does_not_know_gets_all_rows(tmp_path: Path, since: str) -> None:
    make_run(tmp_path, "a")
    runs = RunRows(tmp_path)
    begun = runs.changes(None)["version"].split("-")[0]
    answer = runs.changes(since.format(begun=begun))
    assert answer["all"]
    assert len(answer["rows"]) == 1


def test_a_new_column_resends_the_whole_table(tmp_path: Path) -> None:
    make_run(tmp_path, "a", settings={"dropout": 0.0})
    runs = RunRows(tmp_path)
    first = runs.changes(None)
    make_run(tmp_path, "b", settings={"dropout": 0.5})
    second = runs.changes(first["version"])
    assert second["all"]
    assert "dropout" in second["columns"]
    assert {row["dropout"] for row in rows_of(second).values()} == {0.0, 0.5}


def test_a_run_that_is_being_trained_is_followed_until_it_ends(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 2.5]
    run = make_run(tmp_path, "a", status="running", end=None, metrics=training_records(losses))
    runs = RunRows(tmp_path)
    with held_lock(run):
        first = runs.changes(None)
        row = rows_of(first)["a"]
        assert (row["status"], row["steps"], row["val_loss"], row["last_val_loss"]) == ("running", 20, 2.0, 2.5)
        with (run / METRICS_LOG).open("a") as log:
            log.write(log_lines([{"step": 30, "time": 1030.0, "val/loss": 1.5}]) + '{"step": 31')
        second = runs.changes(first["version"])
        row = rows_of({**second, "columns": first["columns"]})["a"]
        assert (row["steps"], row["val_loss"], row["last_val_loss"]) == (30, 1.5, 1.5)
        (run / METRICS_LOG).write_text(log_lines(training_records([3.0])))  # a resume from an earlier checkpoint
        third = runs.changes(second["version"])
        assert rows_of({**third, "columns": first["columns"]})["a"]["val_loss"] == 3.0
    ended = runs.changes(third["version"])
    assert rows_of({**ended, "columns": first["columns"]})["a"]["status"] == "crashed"


def test_hostile_names_and_texts_become_harmless_json(tmp_path: Path) -> None:
    names = ["<svg onload=alert(1)>", 'it\'s "quoted"; DROP', "a\nb\x1b[31m\u202e", "100%&?#=+ ä", "~61"]
    for name in names:
        make_run(tmp_path, name, tag="<b>", notes={"note": "<img src=x onerror=alert(1)>\x1b" + "x" * 100_000})
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    runs = RunRows(tmp_path)
    answer = runs.changes(None)
    rows = rows_of(answer)
    assert set(rows) == {key_of(name) for name in names} | {"~fffe"}
    assert all(key.replace("~", "").isalnum() for key in rows)
    json.dumps(answer).encode("ascii")
    assert all(
        row["id"].isprintable() and len(row["note"] or "") < 1000 and "\x1b" not in (row["note"] or "")
        for row in rows.values()
    )
    for name in names:
        found = runs.run(key_of(name))
        assert found is not None
        assert found.path == tmp_path / name
    assert runs.run("../" + tmp_path.name) is None
    assert runs.run("") is None
    assert runs.run(".") is None


def test_notes_that_change_without_a_new_file_time_are_read_after_forget(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", notes={"note": "one"})
    runs = RunRows(tmp_path)
    first = runs.changes(None)
    facts = (run / NOTES).stat()
    (run / NOTES).write_text((run / NOTES).read_text().replace("one", "two"))
    os.utime(run / NOTES, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    runs.forget("a")
    assert rows_of({**runs.changes(first["version"]), "columns": first["columns"]})["a"]["note"] == "two"


def test_a_missing_folder_has_no_rows(tmp_path: Path) -> None:
    assert RunRows(tmp_path / "none").changes(None)["rows"] == []
