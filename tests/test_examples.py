"""The scripts in examples/ run, and use only the public interface."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY_FLAGS

import train
import utils.inference.generator
import workbench
from utils.runs import metrics
from utils.runs.log import read_metrics

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OWN = {path.stem for path in ROOT.glob("*.py")} | {"utils", "benchmarks", "tests"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder configured for a tiny experiment."""
    settings: dict[str, Any] = {name[2:].replace("-", "_"): int(value) for name, value in TINY_FLAGS.items()}
    settings |= {"corpora_dir": str(tmp_path / "corpora"), "runs_dir": str(tmp_path / "runs"), "sample_tokens": 0}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(yaml.safe_dump(settings))
    for module in (workbench, utils.inference.generator):
        monkeypatch.setattr(module, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def no_new_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the metrics that an example registers."""
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    yield
    sys.modules.pop("examples.smooth_loss", None)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_only_the_public_interface(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not OWN & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
            assert node.module == "workbench"
            assert {alias.name for alias in node.names} <= set(workbench.__all__)


def test_the_quickstart_trains_resumes_and_generates(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    text = example["main"](max_iters=6, stop_at_step=3)
    assert len(text) == 200
    printed = capsys.readouterr().out
    assert "after 6 steps" in printed
    assert "step     6  val loss" in printed
    assert workbench.runs.find("quickstart").status == "completed"


def test_the_example_of_comparing_seeds_trains_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "compare_seeds.py"))
    losses = example["compare"](seeds=(1, 2), max_iters=2)
    assert [len(found) for found in losses.values()] == [2, 2]
    assert losses["base"] != losses["faster"]
    found = {(run.config.train.seed, run.config.optimizer.learning_rate) for run in workbench.runs()}
    assert found == {(seed, rate) for seed in (1, 2) for rate in (1e-3, 3e-3)}
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["base", "faster"]


def test_the_smooth_loss_is_an_average_of_the_losses(
    no_new_metrics: None, tiny_argv: Any, monkeypatch: pytest.MonkeyPatch, runs_dir: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    assert train.main(tiny_argv("--callbacks", "examples.smooth_loss:SmoothLoss", "--max-iters", "20")) == 0
    (run,) = runs_dir.iterdir()
    average, expected = None, []
    for step, loss in read_metrics(run / "logs", "train/loss"):
        value = torch.tensor(loss)
        average = value if average is None else torch.lerp(value, average, 0.98)
        expected.append((step, average.item()))
    assert read_metrics(run / "logs", "train/smooth_loss") == expected
    assert len(expected) == 20
