"""The display of a sweep and the command that it prints at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Group

from utils.config.settings import Config, TrackingConfig, TrainConfig
from utils.sweeps.folder import Sweep
from utils.sweeps.space import Dimension, Space
from utils.sweeps.study import Study, Work
from utils.sweeps.table import Display, longer_command
from utils.terminal.console import Terminal

MakeSweep = Callable[..., Sweep]


def test_the_display_counts_no_more_trials_than_the_grid_has_points(make_sweep: MakeSweep, tmp_path: Path) -> None:
    space = Space((Dimension("learning_rate", "choice", (0.1, 0.2, 0.3)),))
    for sampler, total in (("grid", 3), ("random", 50)):
        sweep = make_sweep(space=space, sampler=sampler, folder=tmp_path / sampler)
        display = Display(Terminal(quiet=True), sweep, Study(sweep), {}, 50)
        assert isinstance(screen := display.screen(), Group)
        assert f"lr: 0 of {total} trials done" in str(screen.renderables[0])


@pytest.mark.parametrize(
    ("dimension", "train", "threads", "flags"),
    [
        (Dimension("learning_rate", "choice", (0.1,)), TrainConfig(max_iters=100_000), None, "--max-iters 1000000"),
        (Dimension("max_iters", "choice", (30,)), TrainConfig(max_iters=20), None, "--max-iters 300"),
        (Dimension("epochs", "choice", (1.5,)), TrainConfig(max_iters=20), None, "--epochs 15"),
        (Dimension("max_iters", "choice", (30,)), TrainConfig(max_iters=None, epochs=2), None, "--max-iters 300"),
        (
            Dimension("learning_rate", "choice", (0.1,)),
            TrainConfig(max_iters=None, epochs=2, max_minutes=5),
            4,
            "--epochs 20 --threads none --max-minutes none",
        ),
    ],
)
def test_the_command_to_train_longer_has_ten_times_the_steps_and_no_limits_of_the_trial(
    make_sweep: MakeSweep, tmp_path: Path, dimension: Dimension, train: TrainConfig, threads: int | None, flags: str
) -> None:
    config = Config(train=train, tracking=TrackingConfig(runs_dir=str(tmp_path / "runs")))
    sweep = make_sweep(space=Space((dimension,)), config=config, threads=threads)
    study = Study(sweep)
    work = study.claim(1)
    assert isinstance(work, Work)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    study.finish(0, 1.0, runs=["best"])
    command = longer_command(sweep, study)
    assert command is not None
    assert command.partition("--run-tag lr-best ")[2] == flags
