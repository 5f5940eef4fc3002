"""Sweeps whose trials are not trained, or trained by the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utils.config.settings import Config, TrackingConfig, TrainConfig
from utils.sweeps import trial
from utils.sweeps.folder import Plan, Sweep, open_sweep
from utils.sweeps.space import Dimension, Goal, Space

RATE = Dimension("learning_rate", "log", (1e-4, 1e-1))
MakeSweep = Callable[..., Sweep]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are trained by stand_in.py, in a fifth of a second."""
    monkeypatch.setattr(trial, "TRAIN", "tests/sweeps/stand_in.py")


@pytest.fixture
def make_sweep(tmp_path: Path) -> MakeSweep:
    """Make or open a sweep below tmp_path with the random sampler; `facts` are fields of its plan."""

    def make(
        seeds: Any = 1,
        goal: Goal | None = None,
        resume: bool = True,
        max_iters: int = 540,
        folder: Path = tmp_path,
        **facts: Any,
    ) -> Sweep:
        tracking = TrackingConfig(runs_dir=str(folder / "runs"))
        config = Config(train=TrainConfig(max_iters=max_iters), tracking=tracking)
        space = Space((RATE,), seeds=seeds, goal=goal or Goal())
        plan = Plan(**{"space": space, "config": config, "sampler": "random", **facts})
        return open_sweep(folder / "sweeps" / "lr", plan, folder, resume=resume)

    return make
