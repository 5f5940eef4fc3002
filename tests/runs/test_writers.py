"""Several writers of one JSON file: none overwrites the change of another, and none waits forever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import make_run

import utils.files
from utils.experiments.notes import edit
from utils.files import change_json, put_aside
from utils.locks import folder_lock
from utils.runs.layout import MODELS, NOTES, RECORD
from utils.runs.run import Run, RunError, read_record

ROOT = Path(__file__).resolve().parents[2]
WRITERS, EACH = 4, 15


def in_processes(code: str, folder: Path) -> None:
    """Run `code` in WRITERS processes at once, with the variables `path` and `number`."""
    begin = "import sys; from pathlib import Path; path, number = Path(sys.argv[1]), sys.argv[2]\n"
    command = [sys.executable, "-c", begin + code, str(folder)]
    processes = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(WRITERS)]
    assert [process.wait(timeout=120) for process in processes] == [0] * WRITERS


def test_no_edit_is_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    code = "from utils.experiments.notes import edit\n"
    code += f"for i in range({EACH}): edit(path, add_tags=(f'{{number}}-{{i}}',))\n"
    in_processes(code, run)
    assert len(json.loads((run / NOTES).read_text())["tags"]) == WRITERS * EACH


def test_no_promotion_is_lost(tmp_path: Path) -> None:
    code = "from utils.runs.names import add_version\n"
    code += f"for i in range({EACH}): add_version(path, 'm', {{'run': f'{{number}}-{{i}}', 'sha256': '0'}})\n"
    in_processes(code, tmp_path)
    versions = json.loads((tmp_path / MODELS).read_text())["m"]
    assert [version["version"] for version in versions] == [*range(1, WRITERS * EACH + 1)]


def test_a_new_tag_and_the_status_of_a_training_do_not_overwrite_each_other(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", tag="old")
    run = Run.resume(path)
    utils.files.change_json(path / RECORD, lambda record: {**record, "tag": "new"})  # like an `edit` that began earlier
    run.restart(["train.py"], 0)
    run.update_view("aim", state="on")
    record = read_record(path)
    assert (record["tag"], record["status"], record["views"]) == ("new", "running", {"aim": {"state": "on"}})
    run.finish("completed")
    edit_result = edit(path, tag="newer")
    run.release()
    record = read_record(path)
    assert (edit_result["tag"], record["tag"], record["status"]) == ("newer", "newer", "completed")


def test_an_update_that_could_not_be_written_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(utils.files, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            run.finish("completed")
    run.update_view("aim", state="off")
    assert read_record(run.path)["status"] == "completed"
    run.release()


def test_a_record_that_was_damaged_during_training_is_written_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    (run.path / RECORD).write_bytes(b"\xff")
    run.finish("completed")
    run.release()
    assert read_record(run.path)["status"] == "completed"


def test_a_lock_that_is_never_released_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.locks.LOCK_SECONDS", 0.05)
    run = make_run(tmp_path, "run")
    with folder_lock(run), pytest.raises(RunError, match="another process holds its lock"):
        edit(run, note="text")
    edit(run, note="text")


def test_a_change_that_fails_leaves_the_file_and_releases_the_lock(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    with pytest.raises(ZeroDivisionError):
        change_json(tmp_path / "a.json", lambda value: value / 0)
    assert os.listdir(tmp_path) == ["a.json"]
    assert change_json(tmp_path / "a.json", lambda value: value + 1) == 2


def test_putting_a_file_aside_overwrites_no_other(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "a").write_text(content)
        put_aside(tmp_path / "a")
    assert (tmp_path / "a.damaged").read_text() == "first"
    assert (tmp_path / "a.damaged_2").read_text() == "second"


@pytest.mark.parametrize("field", ["resumes", "resolved", "parent", "views", "git", "last_step", "summary"])
def test_a_record_with_a_field_of_the_wrong_type_is_reported_in_one_line(field: str, tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", **{field: "text"})
    with pytest.raises(RunError, match=f"has invalid fields: {field}"):
        Run.resume(path)
