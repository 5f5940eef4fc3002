"""The fuzzer sees each kind of fault, and finds none in a few cases; `python -m benchmarks.fuzz` tries thousands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import Case, Fuzzer
from benchmarks.fuzz_damage import BAD, COMMANDS, DATASET, ENTRY_DAMAGE, FILE_DAMAGE, GOOD, READS

CASES = (0, 2, 4, 3, 5, 7)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    for name in ("torch.utils.tensorboard", "utils.training.session", "utils.tracking.views"):
        importlib.import_module(name)  # once, not in each process
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"), 20)
    fuzzer.prepare()
    return fuzzer


@pytest.mark.slow
def test_a_few_cases_have_no_fault(fuzzer: Fuzzer) -> None:
    for index in CASES:
        case, ended, faults = fuzzer.try_case(index)
        assert faults == [], (case, ended)


def test_every_entry_of_a_run_is_damaged_in_every_way(fuzzer: Fuzzer) -> None:
    template = fuzzer.folder / "template"
    run = template / "runs" / fuzzer.ids[BAD]
    encoded, prepared = template / "corpora" / "encoded", template / "datasets" / DATASET
    entries = [*run.rglob("*"), template / "runs" / "models.json", *encoded.iterdir(), *prepared.iterdir()]
    wanted = sum(len(ENTRY_DAMAGE) + (len(FILE_DAMAGE) if path.is_file() else 0) for path in entries)
    damages = [fuzzer.case(index).damage for index in range(0, 2 * wanted, 2)]
    assert len(set(damages)) == wanted > 400
    assert fuzzer.case(2 * wanted).damage == damages[0]
    assert fuzzer.case(7) == fuzzer.case(7)


def raises(argv: Sequence[str]) -> int:
    raise ValueError("planted")


def hangs(argv: Sequence[str]) -> int:
    time.sleep(60)
    return 0


def dies(argv: Sequence[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def is_silent(argv: Sequence[str]) -> int:
    return 2


def fails(argv: Sequence[str]) -> int:
    print("error: planted", file=sys.stderr)
    return 1


def leaves_a_temporary_file(argv: Sequence[str]) -> int:
    Path("out", ".notes.json.123.tmp").touch()
    return 0


def leaves_a_folder_after_a_mistake(argv: Sequence[str]) -> int:
    Path("runs", "half").mkdir()
    print("error: planted", file=sys.stderr)
    return 2


def writes_where_it_only_reads(argv: Sequence[str]) -> int:
    Path("notes.txt").write_text("changed")
    return 0


def changes_the_good_run(argv: Sequence[str]) -> int:
    (run,) = Path("runs").glob(f"*_{GOOD}")
    (run / "notes.json").write_text('{"tags": [], "note": "changed", "pinned": false}')
    return 0


def deletes_the_bad_run(argv: Sequence[str]) -> int:
    (run,) = Path("runs").glob(f"*_{BAD}")
    run.rename("out/elsewhere")
    return 0


@pytest.mark.parametrize(
    ("main", "kinds"),
    [
        (raises, ["traceback"]),
        (dies, ["traceback"]),
        (hangs, ["hang"]),
        (is_silent, ["status"]),
        (fails, ["status"]),
        (leaves_a_temporary_file, ["leftover"]),
        (leaves_a_folder_after_a_mistake, ["leftover"]),
        (changes_the_good_run, ["hidden", "hidden"]),  # in its files and in its row
        (deletes_the_bad_run, ["hidden"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_kind_of_fault_is_found(
    main: Callable[[Sequence[str]], int], kinds: list[str], fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fuzz.SCRIPTS, "planted", main)
    fuzzer.copy()
    patient = replace(fuzzer, seconds=1.0) if main is hangs else fuzzer
    _, faults = patient.attempt(Case("planted", "planted", [], (0, 2), damage=("notes.json", "empty")))
    assert [kind for kind, _ in faults] == kinds


def test_the_time_limit_of_a_case_does_not_apply_to_the_list_after_it(fuzzer: Fuzzer) -> None:
    fuzzer.copy()
    assert replace(fuzzer, seconds=0.01).rows()[fuzzer.ids[GOOD]] == fuzzer.good


def test_a_command_that_reads_must_not_write(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.SCRIPTS, "planted", writes_where_it_only_reads)
    fuzzer.copy()
    _, faults = fuzzer.attempt(Case("planted", "planted", [], (0,), reads=True))
    assert faults == [("leftover", "notes.txt is changed")]


def test_commands_that_only_read_are_marked_as_such() -> None:
    assert {words[0] for script, words, _, kind in COMMANDS if kind == READS and script == "experiments"} >= {
        *("list", "show", "diff", "compare", "explain", "plot", "sql", "check", "prune")
    }
