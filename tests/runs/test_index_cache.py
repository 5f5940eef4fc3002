"""The cache of an index saves reading runs and never changes the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import held_lock, make_run, training_records, write

import utils.runs.index as index
from utils.experiments.notes import edit
from utils.runs import index_cache
from utils.runs.index import IndexedRun, read_index, read_run
from utils.runs.layout import CONFIG, EVALUATIONS, INDEX_CACHE, METRICS_LOG, NOTES, RECORD, SEAL
from utils.runs.run import change_record

EVALUATION = {"time": "2026-01-01", "data": "notes.txt", "loss": 2.5}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the cache after a single change, and cache files that have just changed."""
    monkeypatch.setattr(index_cache, "WORTH_WRITING", 1)
    monkeypatch.setattr(index_cache, "SETTLED_NS", 0)


@pytest.fixture
def runs(runs_dir: Path) -> Path:
    """A folder of two runs, both in the cache."""
    for name in ("a", "b"):
        facts: dict[str, Any] = {"notes": {"note": "first"}, "views": {"aim": {"state": "complete"}}}
        run = make_run(runs_dir, name, metrics=training_records([3.0, 2.0]), **facts)
        write(run / EVALUATIONS, json.dumps(EVALUATION) + "\n")
        write(run / SEAL, {})
    read_index(runs_dir)
    assert cached(runs_dir) == {"a", "b"}
    return runs_dir


def cached(runs_dir: Path) -> set[str]:
    """The runs in the cache."""
    head, _, body = (runs_dir / INDEX_CACHE).read_bytes().partition(b"\n")
    assert {*json.loads(head)} == {"code", "crc32"}
    return {*json.loads(body)}


def read_without_cache(runs_dir: Path) -> list[IndexedRun]:
    """The index without a cache."""
    names = sorted(path.name for path in runs_dir.iterdir() if not path.name.startswith("."))
    return sorted((read_run(runs_dir / name) for name in names), key=lambda run: (run.record.get("start", ""), run.id))


