"""Training a run again and comparing the logs, with real repositories and processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS, copy_code, git
from warm_python import WarmPython

import experiments
import train
from utils.experiments import reproduce as reproduction
from utils.experiments import training_process
from utils.experiments.bits import Difference, LogComparison
from utils.experiments.recorded_code import ReproductionError
from utils.experiments.reproduce import Reproduction, environment_differences, reproduce
from utils.runs.index import read_run

Argv = Callable[..., list[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project in a new repository, with uncommitted changes and an untracked module."""
    folder = tmp_path / "project"
    copy_code(folder, "utils", "configs", ".gitignore", *(path.name for path in ROOT.glob("*.py")))
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "code")
    model = folder / "model.py"
    model.write_text(
        model.read_text()
        .replace("import math\n", "import math\n\nimport my_scale\n", 1)
        .replace('"residual projection": 0.02', '"residual projection": my_scale.SCALE * 0.02')
    )
    (folder / "my_scale.py").write_text("import torch\nSCALE = 0.5\n")
    return folder


@pytest.mark.slow
def test_a_run_of_changed_code_with_an_untracked_module_is_reproduced(
    project: Path, tmp_path: Path, tiny_corpus: Path, warm_python: WarmPython
) -> None:
    flags = {**TINY_FLAGS, "--max-iters": "200", "--eval-interval": "50", "--dataset": str(tiny_corpus)}
    words = [word for pair in flags.items() for word in pair]
    train_py = [warm_python.path, "train.py", "--run-tag", "first", "--no-aim-logging", *words]
    subprocess.run(train_py, cwd=project, check=True, capture_output=True)
    (run,) = (project / "runs").iterdir()
    patch = (run / "meta" / "code.patch").read_text()
    assert "my_scale.SCALE * 0.02" in patch
    assert "SCALE = 0.5" in patch
    (project / "my_scale.py").unlink()
    git(project, "checkout", "-q", "model.py")  # the recorded code is no longer the current code
    command = [warm_python.path, "experiments.py", "reproduce", "first", "--json"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["verdict"] == "identical for 200 steps, and the same weights"
    again = read_run(project / "runs" / answer["repetition"])
    assert again.record["parent"] == {"run": run.name, "path": str(run), "step": 0, "relation": "reproduction"}
    assert (again.path / "meta" / "code.patch").read_text() == patch
    assert experiments.main(["check", str(again.path)]) == 0
    assert again.record["tag"] == "first-repeated"

    current = subprocess.run(
        [*command, "--code", "current", "--steps", "60"], cwd=project, capture_output=True, text=True
    )
    assert current.returncode == 1, current.stderr
    assert json.loads(current.stdout)["verdict"].startswith("first difference at step 0: train/")


@pytest.fixture
def run(tiny_argv: Argv, only_run: Callable[[], Path], prompt_writes: None) -> Path:
    assert (
        train.main(tiny_argv("--max-iters", "12", "--run-tag", "one", "--checkpoint-interval", "4", "--no-keep-best"))
        == 0
    )
    return only_run()


@pytest.mark.slow
def test_a_run_is_reproduced_from_a_checkpoint_with_the_current_code(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from-checkpoint", "--code", "current", "--runs-dir", str(run.parent)]
    assert experiments.main(["reproduce", "one", *words]) == 0
    assert "identical for 4 steps" in capsys.readouterr().out  # 8 is the newest checkpoint before the end


@pytest.mark.slow
def test_settings_of_logging_that_a_resume_changed_are_not_a_difference(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny_argv("--max-iters", "12", "--run-tag=-x", "--sample-tokens", "5", "--stop-at-step", "6")
    assert train.main(first) == 0
    run = only_run()
    resume = ["--resume", str(run), "--log-interval", "4", "--sample-tokens", "7", "--sample-prompt", "a"]
    assert train.main([*resume, "--checkpoint-interval", "3"]) == 0
    capsys.readouterr()
    assert experiments.main(["reproduce", str(run), "--code", "current"]) == 0
    assert "identical for 7 steps, and the same weights" in capsys.readouterr().out  # steps 0 to 5, and 8


@pytest.mark.slow
def test_another_dropout_is_found_at_its_first_step(run: Path) -> None:
    path = run / "meta" / "full_config.json"
    config = json.loads(path.read_text())
    config["model"]["dropout"] = 0.1
    path.write_text(json.dumps(config))
    found = reproduce(read_run(run), ROOT, steps=5, code="current", progress=sys.stderr)
    assert not found.identical
    assert found.logs.difference is not None
    assert found.verdict.startswith("first difference at step 0: train/")
    assert found.expected == 5


def test_a_different_environment_is_reported(run: Path) -> None:
    other = run.with_name("other")
    shutil.copytree(run, other)
    record = json.loads((other / "run.json").read_text())
    record["resolved"]["threads"] = 7
    (other / "run.json").write_text(json.dumps(record))
    text = (other / "meta" / "env.txt").read_text()
    (other / "meta" / "env.txt").write_text(text.replace("  torch==", "  torch==9."))
    first, second = environment_differences(read_run(run), read_run(other))
    assert first.startswith("torch ")
    assert " -> 9." in first
    assert second == "threads 1 -> 7"


# ---------------------------------------------------------------------------------------------- verdicts


def outcome(**facts: object) -> Reproduction:
    common = {
        **{"run": "a", "repetition": "b", "status": "completed", "exit_status": 0, "first": 0, "expected": 200},
        **{"logs": LogComparison(200, None), "weights": None, "environment": [], "unknown": []},
    }
    return Reproduction(**{**common, **facts})  # type: ignore[arg-type]


def test_the_verdict_names_the_first_difference_and_the_environment() -> None:
    assert outcome().verdict == "identical for 200 steps"
    logs = LogComparison(37, Difference(37, "train/loss", 1.98304, 1.98311))
    found = outcome(logs=logs, environment=["torch 2.13.0 -> 2.14.0"])
    assert found.verdict == (
        "first difference at step 37: train/loss 1.98304 vs 1.98311; environment differs in: torch 2.13.0 -> 2.14.0"
    )
    assert not found.identical


def test_a_repetition_that_ended_early_is_not_identical() -> None:
    found = outcome(logs=LogComparison(150, None), status="failed")
    assert not found.identical
    assert "150 of 200 steps; the repetition ended as failed" in found.verdict


def test_other_weights_are_not_identical() -> None:
    assert not outcome(weights=False).identical
    assert "weights differ" in outcome(weights=False).verdict


# --------------------------------------------------------------------------------------------- bad input


def edited_record(run: Path, **facts: object) -> Path:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **facts}))
    return run


