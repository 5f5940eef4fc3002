"""A signal during an evaluation stops the run between two batches, and the resumed run makes that evaluation."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import train
from utils.checkpoints.folder import list_checkpoints
from utils.runs.layout import CHECKPOINTS, EXPORT, METRICS_LOG
from utils.runs.log import read_records
from utils.runs.run import read_record
from utils.terminal.progress import TrainingProgress

Argv = Callable[..., list[str]]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["val/loss"]) for record in read_records(run / METRICS_LOG) if "val/loss" in record]


def stop_during_evaluation(monkeypatch: pytest.MonkeyPatch, step: int) -> list[tuple[int, int]]:
    """Send SIGTERM after four batches of the evaluation at `step`; returns (step, batches done) of every report."""
    seen: list[tuple[int, int]] = []

    def evaluating(_display: TrainingProgress, now: int, done: int, _total: int) -> None:
        seen.append((now, done))
        if (now, done) == (step, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "evaluating", evaluating)
    return seen


def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_it(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert train.main(tiny_argv("--run-tag", "whole")) == 0
    (whole,) = runs_dir.iterdir()
    for step in (0, 6):
        with monkeypatch.context() as patch:
            seen = stop_during_evaluation(patch, step)
            assert train.main(tiny_argv("--run-tag", f"stopped-{step}")) == 143
        assert seen[-1] == (step, 4)
        (run,) = runs_dir.glob(f"*_stopped-{step}")
        record = read_record(run)
        assert (record["status"], record["last_step"]) == ("interrupted", step)
        assert step in dict(list_checkpoints(run / CHECKPOINTS))
        assert not (run / EXPORT).exists()
        assert step not in dict(losses(run))
        assert train.main(["--resume", str(run)]) == 0
        assert losses(run) == losses(whole)
        assert (run / EXPORT / "model.safetensors").read_bytes() == (whole / EXPORT / "model.safetensors").read_bytes()


def test_an_export_of_the_best_weights_has_their_loss_even_if_their_checkpoint_preceded_the_evaluation(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    diverging = ("--learning-rate", "5", "--warmup-iters", "0", "--schedule", "constant")
    with monkeypatch.context() as patch:
        stop_during_evaluation(patch, 0)
        assert train.main(tiny_argv("--export-weights", "best", *diverging)) == 143
    run = only_run()
    assert train.main(["--resume", str(run)]) == 0
    facts = json.loads((run / EXPORT / "config.json").read_text())["training"]
    assert (facts["weights"], facts["step"]) == ("best", 0)
    assert facts["val/loss"] == dict(losses(run))[0]
