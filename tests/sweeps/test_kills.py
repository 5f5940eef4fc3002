"""A sweep whose drivers and trainings are killed ends with the same trials as an undisturbed one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.sweep import SPACE, killed_sweep

STAND_IN = f"{os.path.relpath(Path(__file__).parent / 'stand_in.py', Path(__file__).parents[2])} sweep"


@pytest.mark.slow
def test_a_killed_sweep_loses_duplicates_and_renumbers_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "0.02")
    (tmp_path / "space.yaml").write_text(SPACE)
    found = killed_sweep(tmp_path, trials=4, steps=10, count=6, seconds=1.5, seed=0, script=STAND_IN)
    assert found.kills == 6
    assert found.failures == []
    assert found.differences == []
