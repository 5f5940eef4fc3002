"""Corpora, runs, projects and exports that were moved, copied or linked are recognised by their content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aim import Repo
from conftest import ROOT, TINY_FLAGS, copy_code

import experiments
import inference
import train
from utils.config.fields import config_hash, field_fact
from utils.config.settings import Config
from utils.experiments.compare import compare
from utils.experiments.diff import diff
from utils.experiments.reproduce import reproduce
from utils.runs.find import moved_path
from utils.runs.identity import differing_settings
from utils.runs.index import read_run
from utils.runs.run import is_copy, read_record
from utils.tracking import feeder

pytestmark = pytest.mark.usefixtures("prompt_writes")
Argv = Callable[..., list[str]]
STOPPED = ("--stop-at-step", "3", "--checkpoint-interval", "3")


@pytest.fixture(autouse=True)
def fresh_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aim caches its list of runs for half a second; a failing view is tried again after seconds."""
    monkeypatch.setattr(Repo, "_all_run_hashes", Repo._all_run_hashes.__wrapped__)
    monkeypatch.setattr(feeder, "RETRY_SECONDS", (0.001, 0.001, 0.001))


def move(tiny_corpus: Path) -> Path:
    """Move the corpus to another folder and file name."""
    place = tiny_corpus.parent / "elsewhere" / "same.txt"
    place.parent.mkdir()
    return Path(shutil.move(tiny_corpus, place))


# ----------------------------------------------------------------------------------------------- corpus


def test_the_hash_of_a_configuration_depends_on_the_text_and_not_on_its_path() -> None:
    assert field_fact("dataset", "kind") == "machine"
    elsewhere = Config(data={"dataset": "elsewhere.txt"})
    assert config_hash(Config(), {"dataset": "hash"}) == config_hash(elsewhere, {"dataset": "hash"})
    assert config_hash(Config(), {"dataset": "hash"}) != config_hash(Config(), {"dataset": "other"})


def test_a_run_resumes_with_its_corpus_at_another_path_and_with_no_other(
    tiny_argv: Argv, tiny_corpus: Path, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*STOPPED)) == 0
    run, place = str(only_run()), move(tiny_corpus)
    assert train.main(["--resume", run]) == 2
    assert "--dataset" in capsys.readouterr().err.splitlines()[-1]
    other = place.with_name("other.txt")
    other.write_text(place.read_text()[::-1])
    assert train.main(["--resume", run, "--dataset", str(other)]) == 2
    assert "corpus_hash was" in capsys.readouterr().err
    assert train.main(["--resume", run, "--dataset", str(place)]) == 0
    assert read_record(only_run())["resolved"]["dataset"] == str(place)


def test_runs_on_the_same_text_at_two_paths_are_one_group(
    tiny_argv: Argv, tiny_corpus: Path, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "one", "--seed", "1")) == 0
    place = move(tiny_corpus)
    capsys.readouterr()
    assert train.main(tiny_argv("--run-tag", "two", "--dataset", str(place), "--seed", "1")) == 0
    assert "were run already" in capsys.readouterr().out
    runs = [read_run(run_of(tag)) for tag in ("one", "two")]
    assert differing_settings(runs) == []
    assert len(compare(runs).groups) == 1
    sections = diff(runs, ROOT).sections
    assert "Settings that change the numbers" not in sections
    assert "dataset" in [row.name for row in sections["Settings of the machine"]]


def test_another_text_at_the_same_path_is_a_setting_that_changes_the_numbers(
    tiny_argv: Argv, tiny_corpus: Path, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "old", *STOPPED)) == 0
    tiny_corpus.write_text(tiny_corpus.read_text()[::-1])
    assert train.main(tiny_argv("--run-tag", "new")) == 0
    runs = [read_run(run_of(tag)) for tag in ("old", "new")]
    assert differing_settings(runs) == ["dataset"]
    assert len(compare(runs).groups) == 2
    capsys.readouterr()
    assert train.main(["--resume", str(run_of("old")), "--fork"]) == 0
    assert "the text is not the one" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- project


