"""`--budget`: as many steps as fit into a time; the run equals the one with that --max-iters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from utils.inference.evaluation import BatchLoss
from utils.runs.find import list_run_paths
from utils.runs.layout import CONFIG, CONFIG_SOURCES, METRICS_LOG
from utils.runs.log import read_metrics
from utils.runs.run import read_record
from utils.terminal.cli import Parser, timespan
from utils.terminal.config_flags import parse_experiment
from utils.terminal.console import Terminal
from utils.training import budget
from utils.training.budget import steps_within
from utils.training.evaluate import prepare_evaluation
from utils.training.setup import make_setup
from utils.training.state import TrainState


def without_max_iters(argv: list[str]) -> list[str]:
    place = argv.index("--max-iters")
    return argv[:place] + argv[place + 2 :]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172800)])
def test_a_time_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert timespan(text) == seconds


@pytest.mark.parametrize("text", ["5", "m", "-5m", "5 minutes", "0s", "nan", ""])
def test_an_invalid_time_is_refused_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([f"--budget={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--budget: expected a time like 90s, 5m or 1.5h" in line


@pytest.mark.parametrize("interval", [1, 7, 1000])
@pytest.mark.parametrize("seconds", [0.5, 3.0, 60.0])
def test_as_many_steps_as_possible_fit_with_their_evaluations(seconds: float, interval: int) -> None:
    def total(steps: int) -> float:
        evaluations = 1 + -(-steps // interval)
        return steps * 0.01 + evaluations * 0.2

    steps = steps_within(seconds, 0.01, 0.2, interval)
    assert steps == 0 or total(steps) <= seconds
    assert total(steps + 1) > seconds


def test_the_run_equals_one_with_that_many_max_iters(
    tiny_argv: Callable[..., list[str]], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = without_max_iters(tiny_argv())
    measured, step_times = budget.measure, []

    def measure(*args: object) -> tuple[float, float, int]:
        step, evaluation, count = measured(*args)  # type: ignore[arg-type]
        step_times.append(step)
        assert evaluation > 0
        return 0.1, 0.2, count

    monkeypatch.setattr(budget, "measure", measure)
    assert train.main([*argv, "--budget", "2s"]) == 0
    (run,) = list_run_paths(runs_dir)
    record, config = read_record(run), json.loads((run / CONFIG).read_text())
    assert config["train"]["max_iters"] == 10  # 1 s, and evaluations at 0, 3, 6, 9, 10
    assert step_times[0] > 0
    facts = {"seconds": 2.0, "max_iters": 10, "seconds_per_step": 0.1, "seconds_per_evaluation": 0.2}
    assert record["budget"].items() >= facts.items()
    assert record["budget"].keys() - facts.keys() == {"tokens_per_second", "warmup_steps", "measured_steps"}
    assert json.loads((run / CONFIG_SOURCES).read_text())["max_iters"]["source"] == "--budget 2s"
    assert train.main([*argv, "--max-iters", "10"]) == 0
    _, other = list_run_paths(runs_dir)
    assert read_record(other)["config_hash"] == record["config_hash"]
    logs = [read_metrics((path / METRICS_LOG).parent, "train/loss") for path in (run, other)]
    assert logs[0] == logs[1]


def test_the_measured_evaluation_is_prepared_as_in_training(
    tiny_argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[TrainState] = []

    def prepare(state: TrainState) -> BatchLoss:
        prepared.append(state)
        return prepare_evaluation(state)

    monkeypatch.setattr(budget, "prepare_evaluation", prepare)
    setup = make_setup(parse_experiment(tiny_argv(), Parser(prog="train.py")).load(), tmp_path)
    budget.measure(setup, 0.1, Terminal(quiet=True))
    (state,) = prepared
    assert state.eval_loss is not None
    assert state.eval_loss.graph  # has an effect on CUDA only


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget=1s", "--max-iters=3"), "--budget and --max-iters both say when the run ends"),
        (("--budget=1s", "--epochs=3"), "--budget and --epochs both say when the run ends"),
        (("--budget=1s", "--multirun", "seed=1,2"), "--multirun starts runs from scratch"),
    ],
)
def test_flags_that_contradict_a_budget_are_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(list(flags)) == 2
    assert message in capsys.readouterr().err


def test_a_budget_shorter_than_one_step_is_refused_in_one_line(
    tiny_argv: Callable[..., list[str]], runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(without_max_iters(tiny_argv("--budget", "0.0001s"))) == 2
    assert "--budget: 0.0001 s are too short: a step takes" in capsys.readouterr().err
    assert not runs_dir.exists()
