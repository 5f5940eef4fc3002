"""The files that modules were imported from, with links resolved."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from fake_runs import write

from utils.runs.imported import imported_files


def test_the_files_of_modules_are_found_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "real" / "package" / "mine.py", "m = 1\n")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "file.py").symlink_to(tmp_path / "real" / "package" / "mine.py")
    named = ["real/package/mine.py", "linked/package/mine.py", "linked/file.py", "linked/../real/package/mine.py"]
    for number, path in enumerate(named):
        module = types.ModuleType(f"mine_{number}")
        module.__file__ = str(tmp_path / path)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    files = imported_files()
    for number, path in enumerate(named):
        assert files[f"mine_{number}"] == (str(tmp_path / path), os.path.realpath(tmp_path / path))
    assert all(real == os.path.realpath(path) for path, real in files.values())


def test_the_links_above_a_folder_are_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    is_link = os.path.islink
    monkeypatch.setattr("os.path.islink", lambda path: looked_at.append(path) or is_link(path))
    imported_files()
    assert len(looked_at) == len(set(looked_at)) > 100
