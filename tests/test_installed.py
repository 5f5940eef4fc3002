"""The workbench as an installed package: the wheel, and the program lm-workbench in another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import workbench
from lm_workbench import CODE
from lm_workbench.__main__ import NAMES, main
from utils.training.result import script_command


def test_an_unknown_command_suggests_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lm-workbench", "experiment"])
    assert main() == 2
    assert "error: unknown command 'experiment'; did you mean experiments?" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["lm-workbench"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: lm-workbench train|inference|evaluate|")


def test_a_command_replaces_the_process_by_a_script_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: called.append([path, *words]))
    monkeypatch.setattr("sys.argv", ["lm-workbench", "profile", "--steps", "3"])
    main()
    assert called == [[sys.executable, sys.executable, str(ROOT / "profile_model.py"), "--steps", "3"]]
    assert CODE == ROOT


def test_every_script_has_a_command() -> None:
    scripts = {path.stem.removesuffix("_model") for path in ROOT.glob("*.py") if "@script\n" in path.read_text()}
    assert scripts <= set(NAMES)


def test_lm_workbench_has_the_names_of_workbench() -> None:
    from lm_workbench import UserError

    assert UserError is workbench.UserError


def test_an_installed_workbench_prints_commands_with_lm_workbench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.training.result.INSTALLED", True)
    assert script_command("profile_model.py").endswith("lm-workbench profile")


@pytest.mark.slow
def test_a_wheel_works_in_another_folder(tmp_path: Path) -> None:
    """Build it from a copy of the files that git knows, and install it without its dependencies, which are present."""
    source, wheels, target, work = (tmp_path / name for name in ("source", "wheels", "target", "work"))
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"lm_workbench/{name}" for name in names if name.startswith(("utils/", "configs/")) or name == "train.py"
    }
    assert expected <= packed
    subprocess.run([*pip, "install", *options, "--no-compile", "--target", target, wheel], check=True)

    (work / "configs").mkdir(parents=True)
    (work / "configs" / "train.yaml").write_text("max_iters: 2\nthreads: 1\neval_iters: 2\n")
    (work / "notes.txt").write_text("the quick brown fox jumps over it\n" * 100)
    subprocess.run(["git", "init", "-q", work], check=True)  # a repository of another project

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        program, path = [sys.executable, str(target / "bin" / "lm-workbench")], {"PYTHONPATH": str(target)}
        return subprocess.run([*program, *words], cwd=work, env=os.environ | path, capture_output=True, text=True)

    tiny = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8", "--batch-size", "4"]
    trained = run("train", "--dataset", "notes.txt", "--run-tag", "far", "--no-aim-logging", *tiny)
    assert trained.returncode == 0, trained.stderr
    assert "lm-workbench inference far" in trained.stdout
    (path,) = (work / "runs").iterdir()
    assert (path / "meta" / "git.txt").read_text() == "git: the code is the installed package lm-workbench 0.1.0\n"
    listed = run("experiments", "list", "--json")
    assert [(row["tag"], row["steps"]) for row in json.loads(listed.stdout)] == [("far", 2)], listed.stderr
