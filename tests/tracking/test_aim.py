"""Aim's database: damage, failed writes, and edits made in Aim."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sqlite3
from pathlib import Path

import pytest
from aim import Repo, storage

from utils.config.settings import Config
from utils.tracking import RunEnd, RunFacts
from utils.tracking.aim import AimView, _upgrade_database


def test_a_damaged_database_of_aim_is_one_error_even_if_its_path_has_a_percent_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "p%q" / "storage"
    shutil.copytree(Path(storage.__file__).parent / "migrations", place / "migrations")
    monkeypatch.setattr(storage, "__file__", str(place / "__init__.py"))
    (tmp_path / "bad.sqlite").write_bytes(b"junk" * 1000)
    with pytest.raises(OSError, match=r"its database cannot be upgraded: .*file is not a database"):
        _upgrade_database(f"sqlite:///{tmp_path / 'bad.sqlite'}")
    assert capfd.readouterr() == ("", "")


def test_a_name_and_description_edited_in_aim_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repo, "_all_run_hashes", Repo._all_run_hashes.__wrapped__)  # without its cache of half a second
    facts = RunFacts("one", tmp_path / "one", (), "", Config().model_dump(mode="json"), {}, {}, ())
    moved = dataclasses.replace(facts, id="two", path=tmp_path / "two")
    shown = []
    for new_name in ("one", "the baseline"):
        first = AimView(facts, str(tmp_path))
        run_hash = str(first.open(0)["hash"])
        first.run.name, first.run.description = new_name, "the good one"
        first.close(RunEnd("interrupted"))
        resumed = AimView(moved, str(tmp_path), run_hash)
        resumed.open(0)
        shown.append((resumed.run.name, resumed.run.description, resumed.run["run_dir"]))
        resumed.close(RunEnd("completed"))
    place = str(tmp_path / "two")
    assert shown == [("two", "the good one", place), ("the baseline", "the good one", place)]


def test_opening_aim_can_be_retried_after_a_failed_database_write(tmp_path: Path) -> None:
    """Such a write fails, for example, while another process holds the lock for long."""
    facts = RunFacts("one", tmp_path, ("a tag",), "", Config().model_dump(mode="json"), {}, {}, ())
    Repo(str(tmp_path), init=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / ".aim" / "run_metadata.sqlite")) as database:
        database.execute("CREATE TRIGGER refused BEFORE INSERT ON run BEGIN SELECT RAISE(FAIL, 'refused'); END")
        view = AimView(facts, str(tmp_path))
        for _ in range(2):
            with pytest.raises(Exception, match=r"^\(sqlite3.IntegrityError\) refused"):
                view.open(0)
        database.execute("DROP TRIGGER refused")
    run_hash = view.open(0)["hash"]
    assert view.run.tags == ["a tag"]
    view.close(RunEnd("completed"))
    assert [path.name for path in (tmp_path / ".aim" / "meta" / "chunks").iterdir()] == [run_hash]
