"""A run directory that is deleted or moved while it is trained: noticed at the next write, and not made again."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
import utils.training.step
from utils.runs.log import RunLog
from utils.training.state import TrainState


@pytest.mark.parametrize("loss", ["deleted", "moved", "replaced", "one log"])
def test_a_log_that_is_no_longer_in_its_place_is_noticed(tmp_path: Path, loss: str) -> None:
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    log = RunLog(logs)
    log.metrics.write([{"step": 1}])
    if loss == "one log":
        log.metrics.path.unlink()
    elif loss == "moved":
        logs.parent.rename(tmp_path / "moved")
    else:
        shutil.rmtree(logs.parent)
    if loss == "replaced":
        logs.mkdir(parents=True)
        log.metrics.path.touch()
    with pytest.raises(OSError, match="was deleted or moved while it was trained") as caught:
        log.metrics.write([{"step": 2}])
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(logs.parent))
    if loss == "moved":
        assert (tmp_path / "moved" / "logs" / "metrics.jsonl").read_text() == '{"step":1}\n'
    log.close()


@pytest.mark.parametrize("moved", [False, True])
def test_training_ends_with_one_line_and_makes_nothing_anew(
    tiny_argv: Callable[..., list[str]],
    runs_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moved: bool,
) -> None:
    optimizer_step = utils.training.step.optimizer_step
    gone: list[Path] = []

    def patched(state: TrainState, *grad_norms: torch.Tensor) -> None:
        optimizer_step(state, *grad_norms)
        if state.step == 4:
            gone.extend(runs_dir.iterdir())
            shutil.move(runs_dir, tmp_path / "moved")
            if not moved:
                shutil.rmtree(tmp_path / "moved")

    monkeypatch.setattr(utils.training.step, "optimizer_step", patched)
    assert train.main(tiny_argv("--checkpoint-interval", "1")) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {gone[0]}: was deleted or moved while it was trained\n"
    assert "was not written" not in printed.out
    assert not runs_dir.exists()
