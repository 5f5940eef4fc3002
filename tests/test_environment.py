"""A script that is started with a Python without the packages says how to use the right one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

import utils

SCRIPTS = ("train.py", "inference.py", "evaluate.py", "experiments.py", "profile_model.py", "weights.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_outside_the_environment_says_how_to_activate_it(script: str) -> None:
    command = [sys.executable, "-S", "-E", str(ROOT / script), "--help"]  # -S: without site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: Python ")
    assert result.stderr.endswith(": . .venv/bin/activate\n")
    assert result.stderr.count("\n") == 1


def test_windows_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows is not supported" in str(utils.environment_problem())


def test_an_old_python_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utils.environment_problem() is None
    monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
    assert "3.11 or newer is needed" in str(utils.environment_problem())
