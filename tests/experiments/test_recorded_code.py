"""Restoring the code of a run: commits and files that are missing, and patches that reach outside the folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from fake_runs import make_run, write

from utils.experiments.recorded_code import ReproductionError, apply_patch, recorded_code
from utils.runs.index import read_run


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", ".git/hooks/pre-commit"])
def test_a_patch_that_leaves_the_tree_is_refused(tmp_path: Path, name: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    patch = f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+evil\n"
    with pytest.raises(ReproductionError, match=r"mine\.patch: the patch cannot be applied: invalid path"):
        apply_patch(patch.encode(), tree, Path("mine.patch"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["tree"]


def test_a_patch_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    outside.mkdir()
    (tree / "link").symlink_to(outside)
    patch = b"diff --git a/link/x b/link/x\nnew file mode 100644\n--- /dev/null\n+++ b/link/x\n@@ -0,0 +1 @@\n+evil\n"
    with pytest.raises(ReproductionError, match="beyond a symbolic link"):
        apply_patch(patch, tree, Path("mine.patch"))
    assert not list(outside.iterdir())


def test_an_unknown_commit_is_reported_with_the_alternative(runs_dir: Path, tmp_path: Path) -> None:
    run = read_run(make_run(runs_dir, "x", git={"commit": "0123456789" * 4, "branch": "main", "dirty": False}))
    with pytest.raises(ReproductionError, match=r"commit 012345678901 of x .* --code current"):
        recorded_code(run, ROOT, tmp_path)


def test_without_a_recorded_commit_the_current_code_is_used_and_reported(runs_dir: Path, tmp_path: Path) -> None:
    run = read_run(make_run(runs_dir, "x", git={"commit": None}))
    place, unknown = recorded_code(run, ROOT, tmp_path)
    assert place == ROOT
    assert "started without git" in unknown[0]


def test_files_left_out_of_the_patch_are_named(runs_dir: Path, tmp_path: Path) -> None:
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    run = make_run(runs_dir, "x", git={"commit": commit, "branch": "main", "dirty": True})
    (run / "meta" / "code.patch").unlink()
    write(run / "meta" / "git.txt", "commit: x\n\nleft out of code.patch:\n  .env (looks like a secret)\n")
    place, unknown = recorded_code(read_run(run), ROOT, tmp_path)
    assert (place / "train.py").is_file()
    assert unknown == ["the content of files that were left out of the patch: .env (looks like a secret)"]


def test_a_commit_that_looks_like_an_option_of_git_is_rejected(runs_dir: Path, tmp_path: Path) -> None:
    run = read_run(make_run(runs_dir, "x", git={"commit": f"--output={tmp_path}/written"}))
    with pytest.raises(ReproductionError, match="is not a commit"):
        recorded_code(run, ROOT, tmp_path)
    assert not (tmp_path / "written").exists()
