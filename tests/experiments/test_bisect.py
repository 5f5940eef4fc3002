"""Bisection finds the smallest set of settings and the first bad commit. A formula replaces training."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, git
from fake_runs import make_run, training_records

import experiments
from utils.experiments import trials
from utils.experiments.bisect import Bisection, bisect
from utils.experiments.delta import Outcome, first_bad, smallest_set

NO_GIT = {"commit": None, "branch": None, "dirty": None, "remote": None, "code": None}
TEN = {  # settings of the bad experiment: all differ from the defaults
    **{"n_layer": 3, "dropout": 0.3, "weight_decay": 0.01, "beta2": 0.95, "learning_rate": 0.01},
    **{"grad_clip": 0.5, "min_lr": 1e-5, "batch_size": 8, "norm": "rmsnorm", "mlp": "relu2"},
}
Loss = Callable[[dict[str, str], Path], float]


@pytest.mark.parametrize("culprits", [{3}, {0, 9}, {4, 5}, {1, 2, 8}, set(range(10))])
def test_the_smallest_set_of_changes_is_found(culprits: set[int]) -> None:
    tested: list[Sequence[int]] = []

    def test(some: Sequence[int]) -> Outcome:
        tested.append(some)
        return "bad" if culprits <= set(some) else "good"

    assert smallest_set(range(10), test) == sorted(culprits)
    assert len(tested) == len({tuple(some) for some in tested}) <= 60


def test_combinations_that_cannot_be_tested_are_skipped() -> None:
    def test(some: Sequence[int]) -> Outcome:
        if (2 in some) != (3 in some):  # neither works without the other
            return "unresolved"
        return "bad" if {2, 7} <= set(some) else "good"

    assert smallest_set(range(10), test) == [2, 3, 7]


@pytest.mark.parametrize("first", range(1, 17))
def test_the_first_bad_commit_of_sixteen_takes_at_most_four_tests(first: int) -> None:
    tested: list[int] = []

    def test(index: int) -> Outcome:
        tested.append(index)
        return "bad" if index >= first else "good"

    assert first_bad(17, test) == (first - 1, first)
    assert len(tested) <= 4


def test_commits_that_cannot_be_judged_remain_between_good_and_bad() -> None:
    outcomes: list[Outcome] = ["good", "good", "unresolved", "unresolved", "bad", "bad"]
    assert first_bad(6, outcomes.__getitem__) == (1, 4)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], list[dict[str, str]]]:
    """Replace train.py with a formula for the loss, and return the flags of each call."""

    def replace(loss: Loss) -> list[dict[str, str]]:
        commands: list[dict[str, str]] = []

        def train(project: Path, flags: Sequence[str], runs_dir: Path, *_: Any) -> tuple[Path, int]:
            words = [word for flag in flags for word in flag.split("=", 1)]
            named = {w[2:].replace("-", "_"): v for w, v in zip(words, [*words[1:], ""], strict=True) if w[:2] == "--"}
            commands.append(named)
            last = loss(named, project)
            records = training_records([3.0, last if math.isfinite(last) else "nan"])
            metrics = [{"train/loss": 4.0, **record} for record in records]
            settings = {"seed": int(named["seed"])}
            path = make_run(runs_dir, f"run_{len(commands)}", settings=settings, metrics=metrics, git=NO_GIT)
            (path / "artifacts").mkdir(exist_ok=True)
            return path, 0

        monkeypatch.setattr(trials, "run_training", train)
        return commands

    return replace


def find(good: str, bad: str, runs_dir: Path, root: Path = ROOT, **options: Any) -> Bisection:
    return bisect(good, bad, root, runs_dir, output=io.StringIO(), **options)


def seeds_of(runs_dir: Path, tag: str, settings: dict[str, Any], losses: Sequence[float]) -> None:
    for seed, loss in enumerate(losses, start=1):
        metrics = training_records([3.0, loss])
        make_run(runs_dir, f"{tag}_{seed}", tag=tag, settings={"seed": seed, **settings}, metrics=metrics, git=NO_GIT)


def test_a_pair_of_interacting_settings_among_ten_is_found(
    runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    seeds_of(runs_dir, "good", {}, [2.01, 2.02, 2.03])
    seeds_of(runs_dir, "bad", TEN, [2.51, 2.521, 2.532])

    def loss(flags: dict[str, str], _: Path) -> float:
        noise = random.Random(repr(sorted(flags.items()))).gauss(0, 0.005)
        both = "dropout" in flags and "beta2" in flags
        return 2.0 + 0.01 * int(flags["seed"]) + (0.5 if both else 0.0) + noise

    training(loss)
    assert experiments.main(["bisect", "good", "bad", "--runs-dir", str(runs_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] is None
    assert found["settings"] == {"dropout": [0.0, 0.3], "beta2": [0.99, 0.95]}
    assert not found["code"]
    assert experiments.main(["bisect", "good", "bad", "--runs-dir", str(runs_dir), "--seeds", "1"]) == 0
    assert "dropout and beta2 make the difference" in capsys.readouterr().out


def test_a_difference_within_the_noise_is_not_bisected(
    runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]]
) -> None:
    seeds_of(runs_dir, "good", {}, [2.0, 2.0, 2.0])
    seeds_of(runs_dir, "bad", {"dropout": 0.1}, [2.1, 1.9, 2.02])
    commands = training(lambda *_: 2.0)
    assert "too little for 3 seeds to tell from noise" in str(find("good", "bad", runs_dir).problem)
    assert not commands


@pytest.fixture
def sixteen(tmp_path: Path) -> Path:
    """A repository with a first commit and sixteen more, whose numbers are in code.py."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    for number in range(17):
        (folder / "code.py").write_text(f"{number}\n")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", f"change {number}")
    return folder


