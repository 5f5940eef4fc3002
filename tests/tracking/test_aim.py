"""Aim's database where Aim itself would print tracebacks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from aim import storage

from utils.tracking.aim import _upgrade_database


def test_a_percent_sign_in_the_path_of_aim_does_no_harm_and_a_damaged_database_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "p%q" / "storage"
    shutil.copytree(Path(storage.__file__).parent / "migrations", place / "migrations")
    monkeypatch.setattr(storage, "__file__", str(place / "__init__.py"))
    (tmp_path / "bad.sqlite").write_bytes(b"junk" * 1000)
    with pytest.raises(OSError, match=r"its database cannot be upgraded: .*file is not a database"):
        _upgrade_database(f"sqlite:///{tmp_path / 'bad.sqlite'}")
    assert capfd.readouterr() == ("", "")
