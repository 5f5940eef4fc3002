"""Tests that take tens of seconds: learning real text, and a real compiler (make test-slow)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from utils.corpora.sources import find_source
from utils.runs.log import read_metrics, read_records
from utils.runs.run import read_record

pytestmark = pytest.mark.slow


def test_the_default_experiment_imitates_its_text(tmp_path: Path, runs_dir: Path) -> None:
    places = ["--runs-dir", str(runs_dir), "--aim-repo", str(tmp_path), "--corpora-dir", str(tmp_path)]
    assert train.main([*places, "--max-iters", "1000", "--sample-tokens", "400"]) == 0
    (run,) = runs_dir.iterdir()
    assert read_metrics(run / "logs", "val/loss")[-1][1] < 1.8
    assert read_record(run)["views"]["aim"]["state"] == "complete"
    vocabulary = set(re.findall(r"[a-z]{3,}", find_source("pydocs", tmp_path).read()))
    samples = [re.findall(r"[a-z]{3,}", record["text"]) for record in read_records(run / "logs" / "samples.jsonl")]
    known = [sum(word in vocabulary for word in words) for words in samples]
    assert known[-1] > known[0] + 5  # words of the text instead of noise


def test_compiled_training_follows_eager_training(tiny_argv: Callable[..., list[str]], runs_dir: Path) -> None:
    assert train.main(tiny_argv("--run-tag", "eager")) == 0
    assert train.main(tiny_argv("--run-tag", "compiled", "--compile")) == 0
    compiled, eager = sorted(runs_dir.iterdir(), key=lambda path: path.name[16:])
    assert read_record(compiled)["resolved"]["compiled"] is True
    losses = [[value for _, value in read_metrics(run / "logs", "train/loss")] for run in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
