"""Freeing disk space: what is never removed, and the order in which the rest is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_runs import PARENT, held_lock, make_run, record_of, write

from utils.errors import UserError
from utils.experiments.prune import PrunePlan, Removal, parse_age, parse_size, plan_pruning, remove, remove_all
from utils.folders import size_of
from utils.runs.layout import MODELS
from utils.runs.names import PromotionError, add_version

SIZE = 1000  # of a checkpoint


def old_run(runs_dir: Path, run_id: str, days: float = 0.0, **facts: Any) -> Path:
    """A run with one checkpoint, started `days` ago."""
    start = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    return make_run(runs_dir, run_id, **{"checkpoints": {1: SIZE}, "start": start, **facts})


@pytest.fixture
def three(runs_dir: Path) -> list[Path]:
    """Runs `c`, `b` and `a`, the oldest first."""
    return [old_run(runs_dir, run_id, days) for run_id, days in (("c", 30), ("b", 20), ("a", 10))]


def removals(plan: PrunePlan) -> list[tuple[str, str]]:
    return [(removal.run, removal.what) for removal in plan.removals]


def all_kept(runs_dir: Path) -> dict[str, str]:
    """Why runs are kept by a plan that removes as much as it may; checks that it removes none of them."""
    plan = plan_pruning(runs_dir, max_bytes=0)
    assert not {removal.run for removal in plan.removals} & plan.kept.keys()
    return plan.kept


def test_by_default_only_checkpoints_are_removed(runs_dir: Path, three: list[Path]) -> None:
    plan = plan_pruning(runs_dir)
    assert plan.removals == [
        Removal(path.name, "checkpoints", path / "artifacts" / "checkpoints", SIZE) for path in three
    ]
    assert plan.freed == 3 * SIZE
    assert plan.total == sum(size_of(path) for path in three)
    assert plan.kept == {}


def test_a_run_without_checkpoints_has_nothing_to_remove(runs_dir: Path) -> None:
    make_run(runs_dir, "run")
    assert plan_pruning(runs_dir).removals == []
    assert plan_pruning(runs_dir / "nowhere") == PrunePlan(0, [], {})


def test_whole_runs_are_removed_on_request(runs_dir: Path, three: list[Path]) -> None:
    plan = plan_pruning(runs_dir, whole_runs=True)
    assert removals(plan) == [("c", "run"), ("b", "run"), ("a", "run")]
    assert plan.freed == plan.total


def test_checkpoints_are_removed_before_runs_and_the_oldest_first(runs_dir: Path, three: list[Path]) -> None:
    total = plan_pruning(runs_dir).total
    whole = size_of(three[0])
    steps = [
        (total, []),
        (total - 1, [("c", "checkpoints")]),
        (total - SIZE, [("c", "checkpoints")]),
        (total - SIZE - 1, [("c", "checkpoints"), ("b", "checkpoints")]),
        (total - 3 * SIZE, [("c", "checkpoints"), ("b", "checkpoints"), ("a", "checkpoints")]),
        (total - 3 * SIZE - 1, [("b", "checkpoints"), ("a", "checkpoints"), ("c", "run")]),
        (total - 2 * SIZE - whole, [("b", "checkpoints"), ("a", "checkpoints"), ("c", "run")]),
        (total - 2 * SIZE - whole - 1, [("a", "checkpoints"), ("c", "run"), ("b", "run")]),
        (0, [("c", "run"), ("b", "run"), ("a", "run")]),
    ]
    for max_bytes, expected in steps:
        plan = plan_pruning(runs_dir, max_bytes=max_bytes)
        assert removals(plan) == expected
        assert plan.total - plan.freed <= max_bytes


def test_removing_frees_as_much_as_the_plan_says(runs_dir: Path, three: list[Path]) -> None:
    plan = plan_pruning(runs_dir, max_bytes=size_of(three[0]) * 2)
    for removal in plan.removals:
        remove(removal)
    assert size_of(runs_dir) == plan.total - plan.freed


KEPT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pinned": ("pinned", lambda run: write(run / "notes.json", {"tags": [], "note": "", "pinned": True})),
    "promoted": ("promoted", lambda run: add_version(run.parent, "best", {"run": run.name})),
    "a parent": (
        "parent of another run",
        lambda run: old_run(run.parent, "child", parent={**PARENT, "run": run.name}),
    ),
    "no run.json": ("cannot be read", lambda run: (run / "run.json").unlink()),
    "a torn run.json": ("cannot be read", lambda run: write(run / "run.json", "{")),
    "another schema": ("cannot be read", lambda run: write(run / "run.json", record_of("x", schema_version=2))),
    "running elsewhere": (
        "running",
        lambda run: write(run / "run.json", record_of("x", status="running", host="elsewhere")),
    ),
    "torn notes": ("cannot be read", lambda run: write(run / "notes.json", '{"pinned": true')),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("options", [{}, {"whole_runs": True}, {"max_bytes": 0}], ids=str)
def test_protected_and_unreadable_runs_are_never_removed(runs_dir: Path, kind: str, options: dict[str, Any]) -> None:
    run = old_run(runs_dir, "run", 30)
    old_run(runs_dir, "other", 20)
    reason, prepare = KEPT[kind]
    prepare(run)
    plan = plan_pruning(runs_dir, **options)
    assert plan.kept == {"run": reason}
    assert "run" not in {removal.run for removal in plan.removals}
    assert "other" in {removal.run for removal in plan.removals}


@pytest.mark.parametrize("status", ["running", "completed", "interrupted"])
def test_a_run_whose_lock_is_held_is_never_removed(runs_dir: Path, status: str) -> None:
    run = old_run(runs_dir, "run", status=status)
    with held_lock(run):
        assert all_kept(runs_dir) == {"run": "running"}
    assert plan_pruning(runs_dir, unfinished=True).kept == {}


def test_a_run_that_was_resumed_after_the_plan_is_not_removed(runs_dir: Path) -> None:
    run = old_run(runs_dir, "run", status="interrupted")
    for options in ({}, {"whole_runs": True}):
        (removal,) = plan_pruning(runs_dir, **options, unfinished=True).removals
        with held_lock(run), pytest.raises((OSError, UserError)):
            remove(removal)
        assert (run / "artifacts" / "checkpoints" / "step_000001").is_dir()


def test_files_that_a_live_run_is_writing_stay_even_if_its_notes_are_damaged(runs_dir: Path) -> None:
    run = old_run(runs_dir, "run")
    half = write(run / "artifacts" / "checkpoints" / ".step_000002.tmp" / "model.safetensors", "x").parent
    write(run / "notes.json", "{")
    with held_lock(run):
        plan = plan_pruning(runs_dir)
        assert (plan.kept, plan.removals) == ({"run": "running"}, [])
    (removal,) = plan_pruning(runs_dir).removals
    with held_lock(run):
        assert list(remove_all([removal])) == [removal]
        assert half.is_dir()
    assert remove_all([removal]) == {}
    assert not half.exists()


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_resumable_run_is_pruned_only_on_request(runs_dir: Path, status: str) -> None:
    old_run(runs_dir, "run", status=status)
    assert all_kept(runs_dir) == {"run": "could be resumed (--unfinished)"}
    assert plan_pruning(runs_dir, unfinished=True).kept == {}


def test_a_file_or_an_empty_folder_is_kept(runs_dir: Path) -> None:
    write(runs_dir / "notes.txt", "mine")
    (runs_dir / "empty").mkdir()
    assert all_kept(runs_dir) == {"notes.txt": "cannot be read", "empty": "cannot be read"}


@pytest.mark.parametrize("parent", ["x", {}, {"run": None}, {"run": ["a"]}, 3])
def test_a_damaged_parent_stops_nothing(runs_dir: Path, parent: Any) -> None:
    old_run(runs_dir, "run", parent=parent)
    old_run(runs_dir, "other")
    assert "other" in {removal.run for removal in plan_pruning(runs_dir).removals}


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, ""), (1, "a"), (2, "ab"), (3, "abc"), (4, "abc"), (5, "abc"), (99, "abc")]
)
def test_the_newest_runs_are_kept(runs_dir: Path, three: list[Path], keep_last: int, kept: str) -> None:
    plan = plan_pruning(runs_dir, keep_last=keep_last, whole_runs=True)
    assert plan.kept == dict.fromkeys(kept, "among the newest")
    assert {run for run, _ in removals(plan)} == {*"abc"} - {*kept}


def test_damaged_entries_do_not_count_as_the_newest(runs_dir: Path, three: list[Path]) -> None:
    (runs_dir / "empty").mkdir()
    assert plan_pruning(runs_dir, keep_last=1).kept == {"empty": "cannot be read", "a": "among the newest"}


def test_young_runs_are_kept(runs_dir: Path, three: list[Path]) -> None:
    plan = plan_pruning(runs_dir, older_than=parse_age("15d"))
    assert plan.kept == {"a": "not old enough"}
    assert [run for run, _ in removals(plan)] == ["c", "b"]


def test_a_run_of_unknown_age_is_not_old_enough(runs_dir: Path) -> None:
    old_run(runs_dir, "run", start="yesterday")
    assert plan_pruning(runs_dir, older_than=1.0).kept == {"run": "not old enough"}


def test_no_more_is_removed_than_needed_if_the_oldest_run_is_kept(runs_dir: Path, three: list[Path]) -> None:
    write(three[0] / "notes.json", {"tags": [], "note": "", "pinned": True})
    plan = plan_pruning(runs_dir, max_bytes=size_of(runs_dir) - 1)
    assert removals(plan) == [("b", "checkpoints")]


def test_a_damaged_models_json_prevents_pruning(runs_dir: Path, three: list[Path]) -> None:
    write(runs_dir / MODELS, "{")
    with pytest.raises(PromotionError):
        plan_pruning(runs_dir)


def test_removing_leaves_nothing_behind(runs_dir: Path, three: list[Path]) -> None:
    run = three[0]
    remove(Removal("c", "checkpoints", run / "artifacts" / "checkpoints", SIZE))
    assert list((run / "artifacts").iterdir()) == []
    assert (run / "run.json").exists()
    remove(Removal("c", "run", run, SIZE))
    assert {path.name for path in runs_dir.iterdir()} == {"a", "b"}


def fail(*_: object, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise OSError(5, "Input/output error")


def test_a_crash_while_removing_a_run_leaves_a_leftover_not_a_run(
    runs_dir: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output"):
            remove(Removal("c", "run", three[0], SIZE))
    assert removals(plan_pruning(runs_dir)) == [("", "leftover"), ("b", "checkpoints"), ("a", "checkpoints")]


def test_checkpoints_can_be_removed_after_an_earlier_removal_crashed(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = old_run(runs_dir, "run")
    (removal,) = plan_pruning(runs_dir).removals
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output"):
            remove(removal)
    write(run / "artifacts" / "checkpoints" / "step_000002" / "model.safetensors", "x")  # the run was resumed
    assert remove_all(plan_pruning(runs_dir).removals) == {}
    assert list((run / "artifacts").iterdir()) == []


def test_removing_a_missing_run_is_an_os_error(runs_dir: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove(Removal("x", "run", runs_dir / "x", 1))


def test_the_size_of_a_folder_does_not_follow_links(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "a" / "b", b"x" * 10)
    write(tmp_path / "large", b"x" * 5000)
    os.symlink(tmp_path / "large", tmp_path / "folder" / "link")
    assert 10 < size_of(tmp_path / "folder") < 1000
    assert size_of(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("500MiB", 500 * 2**20),
        ("500 MiB", 500 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" 3kb ", 3000),
        ("7b", 7),
        ("0B", 0),
        ("2TB", 2 * 10**12),
        ("1gib", 2**30),
        ("0.5KiB", 512),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "20", "-1GB", "1e3GB", "20 G B", "1,5GB", "20XB", ".5GB", "5.GB", "inf GB", "nan", "٣GB"]
)
def test_an_invalid_size_is_reported(text: str) -> None:
    with pytest.raises(UserError, match="expected a size like 20GB or 500MiB, got"):
        parse_size(text)


def test_a_size_beyond_the_range_of_floats_is_reported() -> None:
    with pytest.raises(UserError):
        parse_size("9" * 400 + "GB")


@pytest.mark.parametrize(
    ("text", "seconds"), [("12h", 43_200), ("30d", 2_592_000), ("8w", 4_838_400), ("1.5 d", 129_600), (" 0h ", 0)]
)
def test_ages_are_parsed(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "30m", "30s", "1y", "30 days", "1d12h", "30D"])
def test_an_invalid_age_is_reported(text: str) -> None:
    with pytest.raises(UserError, match="expected an age like 12h, 30d or 8w, got"):
        parse_age(text)


def test_a_plan_for_many_runs_is_quick(runs_dir: Path) -> None:
    for i in range(100):
        old_run(runs_dir, f"run{i:03d}", 1)
    began = time.perf_counter()
    assert len(plan_pruning(runs_dir, max_bytes=0).removals) == 100
    assert time.perf_counter() - began < 2


# ---------------------------------------------------------------------------------- runs on another disk


def test_removing_a_run_that_is_a_link_removes_its_target(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    big = tmp_path / "big"
    make_run(runs_dir, "moved", checkpoints={1: 100}).rename(big)
    (runs_dir / "moved").symlink_to(big)
    plan = plan_pruning(runs_dir, whole_runs=True)
    assert plan.freed >= 100
    assert remove_all(plan.removals) == {}
    assert not big.exists()
    assert list(runs_dir.iterdir()) == []


@pytest.mark.parametrize("name", ["artifacts", "artifacts/checkpoints", "logs"])
@pytest.mark.parametrize("options", [{}, {"whole_runs": True}], ids=str)
def test_what_a_link_in_a_run_leads_to_is_never_deleted(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    runs_dir, home = tmp_path / "runs", tmp_path / "home"
    run = make_run(runs_dir, "received", checkpoints={1: 100})
    shutil.rmtree(run / name)
    for place in (".config.old", ".half.tmp", "checkpoints"):
        write(home / place / "letter", b"precious")
    (run / name).symlink_to(home)
    plan = plan_pruning(runs_dir, **options)
    assert (plan.removals, plan.kept) == ([], {"received": "has a link that leads out of it"})


def test_a_second_link_to_a_run_is_kept_with_it_or_removed_alone(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    pinned = make_run(runs_dir, "pinned", notes={"pinned": True})
    (runs_dir / "alias").symlink_to(pinned)
    assert plan_pruning(runs_dir, whole_runs=True).kept == {"pinned": "pinned", "alias": "pinned"}
    other = make_run(runs_dir, "other")
    (runs_dir / "second").symlink_to(other)
    (removal,) = (one for one in plan_pruning(runs_dir, whole_runs=True).removals if one.run == "second")
    remove_all([removal])
    assert other.is_dir()
    assert not (runs_dir / "second").is_symlink()


def test_a_run_that_is_a_link_is_promoted_by_the_name_of_the_link(tmp_path: Path) -> None:
    from utils.experiments.notes import promote
    from utils.runs.names import promoted_run

    runs_dir = tmp_path / "runs"
    big = tmp_path / "big"
    path = make_run(runs_dir, "moved")
    (path / "artifacts" / "export").mkdir(parents=True)
    (path / "artifacts" / "export" / "model.safetensors").write_bytes(b"weights")
    (path / "artifacts" / "export" / "config.json").write_text('{"training": {"step": 1}}')
    path.rename(big)
    (runs_dir / "moved").symlink_to(big)
    name, version = promote(runs_dir / "moved", "best", runs_dir)
    assert (name, version["run"]) == ("best@v1", "moved")
    assert promoted_run("best@v1", runs_dir) == runs_dir / "moved"
