"""Differences between runs: settings with their sources, code, corpus, environment, results, and the first step."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_runs import GIT, RESOLVED, indexed, make_run, write

from utils.errors import UserError
from utils.experiments.comparison_tables import column_name, diff_screen
from utils.experiments.diff import RESULTS, RunDiff, commits_between, diff, parse_environment, patch_difference
from utils.runs.index import IndexedRun, read_run
from utils.terminal.console import PrintableConsole

LOSSES = [{"step": step, "time": 1.0 * step, "train/loss": 4.0 - step / 7} for step in range(6)]


def section(result: RunDiff, title: str) -> dict[str, list[Any]]:
    return {row.name: row.values for row in result.sections.get(title, [])}


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, list[str]]:
    """A git repository, and its three commits from the oldest to the newest."""
    root = tmp_path / "repository"
    root.mkdir()
    commit = "git -c user.email=a@b -c user.name=a commit -q --allow-empty -m"
    script = f"git init -q . && {commit} one && {commit} two && {commit} three && git log --reverse --format=%H"
    shown = subprocess.run(["sh", "-c", script], cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    return root, shown.split()


def test_equal_runs_do_not_differ(runs_dir: Path, tmp_path: Path) -> None:
    runs = [indexed(runs_dir, run_id, metrics=LOSSES) for run_id in ("a", "b")]
    result = diff(runs, tmp_path)
    assert result.runs == ["a", "b"]
    assert (result.sections, result.commits, result.patch) == ({}, [], [])
    assert [(run, curve.identical, curve.steps) for run, curve in result.curves] == [("b", True, 6)]
    assert {row.name: row.values for row in result.results} == {
        "status": ["completed"] * 2,
        "steps": [100] * 2,
        "val_loss": [2.0] * 2,
        "last_val_loss": [2.5] * 2,
        "train_loss": [2.25] * 2,
        "duration": [10.5] * 2,
    }
    assert [row.name for row in result.results] == list(RESULTS)


def test_settings_are_reported_with_their_sources_by_kind(runs_dir: Path, tmp_path: Path) -> None:
    runs = [
        indexed(runs_dir, "a", settings={"seed": 1}),
        indexed(runs_dir, "b", settings={"seed": 2, "log_interval": 5, "corpora_dir": "x"}),
        indexed(runs_dir, "c"),
    ]
    result = diff(runs, tmp_path)
    (seed,) = result.sections["Settings that change the numbers"]
    assert (seed.name, seed.values, seed.sources) == ("seed", [1, 2, 1337], ["code", "code", "default"])
    assert section(result, "Settings of what is recorded") == {"log_interval": [1, 5, 1]}
    assert section(result, "Settings of the machine") == {"corpora_dir": ["corpora", "x", "corpora"]}
    assert [run for run, _ in result.curves] == ["b", "c"]


def test_likely_causes_come_first(runs_dir: Path, tmp_path: Path) -> None:
    one = indexed(runs_dir, "a")
    other = indexed(
        runs_dir,
        "b",
        settings={"seed": 2, "log_interval": 5, "corpora_dir": "x"},
        git={**GIT, "commit": "d" * 40, "branch": "other"},
        patch="a change\n",
        resolved={**RESOLVED, "corpus_hash": "another", "torch": "2.5.0"},
    )
    write(other.path / "meta" / "env.txt", "python: 3.12.0\npackages:\n  torch==2.4.0\n  numpy==2.0\n")
    result = diff([one, other], tmp_path)
    assert list(result.sections) == [
        *("Settings that change the numbers", "Code", "Corpus and tokenizer", "Environment and hardware"),
        *("Settings of what is recorded", "Settings of the machine"),
    ]
    code = section(result, "Code")
    assert (code["commit"], code["branch"]) == (["c" * 40, "d" * 40], ["main", "other"])
    assert code["patch (sha256)"][0] is None
    assert section(result, "Corpus and tokenizer") == {"corpus_hash": ["corpus", "another"]}
    assert section(result, "Environment and hardware") == {
        "python": ["3.11.2 (CPython)", "3.12.0"],
        "torch": ["2.4.0", "2.5.0"],
        "numpy": [None, "2.0"],
    }


def test_the_first_differing_step_is_reported(runs_dir: Path, tmp_path: Path) -> None:
    after = [dict(record) for record in LOSSES]
    after[3]["train/loss"] = 9.0
    runs = [indexed(runs_dir, "a", metrics=LOSSES), indexed(runs_dir, "b", metrics=after)]
    ((_, curve),) = diff(runs, tmp_path).curves
    assert curve.difference is not None
    assert (curve.difference.step, curve.difference.name, curve.difference.after) == (3, "train/loss", 9.0)


def test_a_run_that_cannot_be_read_is_reported(runs_dir: Path, tmp_path: Path) -> None:
    (runs_dir / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="empty: an empty folder"):
        diff([indexed(runs_dir, "a"), read_run(runs_dir / "empty")], tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta/env.txt", b"\xff\xfe"),
        ("meta/env.txt", b"nonsense"),
        ("meta/code.patch", b"\xff\xfe\0"),
        ("meta/config_sources.json", b"\xff{"),
        ("meta/config_sources.json", b'{"seed": 3}'),
        ("meta/config_sources.json", b"[" * 100_000),
        ("meta/full_config.json", b"{"),
        ("logs/metrics.jsonl", b"no JSON\n"),
        ("logs/metrics.jsonl", b"[1]\n"),
        ("logs/samples.jsonl", b'{"step": 1}\n'),
        ("logs/histograms.jsonl", b'{"step": 1}\n'),
        ("logs/metrics.jsonl", None),
        ("meta/env.txt", None),
        ("meta/code.patch", None),
    ],
)
def test_a_damaged_part_of_a_run_causes_at_most_a_user_error(
    runs_dir: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    good = indexed(runs_dir, "good", settings={"seed": 1}, samples=[{"step": 1, "text": "a"}])
    bad = make_run(runs_dir, "bad", settings={"seed": 2})
    (bad / name).unlink()
    if content is not None:
        write(bad / name, content)
    with contextlib.suppress(UserError):
        assert diff([good, read_run(bad)], tmp_path).runs == ["good", "bad"]


def test_the_environment_file_is_parsed(tmp_path: Path) -> None:
    text = "python: 3.11.2 (CPython)\ncpu: A: B\n\npackages:\n  torch==2.4.0\n  a-b==1.0\nnonsense\n"
    assert parse_environment(text) == {"python": "3.11.2 (CPython)", "cpu": "A: B", "torch": "2.4.0", "a-b": "1.0"}
    assert parse_environment("") == {}


def runs_of_commits(runs_dir: Path, *commits: Any) -> list[IndexedRun]:
    return [indexed(runs_dir, f"run{i}", git={**GIT, "commit": commit}) for i, commit in enumerate(commits)]


def test_commits_between_are_listed(runs_dir: Path, repository: tuple[Path, list[str]]) -> None:
    root, (one, two, three) = repository
    lines = commits_between(runs_of_commits(runs_dir, one, three), root)
    assert [line.split()[-1] for line in lines] == ["three", "two"]
    assert all(line.startswith(">") for line in lines)
    assert [line[0] for line in commits_between(runs_of_commits(runs_dir, three, two), root)] == ["<"]
    assert commits_between(runs_of_commits(runs_dir, one, one), root) == []
    assert len(commits_between(runs_of_commits(runs_dir, one, one, two), root)) == 1


@pytest.mark.parametrize("commit", [None, "0" * 40, "nonsense", "--all", "", 3, "HEAD"])
def test_commits_that_git_does_not_know_are_not_an_error(
    runs_dir: Path, repository: tuple[Path, list[str]], commit: Any
) -> None:
    root, (_, two, _) = repository
    assert isinstance(commits_between(runs_of_commits(runs_dir, two, commit), root), list)
    assert isinstance(commits_between(runs_of_commits(runs_dir, commit, two), root), list)
    assert commits_between(runs_of_commits(runs_dir, "a" * 40, two), runs_dir) == []  # no repository


def test_a_recorded_commit_is_never_taken_for_an_option_of_git(
    runs_dir: Path, repository: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, (_, two, _) = repository
    before = sorted(tmp_path.iterdir())
    commits_between(runs_of_commits(tmp_path / "repository" / "runs", f"--output={tmp_path}/written", two), root)
    assert sorted(tmp_path.iterdir()) == before


def patch_of_file(name: str, *lines: str) -> str:
    """The part of a patch that changes one file."""
    head = f"diff --git a/{name} b/{name}\nindex 123..456 100644\n--- a/{name}\n+++ b/{name}\n@@ -1 +1 @@\n"
    return head + "".join(f"{line}\n" for line in lines)


def test_the_difference_of_patches_is_shown_as_a_diff(runs_dir: Path) -> None:
    runs = [
        indexed(
            runs_dir, run_id, patch=patch_of_file("model.py", "+x", line) + patch_of_file("same.py", "-old", "+new")
        )
        for run_id, line in (("a", "+y"), ("b", "+y"), ("c", "+z"))
    ]
    assert patch_difference(runs) == ["@@ model.py", "@@ -1,2 +1,2 @@", " +x", "-+y", "++z"]
    assert patch_difference(runs[:2]) == []


def test_a_long_difference_of_patches_is_cut(runs_dir: Path) -> None:
    runs = [indexed(runs_dir, "a"), indexed(runs_dir, "b", patch=patch_of_file("f.py", *(f"+{i}" for i in range(100))))]
    lines = patch_difference(runs)
    assert len(lines) == 61
    assert lines[:3] == ["@@ f.py", "@@ -0,0 +1,100 @@", "++0"]
    assert lines[-1] == "... and 42 more lines"


def test_a_missing_patch_equals_an_empty_one(runs_dir: Path) -> None:
    runs = [indexed(runs_dir, "a"), indexed(runs_dir, "b")]
    (runs[0].path / "meta" / "code.patch").unlink()
    assert patch_difference(runs) == []


def test_a_loss_that_is_not_finite_has_no_difference(runs_dir: Path, tmp_path: Path) -> None:
    first, second = indexed(runs_dir, "a"), indexed(runs_dir, "b", summary={"best_val_loss": "inf", "val/loss": 2.0})
    console = PrintableConsole(file=io.StringIO(), width=80)
    for part in diff_screen(diff([first, second], tmp_path)):
        console.print(part)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["best", "val", "loss", "2.0000", "inf"] in lines
    assert ["last", "val", "loss", "2.5000", "2.0000", "-0.5000"] in lines


def test_more_runs_than_letters_have_names_of_two() -> None:
    assert [column_name(index) for index in (0, 25, 26, 51, 52, 702)] == ["A", "Z", "AA", "AZ", "BA", "AAA"]
