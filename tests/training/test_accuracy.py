"""Runs on generated arithmetic log val/accuracy, resume like any other, and can be evaluated by evaluate.py."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import evaluate
import experiments
from model import LanguageModel
from train import train
from utils.config.loader import ConfigLoader, LoadedConfig
from utils.config.settings import Config
from utils.inference.exact_match import Question, greedy_answers
from utils.runs.evaluations import read_evaluations
from utils.runs.layout import ARITHMETIC_PICTURE, CONFIG, METRICS_LOG
from utils.runs.origin import Origin
from utils.runs.run import read_record
from utils.terminal.console import Terminal
from utils.training.budget import measure
from utils.training.setup import make_setup


def settings(folder: Path, **train_settings: Any) -> Config:
    defaults = {"batch_size": 8, "eval_interval": 2, "eval_iters": 2, "threads": 1, "device": "cpu"}
    sections: dict[str, Any] = {
        "data": {"dataset": "arithmetic", "corpora_dir": str(folder / "corpora"), "packing": "none", "loss_after": "="},
        "arithmetic": {"arithmetic_digits": 1, "arithmetic_format": "reversed"},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
        "train": {**defaults, **train_settings},
        "tracking": {"runs_dir": str(folder / "runs"), "histogram_interval": 0, "sample_tokens": 0},
    }
    return Config.model_validate(sections)


def test_a_run_on_arithmetic_logs_its_accuracy_and_can_be_evaluated_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(settings(tmp_path, max_iters=4, stop_at_step=2), quiet=True).run_dir
    assert json.loads((run / CONFIG).read_text())["data"]["dataset"] == "arithmetic"
    assert read_record(run)["resolved"]["corpus_hash"]
    origin = Origin("resume", run)
    train(LoadedConfig.from_config(settings(tmp_path, max_iters=4)), origin=origin, quiet=True)
    records = [json.loads(line) for line in (run / METRICS_LOG).read_text().splitlines()]
    accuracy = {record["step"]: record["val/accuracy"] for record in records if "val/accuracy" in record}
    assert [*accuracy] == [0, 2, 4]
    assert all(0 <= value <= 1 for value in accuracy.values())
    assert read_record(run)["summary"]["val/accuracy"] == accuracy[4]

    config = ConfigLoader(evaluate.PROJECT_ROOT).load()
    config = LoadedConfig(settings(tmp_path), config.layers)
    monkeypatch.setattr(ConfigLoader, "load", lambda self, *args: config)
    words = [run.name, "--device", "cpu", "--json", "--task", "arithmetic"]
    assert evaluate.main(words) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["evaluations"]
    assert found["accuracy"] == accuracy[4]  # both ask all questions, which are fewer than MAX_QUESTIONS
    assert (run / ARITHMETIC_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert read_evaluations(run)[0][0]["by_operator_and_digits"] == found["by_operator_and_digits"]
    assert evaluate.main(words[:-2]) == 0  # the loss over its own validation split
    captured = capsys.readouterr()
    assert "here every token counts" in captured.err
    experiments.main(["show", run.name])
    shown = capsys.readouterr().out
    assert "last val/accuracy" in shown
    assert f"{found['accuracy']:.2%}" in shown
    assert "val of arithmetic" in shown
    assert experiments.main(["seen", run.name, "--step", "1", "--json"]) == 0
    passages = json.loads(capsys.readouterr().out)["passages"]
    assert all(re.fullmatch(r"\d[+-]\d=-?\d\d", passage["text"]) for passage in passages)


def test_the_measurement_for_a_budget_includes_the_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, answered = Terminal(quiet=True), []
    loaded = LoadedConfig.from_config(settings(tmp_path, max_iters=4))
    setup = make_setup(loaded, tmp_path, None, terminal.warn, terminal.print)

    def answers(model: LanguageModel, questions: Sequence[Question]) -> list[list[int]]:
        answered.append(model.training)
        return greedy_answers(model, questions)

    monkeypatch.setattr("utils.inference.exact_match.greedy_answers", answers)
    measure(setup, 1.0, terminal)
    assert answered == [False]