@pytest.mark.parametrize("oracle", ["bits", "loss"])
def test_the_first_bad_commit_of_sixteen_is_found(
    sixteen: Path, runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]], oracle: Any
) -> None:
    def loss(flags: dict[str, str], project: Path) -> float:
        seed, broken = int(flags["seed"]), int((project / "code.py").read_text()) >= 11
        return 2.0 + 0.001 * seed**2 + (0.1 + 0.001 * seed if broken else 0.0)

    commands = training(loss)
    found = find("HEAD~16", "HEAD", runs_dir, sixteen, oracle=oracle)
    assert found.problem is None
    assert str(found.commit).endswith(" change 11")
    assert found.code
    assert not found.settings
    assert len(commands) <= {"bits": 8, "loss": 21}[oracle]


def test_a_commit_that_cannot_be_trained_is_skipped_and_named_as_doubtful(
    sixteen: Path, runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]]
) -> None:
    def loss(_: dict[str, str], project: Path) -> float:
        number = int((project / "code.py").read_text())
        return float("nan") if number in (10, 11) else 2.5 if number >= 11 else 2.0

    training(loss)
    found = find("HEAD~16", "HEAD", runs_dir, sixteen, oracle="loss", seeds=1)
    assert str(found.commit).endswith(" change 12")
    assert [commit[13:] for commit in found.doubtful] == ["change 10", "change 11"]


def test_subjects_with_the_same_numbers_are_not_bisected(
    sixteen: Path, runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]]
) -> None:
    training(lambda *_: 2.0)
    assert find("HEAD~2", "HEAD", runs_dir, sixteen).problem == "both log the same numbers"
    assert find("HEAD", "HEAD", runs_dir, sixteen).problem == "no setting and no code differs"


def test_dropping_the_changes_of_the_good_side_is_a_separate_step(
    sixteen: Path, runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]], tmp_path: Path
) -> None:
    patch = tmp_path / "good.patch"
    (sixteen / "model.py").write_text("better\n")
    git(sixteen, "add", "-A")
    patch.write_text(git(sixteen, "diff", "--cached"))
    git(sixteen, "reset", "-q", "--hard")

    def loss(flags: dict[str, str], project: Path) -> float:
        return 2.0 + 0.001 * int(flags["seed"]) ** 2 + (0.0 if (project / "model.py").is_file() else 0.1)

    training(loss)
    found = find(str(patch), "HEAD", runs_dir, sixteen, oracle="bits")
    assert str(found.commit).endswith("without its uncommitted changes")


def test_histories_without_a_common_commit_blame_the_code_but_no_commit(
    sixteen: Path, runs_dir: Path, training: Callable[[Loss], list[dict[str, str]]]
) -> None:
    git(sixteen, "checkout", "-q", "--orphan", "other")
    (sixteen / "code.py").write_text("0\n")
    git(sixteen, "commit", "-qam", "another beginning")
    training(lambda flags, project: 2.0 + int((project / "code.py").read_text()) / 10)
    found = find("other", "other~0", runs_dir, sixteen, oracle="bits")
    assert found.problem == "no setting and no code differs"
    main = git(sixteen, "branch", "--format=%(refname:short)").split()
    found = find("other", next(name for name in main if name != "other"), runs_dir, sixteen, oracle="bits")
    assert (found.problem, found.code, found.commit) == (None, True, None)