def read_again(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The runs that an index reads in spite of the cache."""
    names: set[str] = set()

    def read(path: Path) -> IndexedRun:
        names.add(path.name)
        return read_run(path)

    with monkeypatch.context() as patched:
        patched.setattr(index, "read_run", read)
        read_index(runs_dir)
    return names


def test_a_run_that_has_ended_is_read_only_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_again(runs, monkeypatch) == set()
    found = read_index(runs)
    assert found == read_without_cache(runs)
    assert [run.row() | {"age": 0} for run in found] == [run.row() | {"age": 0} for run in read_without_cache(runs)]
    assert found[0].evaluations == [EVALUATION]


def in_place(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the content of a file, but neither its size nor its times."""
    old, times = path.read_bytes(), path.stat()
    new = change(old)
    assert len(new) == len(old)
    assert new != old
    path.write_bytes(new)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def linked_out(run: Path) -> None:
    (run / "meta").rename(run.parent.parent / "elsewhere")
    (run / "meta").symlink_to(run.parent.parent / "elsewhere")


CHANGES: dict[str, Any] = {  # called with the run
    "a note": lambda run: edit(run, note="why", tag="wider"),
    "a result of the same length": lambda run: in_place(run / RECORD, lambda text: text.replace(b"2.25", b"2.75")),
    "a setting of the same length": lambda run: in_place(run / CONFIG, lambda text: text.replace(b"1337", b"1338")),
    "an evaluation": lambda run: write(run / EVALUATIONS, json.dumps({**EVALUATION, "loss": 1.5}) + "\n"),
    "no evaluations": lambda run: (run / EVALUATIONS).unlink(),
    "no notes": lambda run: (run / NOTES).unlink(),
    "no seal": lambda run: (run / SEAL).unlink(),
    "no log": lambda run: (run / METRICS_LOG).unlink(),
    "a torn log": lambda run: (run / METRICS_LOG).open("a").write('{"step"'),
    "no artifacts": lambda run: shutil.rmtree(run / "artifacts"),
    "a folder that links elsewhere": linked_out,
    "a damaged record": lambda run: write(run / RECORD, "{"),
    "a resumed run": lambda run: change_record(run, status="running"),
    "a deleted run": shutil.rmtree,
    "a file in place of the run": lambda run: (shutil.rmtree(run), write(run, "")),
    "another run of that name": lambda run: (shutil.rmtree(run), make_run(run.parent, run.name, tag="new")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_changes_is_read_again(runs: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_index(runs)
    CHANGES[change](runs / "a")
    assert read_index(runs) == read_without_cache(runs) != before
    assert read_again(runs, monkeypatch) <= {"a"}


def test_a_run_whose_files_have_just_changed_is_not_cached(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SETTLED_NS", 10**12)
    assert read_again(runs, monkeypatch) == {"a", "b"}  # two changes may have the same time if the clock is coarse
    assert cached(runs) == set()


def test_runs_whose_state_may_change_without_a_write_are_not_cached(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(runs_dir, "ended")
    running = make_run(runs_dir, "running", status="running")
    closing = make_run(runs_dir, "closing", views={"aim": {"state": "on"}})
    (runs_dir / "link").symlink_to(make_run(runs_dir.parent, "elsewhere"))
    write(make_run(runs_dir, "nan") / CONFIG, b'{"optimizer": {"learning_rate": NaN}}')
    write(make_run(runs_dir, "damaged") / NOTES, "{")
    with held_lock(running), held_lock(closing):
        read_index(runs_dir)
        assert {run.id: run.status for run in read_index(runs_dir)}["running"] == "running"
    assert cached(runs_dir) == {"ended"}
    found = {run.id: run for run in read_index(runs_dir)}
    assert found["running"].status == "crashed"
    assert "it was killed while it closed" in str(found["closing"].problem)
    assert read_again(runs_dir, monkeypatch) == {*found} - {"ended"}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "another loss": lambda content: content.replace(b"2.25", b"2.75"),
    "another code": lambda content: content.replace(b'{"code":"', b'{"code":"0'),
    "not JSON": lambda content: b"\xff\n\xff",
    "a list": lambda content: b"[]\n[]",
    "deep": lambda content: b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_replaced(runs: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = runs / INDEX_CACHE
    good = place.read_bytes()
    place.write_bytes(DAMAGE[damage](good))
    assert read_again(runs, monkeypatch) == {"a", "b"}
    assert place.read_bytes() == good
    assert read_index(runs) == read_without_cache(runs)


def test_a_cache_that_is_a_link_or_belongs_to_another_user_is_not_used(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = runs.parent / "elsewhere"
    (runs / INDEX_CACHE).rename(elsewhere)
    (runs / INDEX_CACHE).symlink_to(elsewhere)
    assert read_again(runs, monkeypatch) == {"a", "b"}
    assert not (runs / INDEX_CACHE).is_symlink()
    if os.geteuid() == 0:
        os.chown(runs / INDEX_CACHE, 12345, -1)
        assert read_again(runs, monkeypatch) == {"a", "b"}


def test_if_the_cache_cannot_be_written_the_runs_are_read(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / INDEX_CACHE).unlink()
    (runs / INDEX_CACHE).mkdir()
    assert read_index(runs) == read_without_cache(runs)

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (runs / INDEX_CACHE).rmdir()
    monkeypatch.setattr(index_cache, "write_atomic", refuse)
    assert read_index(runs) == read_without_cache(runs)
    assert not (runs / INDEX_CACHE).exists()


def test_two_processes_each_write_a_complete_cache(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs, "c")
    make_run(runs, "d")
    one, other = index_cache.IndexCache(runs), index_cache.IndexCache(runs)
    for cache, names in ((one, "abc"), (other, "abd")):
        for name in names:
            index._read_or_cached(runs / name, cache)
    one.write()
    other.write()
    assert cached(runs) == {"a", "b", "d"}
    assert read_index(runs) == read_without_cache(runs)


def test_the_cache_is_rewritten_only_after_enough_changes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH_WRITING", 3)
    make_run(runs, "c")
    make_run(runs, "d")
    read_index(runs)
    assert cached(runs) == {"a", "b"}
    make_run(runs, "e")
    read_index(runs)
    assert cached(runs) == {"a", "b", "c", "d", "e"}
    for name in "abc":
        shutil.rmtree(runs / name)
    read_index(runs)
    assert cached(runs) == {"d", "e"}
