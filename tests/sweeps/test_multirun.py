"""`train.py --multirun`: a run for each combination, and their comparison."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from utils.config.parse import ConfigError
from utils.runs.find import list_run_paths
from utils.runs.run import read_record
from utils.sweeps.multirun import space_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_words_of_multirun_define_a_grid() -> None:
    space = space_of(["learning-rate=1e-3,3e-3", "seed=1,2", "bias=true", "warmup_iters=none,5"])
    assert [(one.key, one.values) for one in space.dimensions] == [
        ("learning_rate", (1e-3, 3e-3)),
        ("seed", (1, 2)),
        ("warmup_iters", (None, 5)),
    ]
    assert {key: setting.value for key, setting in space.fixed.items()} == {"bias": True}


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("rope_scaling=none,linear", ("none", "linear")),  # here none is a choice, not a missing value
        ("packing=none,documents", ("none", "documents")),
        ("logit_softcap=None,30", (None, 30)),
        ("bias=yes,off", (True, False)),
    ],
)
def test_a_value_means_the_same_as_in_a_configuration_file(word: str, values: tuple[object, ...]) -> None:
    (dimension,) = space_of([word]).dimensions
    assert dimension.values == values


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed", "--multirun: expected SETTING=VALUE,VALUE, got 'seed'"),
        ("seed=1,,2", "--multirun: expected SETTING=VALUE,VALUE, got 'seed=1,,2'"),
        ("sed=1,2", "--multirun: unknown setting sed; did you mean seed?"),
        ("seed=1,x", "--multirun: seed: expected integer >= 0"),
        ("seed=1,1", "--multirun: seed: a value is given twice: 1,1"),
        ("seed=1", "--multirun: expected a setting with several values: SETTING=A,B"),
        ("run_tag=a,b", "--multirun: run_tag is set for each run"),
        ("optimizer_name=adamw,muo", "did you mean muon?"),
        ("bias=true,yes", "--multirun: bias: a value is given twice: true,yes"),
        ("qkv_bias=none,true", "--multirun: qkv_bias: expected true or false, got none"),
        (
            "ngram_rows=64,128",
            "--multirun: ngram_rows is a list, and commas separate values here: --ngram-rows sets it",
        ),
        ("bias=true,maybe", "--multirun: bias: expected true or false, got 'maybe'"),
    ],
)
def test_a_mistake_is_reported_in_one_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        space_of([word])
    (line,) = str(error.value).splitlines()
    assert message in line


@pytest.mark.parametrize("tag", ["_a", "a" * 51])
def test_a_tag_that_cannot_name_a_sweep_is_rejected(
    tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--multirun", "seed=1,2", f"--run-tag={tag}", f"--runs-dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err.startswith("error: --run-tag: the name of a sweep is a letter or digit, then")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_multirun_trains_each_combination_once_and_compares_the_runs(tmp_path: Path) -> None:
    words = [sys.executable, "tests/sweeps/stand_in.py", f"--runs-dir={tmp_path / 'runs'}", "--max-iters=2"]
    words += ["--eval-interval=1", "--run-tag=grid", "--jobs=2", "--multirun", "learning_rate=1e-3,1e-2", "seed=1,2"]
    first = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    records = [read_record(path) for path in list_run_paths(tmp_path / "runs")]
    assert sorted(record["tag"] for record in records) == ["grid-0", "grid-1", "grid-2", "grid-3"]
    assert "grid: 4 complete trials" in first.stdout
    assert "Comparison" in first.stdout
    again = subprocess.run([*words, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(again.stdout)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 4
    assert [len(group["runs"]) for group in found["comparison"]["groups"]] == [2, 2]
    assert len(list_run_paths(tmp_path / "runs")) == 4
    shutil.rmtree(list_run_paths(tmp_path / "runs")[0])
    without = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"! \S+_grid-\d: it is gone: no such run directory", without.stdout)
    other = subprocess.run([*words, "weight_decay=0,1"], cwd=ROOT, capture_output=True, text=True)
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "is a different sweep: weight_decay was not searched" in other.stderr
