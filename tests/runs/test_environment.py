"""The content of meta/env.txt, which must not include environment variables."""

from __future__ import annotations

import sys

import pytest

from utils.runs.environment import environment_text


def test_environment_names_python_devices_and_packages_but_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    text = environment_text({"device": "a fast one"})
    assert f"python: {sys.version.split()[0]} (" in text
    assert "\ndevice: a fast one\n" in text
    assert "\n  pydantic==" in text
    assert "hunter2" not in text
    packages = [line.partition("==")[0].lower() for line in text.splitlines() if "==" in line]
    assert packages == sorted(packages)