def test_a_run_on_several_ranks_without_lanes_needs_as_many_ranks(run: Path, tmp_path: Path) -> None:
    resolved = json.loads((run / "run.json").read_text())["resolved"]
    edited_record(run, resolved={**resolved, "world_size": 2})
    with pytest.raises(
        ReproductionError, match=r"2 ranks without lanes.* torchrun --standalone --nproc-per-node 2 train"
    ):
        reproduce(read_run(run), ROOT)


def test_a_run_that_cannot_be_reproduced_is_refused_with_the_reason(run: Path) -> None:
    parent = {"run": "gone", "path": str(run.parent / "gone"), "step": 4, "relation": "fork"}
    with pytest.raises(ReproductionError, match=r"began with weights of gone, which is neither beside it in .* nor at"):
        reproduce(read_run(edited_record(run, parent=parent)), ROOT)
    shutil.rmtree(run / "artifacts" / "checkpoints")
    with pytest.raises(ReproductionError, match="has no checkpoint before step 12"):
        reproduce(read_run(edited_record(run, parent=None)), ROOT, from_checkpoint=True)
    (run / "logs" / "metrics.jsonl").unlink()
    with pytest.raises(ReproductionError, match="has logged nothing"):
        reproduce(read_run(run), ROOT)
    (run / "meta" / "full_config.json").unlink()
    with pytest.raises(ReproductionError, match="nothing to reproduce"):
        reproduce(read_run(run), ROOT)


def test_a_failed_reproduction_leaves_no_temporary_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(training_process, "_train", lambda *words: (1, 0))
    with pytest.raises(ReproductionError, match="made no run directory"):
        reproduce(read_run(run), ROOT, code="current")
    assert not list((tmp_path / "temporary").iterdir())
