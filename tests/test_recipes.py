"""The recipes of docs/architecture.md work when applied to a copy of the project."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, copy_code, git

from utils.runs.log import read_metrics

pytestmark = pytest.mark.usefixtures("warm_processes")
SOURCES = (".gitignore", "train.py", "model.py", "data.py", "tokenizer.py", "utils", "configs")


def recipe(name: str) -> str:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (patch,) = re.findall(rf"```diff recipe={name}\n(.*?)```", text, flags=re.DOTALL)
    return str(patch)


@pytest.mark.parametrize(
    ("name", "flags", "metric"),
    [
        ("metric", [], "val/perplexity"),
        ("optimizer", ["--optimizer-name", "sgd"], "val/loss"),
        ("schedule", ["--schedule", "sqrt"], "lr"),
        ("mlp", ["--mlp", "bilinear"], "val/loss"),
        ("norm", ["--norm", "l2norm", "--qk-norm"], "val/loss"),
    ],
)
def test_a_recipe_works(
    name: str, flags: list[str], metric: str, tmp_path: Path, tiny_argv: Callable[..., list[str]], runs_dir: Path
) -> None:
    copy = tmp_path / "project"
    copy_code(copy, *SOURCES)
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["commit", "-q", "-m", "a copy"],
    ):  # or a run records it all
        git(copy, *words)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=recipe(name), text=True, check=True)
    command = [sys.executable, "train.py", *tiny_argv(*flags)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = runs_dir.iterdir()
    assert len(read_metrics(run / "logs", metric)) >= 3
