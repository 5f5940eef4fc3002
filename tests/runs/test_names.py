"""Promoted names: versions count up even when several processes promote at once, and every mistake is reported."""

from __future__ import annotations

import json
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from conftest import FORK
from fake_runs import make_run, write

from utils.runs.index import read_index
from utils.runs.layout import MODELS
from utils.runs.names import PromotionError, add_version, promoted_run, read_models


def test_versions_of_a_name_count_up(runs_dir: Path) -> None:
    runs_dir.mkdir()
    assert [add_version(runs_dir, "best", {"run": run}) for run in "abc"] == [1, 2, 3]
    assert add_version(runs_dir, "small", {"run": "a", "note": "why"}) == 1
    assert read_models(runs_dir) == {
        "best": [{"version": n, "run": run} for n, run in ((1, "a"), (2, "b"), (3, "c"))],
        "small": [{"version": 1, "run": "a", "note": "why"}],
    }


def test_without_models_json_nothing_is_promoted(runs_dir: Path) -> None:
    assert read_models(runs_dir) == {}
    with pytest.raises(PromotionError, match="no model best in"):
        promoted_run("best@v1", runs_dir)


def test_a_version_resolves_to_a_run_directory(runs_dir: Path) -> None:
    paths = [make_run(runs_dir, run_id) for run_id in ("a", "b")]
    for path in paths:
        add_version(runs_dir, "best-1.0_x", {"run": path.name})
    assert promoted_run("best-1.0_x@v1", runs_dir) == paths[0]
    assert promoted_run("best-1.0_x@v2", runs_dir) == paths[1]
    assert {run.id for run in read_index(runs_dir)} == {"a", "b"}  # models.json and its lock do not count as runs


@pytest.mark.parametrize("text", ["latest", "best", "best@", "best@v", "best@1", "@v1", "best@v1x", "best@v-1", "a/b"])
def test_text_without_the_form_of_a_version_names_no_promoted_run(runs_dir: Path, text: str) -> None:
    assert promoted_run(text, runs_dir) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bset@v1", r"no model bset in .*models\.json; did you mean best\?"),
        ("best@v0", "no version v0 of best: there are v1 to v1"),
        ("best@v2", "no version v2 of best: there are v1 to v1"),
        ("best@v" + "9" * 5000, "no version"),
    ],
    ids=lambda text: text[:20],
)
def test_a_missing_model_or_version_is_reported(runs_dir: Path, text: str, message: str) -> None:
    make_run(runs_dir, "a")
    add_version(runs_dir, "best", {"run": "a"})
    with pytest.raises(PromotionError, match=message):
        promoted_run(text, runs_dir)


def test_a_promoted_run_that_is_gone_is_reported(runs_dir: Path) -> None:
    runs_dir.mkdir()
    add_version(runs_dir, "best", {"run": "a"})
    with pytest.raises(PromotionError, match=r"best@v1 is run a, which is no longer in .*runs"):
        promoted_run("best@v1", runs_dir)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "a@v1", "a\n", "ü", "x" * 65, "a\0b", "\udcff"])
def test_a_bad_name_is_refused_and_nothing_is_written(runs_dir: Path, name: str) -> None:
    runs_dir.mkdir()
    with pytest.raises(PromotionError, match="is not a name"):
        add_version(runs_dir, name, {"run": "a"})
    assert list(runs_dir.iterdir()) == []


def test_a_missing_folder_of_runs_is_reported(runs_dir: Path) -> None:
    with pytest.raises(PromotionError, match=r"models\.json cannot be written: No such file or directory"):
        add_version(runs_dir, "best", {"run": "a"})


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"[]", b"3", b"null", b'{"best": 3}', b'{"best": null}', b'{"best": [3]}'),
        *(b'{"best": [{}]}', b'{"best": [{"run": 3}]}', b'{"best": {"v1": {"run": "a"}}}'),
        *(b'{"best": ' * 100_000, b'{"best": {}}', b'{"best": ""}'),
    ],
    ids=lambda content: repr(content[:32]),
)
def test_a_damaged_file_is_reported_and_left_as_it_is(runs_dir: Path, content: bytes) -> None:
    write(runs_dir / MODELS, content)
    with pytest.raises(PromotionError, match=r"models\.json cannot be read"):
        read_models(runs_dir)
    with pytest.raises(PromotionError):
        promoted_run("best@v1", runs_dir)
    with pytest.raises(PromotionError):
        add_version(runs_dir, "best", {"run": "a"})
    assert (runs_dir / MODELS).read_bytes() == content


def test_a_folder_in_place_of_models_json_is_reported(runs_dir: Path) -> None:
    (runs_dir / MODELS).mkdir(parents=True)
    with pytest.raises(PromotionError, match="Is a directory"):
        add_version(runs_dir, "best", {"run": "a"})


def test_an_entry_without_a_run_is_rejected_and_not_written(runs_dir: Path) -> None:
    runs_dir.mkdir()
    with pytest.raises(AssertionError):
        add_version(runs_dir, "best", {"note": "no run"})
    assert read_models(runs_dir) == {}


def test_an_entry_that_is_not_json_is_rejected_and_releases_the_lock(runs_dir: Path) -> None:
    runs_dir.mkdir()
    add_version(runs_dir, "best", {"run": "a"})
    for fact in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            add_version(runs_dir, "best", {"run": "b", "fact": fact})
    assert read_models(runs_dir) == {"best": [{"version": 1, "run": "a"}]}
    assert add_version(runs_dir, "best", {"run": "c"}) == 2  # the lock is free again


def promote(runs_dir: Path, barrier: Barrier, number: int) -> None:
    barrier.wait(60)
    for i in range(5):
        add_version(runs_dir, "best", {"run": f"run_{number}_{i}"})


def test_processes_that_promote_at_the_same_time_lose_nothing(runs_dir: Path) -> None:
    runs_dir.mkdir()
    barrier = FORK.Barrier(8)
    processes: list[Any] = [FORK.Process(target=promote, args=(runs_dir, barrier, n)) for n in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    versions = json.loads((runs_dir / MODELS).read_text())["best"]
    assert [version["version"] for version in versions] == list(range(1, 41))
    assert {version["run"] for version in versions} == {f"run_{n}_{i}" for n in range(8) for i in range(5)}