def test_paths_of_a_moved_project_are_found_below_its_new_root(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    assert moved_path("/no/such/project/texts", tmp_path) == str(tmp_path / "texts")
    assert moved_path(str(tmp_path), Path("/no")) == str(tmp_path)
    assert moved_path("/no/such/notes.txt", tmp_path) == "/no/such/notes.txt"
    assert moved_path("pydocs", tmp_path) == "pydocs"


@pytest.fixture
def project(tmp_path: Path, tiny_text: str) -> Path:
    """A copy of this project, without git."""
    folder = tmp_path / "project"
    copy_code(folder, "utils", "configs", *(path.name for path in ROOT.glob("*.py")))
    (folder / "notes.txt").write_text(tiny_text)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_runs_of_a_moved_project_are_resumed_and_reproduced(project: Path, tmp_path: Path) -> None:
    words = [word for pair in TINY_FLAGS.items() for word in pair]

    def run(folder: Path, *command: str) -> None:
        result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr + result.stdout

    base = ("train.py", "--no-aim-logging", "--dataset", "notes.txt", *words)
    run(project, *base, *STOPPED, "--run-tag", "mother")
    run(project, "train.py", "--resume", "mother", "--fork", "--run-tag", "child", "--learning-rate", "1e-4",
        "--stop-at-step", "none")  # fmt: skip
    new = tmp_path / "new"
    project.rename(new)
    run(new, "train.py", "--resume", "mother")
    run(new, "experiments.py", "reproduce", "child")


def test_the_command_for_curves_names_the_folder_that_a_run_was_moved_to(
    tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It named the folder of other runs, which was still there."""
    assert train.main(tiny_argv(*STOPPED)) == 0
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    run = only_run().rename(folder / "moved")
    capsys.readouterr()
    assert train.main(["--resume", str(run)]) == 0
    assert f"--logdir {folder}\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- copies


def aim_runs(repo: Path) -> dict[str, str]:
    """Name -> hash of the runs in an Aim repository."""
    return {run.name: run.hash for run in Repo(str(repo)).iter_runs()}


def test_a_fork_of_a_moved_run_is_created_beside_it(
    tiny_argv: Argv, runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*STOPPED, "--run-tag", "far")) == 0
    (run,) = runs_dir.rename(tmp_path / "archive").iterdir()
    assert train.main(["--resume", str(run), "--stop-at-step", "4"]) == 0
    assert train.main(["--resume", str(run), "--fork", "--max-iters", "7"]) == 0
    assert not runs_dir.exists()
    assert sorted(path.name.partition("_far")[2] for path in (tmp_path / "archive").iterdir()) == ["", "-fork"]


def test_resuming_or_rebuilding_a_copied_run_creates_its_own_run_in_aim(
    tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from aim.sdk.index_manager import RepoIndexManager

    assert train.main(tiny_argv("--aim-logging", *STOPPED)) == 0
    run = only_run()
    hash_of_run = read_record(run)["views"]["aim"]["hash"]
    copies = [run.with_name("copy"), tmp_path / "other" / run.name]
    for copy in copies:
        shutil.copytree(run, copy)
        assert is_copy(copy, read_record(copy))
    assert train.main(["--resume", str(copies[0])]) == 0
    assert "is a copy of" in capsys.readouterr().out
    assert experiments.main(["rebuild", str(copies[1])]) == 0
    hashes = [read_record(path)["views"]["aim"]["hash"] for path in (run, *copies)]
    assert hashes[0] == hash_of_run
    assert len(set(hashes)) == 3
    repo = Repo(str(tmp_path))
    RepoIndexManager.get_index_manager(repo).index(hash_of_run)
    original = repo.get_run(hash_of_run)
    assert original is not None
    assert (original.name, original["run_dir"], original["status"]) == (run.name, str(run), "interrupted")
    assert not is_copy(copies[0], read_record(copies[0]))
    assert train.main(["--resume", str(copies[0]), "--max-iters", "6"]) == 2  # it is complete, and no longer a copy


def test_moved_renamed_and_linked_runs_are_no_copies(tmp_path: Path) -> None:
    from utils.runs.run import Run

    run = Run.create(tmp_path / "runs")
    run.finish("completed")
    run.release()
    assert not is_copy(run.path, read_record(run.path))
    big = tmp_path / "big"
    run.path.rename(big)
    assert not is_copy(big, read_record(big))
    run.path.symlink_to(big)
    assert not is_copy(big, read_record(big))
    assert not is_copy(run.path, read_record(run.path))
    old = {key: value for key, value in read_record(big).items() if key != "place"}
    assert not is_copy(run.path, old)
    copy = run.path.with_name("copy")
    shutil.copytree(big, copy)
    assert is_copy(copy, old)
    elsewhere = {**read_record(copy), "place": {"path": "/not/here", "inode": 1, "host": "another"}}
    assert is_copy(copy, elsewhere)


# ----------------------------------------------------------------------------------------------- exports


@pytest.fixture
def export(tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path]) -> Path:
    """A copy of the export of a run that was deleted."""
    assert train.main(tiny_argv()) == 0
    run = only_run()
    folder = Path(shutil.copytree(run / "artifacts" / "export", tmp_path / "weights"))
    shutil.rmtree(run)
    return folder


@pytest.mark.slow
def test_a_copied_export_generates_text_and_starts_a_run(
    export: Path, tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference.main([str(export), "--prompt", "line", "--max-new-tokens", "3"]) == 0
    assert inference.main([str(export), "--show-info"]) == 0
    for flags in (("--resume", str(export)), ("--resume", str(export), "--fork"), ("--init-from", f"{export}:3")):
        assert train.main(tiny_argv(*flags)) == 2
        assert "--init-from" in capsys.readouterr().err
    started = tiny_argv(
        "--init-from", str(export), "--run-tag", "child"
    )  # with a tag, since the parent may have started in the same second
    assert train.main([*started, "--stop-at-step", "1", "--checkpoint-interval", "0"]) == 0
    run = only_run()
    parent: dict[str, Any] = read_record(run)["parent"]
    training = json.loads((export / "config.json").read_text())
    assert (parent["run"], parent["step"]) == (training["training"]["run"], 6)
    assert parent["export"] == training["weights_crc32"]
    shutil.rmtree(run / "artifacts" / "checkpoints")  # as if it had been killed before the first one
    (run / "artifacts" / "seal.json").unlink()  # so that it starts again, from the weights of the export
    assert train.main(["--resume", str(run), "--max-iters", "6"]) == 0
    beside = run.with_name(parent["run"]) / "artifacts" / "export"
    beside.parent.mkdir(parents=True)
    export.rename(beside)
    assert reproduce(read_run(run), ROOT, code="current").identical
