"""The record of a run is true: the code of each session, the text, the duration, and the digits of the settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

import train
from data import load_corpus
from tests.fake_runs import held_lock, indexed, make_run, record_of
from utils.config.settings import Config, DataConfig
from utils.errors import number_text
from utils.experiments.reproduce import reproduce
from utils.machine.ranks import ONE
from utils.runs.code import GitFacts
from utils.runs.duration import duration_of
from utils.runs.identity import code_identity, later_code
from utils.runs.index import read_run
from utils.runs.layout import LOCK
from utils.runs.run import Run, read_record
from utils.terminal.words import column_text
from utils.training import session as of_session

pytestmark = pytest.mark.usefixtures("prompt_writes")
Argv = Callable[..., list[str]]
STOPPED = ("--stop-at-step", "3", "--checkpoint-interval", "3")
COMMITTED = GitFacts(commit="c" * 40, branch="main")


# ------------------------------------------------------------------------------------------------- code


def test_code_that_is_edited_between_two_sessions_is_reported_and_kept(
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = [COMMITTED]
    monkeypatch.setattr(of_session, "read_git", lambda setup: facts[0])
    assert train.main(tiny_argv(*STOPPED)) == 0
    run = only_run()
    first = code_identity(read_run(run))
    facts[0] = replace(COMMITTED, patch=b"diff --git a/model.py b/model.py\n", dirty=True)
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--stop-at-step", "4"]) == 0
    assert "the uncommitted code was as committed in the previous session" in " ".join(capsys.readouterr().out.split())
    assert (run / "meta" / "session_2" / "code.patch").read_bytes() == facts[0].patch
    assert not (run / "meta" / "code.patch").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert "uncommitted code was" not in capsys.readouterr().out
    assert [step for step, *_ in later_code(run, read_record(run))] == [3]
    assert code_identity(read_run(run)) != first


def test_an_older_record_is_compared_by_its_patch(tmp_path: Path) -> None:
    from utils.training.start import changed_facts

    run = indexed(tmp_path, patch="old", resolved={})
    git: Any = replace(COMMITTED, patch=b"old", callbacks={"mine": b""})
    setup: Any = SimpleNamespace(device=torch.device("cpu"), ranks=ONE, config=Config())
    assert [what for what, *_ in changed_facts(run.path, run.record, setup, git)] == []
    git = replace(git, patch=b"new")
    assert [what for what, *_ in changed_facts(run.path, run.record, setup, git)] == ["the uncommitted code"]


# ------------------------------------------------------------------------------------------------- text


def test_a_damaged_token_file_is_noticed_and_encoded_again(tiny_corpus: Path, tmp_path: Path) -> None:
    old = time.time() - 60
    os.utime(tiny_corpus, (old, old))
    warnings: list[str] = []

    def load() -> list[int]:
        config = DataConfig(dataset=str(tiny_corpus))
        return load_corpus(config, 8, tmp_path / "corpora", warn=warnings.append).tokens.tolist()

    tokens = load()
    (file,) = (tmp_path / "corpora" / "encoded").glob("*.uint16")
    content = file.read_bytes()
    file.write_bytes(content[:100] + b"\xff\xff" + content[102:])
    assert load() == tokens
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    assert load() == tokens
    assert len(warnings) == 1
    os.utime(tiny_corpus)  # changed just now, so its record is not used, nor is the token file trusted
    file.write_bytes(content[:100] + b"\xff\xff" + content[102:])
    assert load() == tokens


def test_the_checksum_is_computed_once_for_a_file_that_does_not_change(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data import TokenFile

    old = time.time() - 60
    os.utime(tiny_corpus, (old, old))
    config = DataConfig(dataset=str(tiny_corpus))
    load_corpus(config, 8, tmp_path / "corpora")
    computed: list[Path] = []
    crc32 = TokenFile.crc32
    monkeypatch.setattr(TokenFile, "crc32", lambda self: computed.append(self.path) or crc32(self))
    load_corpus(config, 8, tmp_path / "corpora")
    assert not computed
    (file,) = (tmp_path / "corpora" / "encoded").glob("*.uint16")
    os.utime(file)
    load_corpus(config, 8, tmp_path / "corpora")
    load_corpus(config, 8, tmp_path / "corpora")
    assert computed == [file]


# --------------------------------------------------------------------------------------------- duration


def test_the_duration_is_the_sum_of_the_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = Run.create(tmp_path)
    now[0] += 2
    run.finish("interrupted")
    run.release()
    record = read_record(run.path)
    assert record["seconds"] == 2
    record |= {"start": "2026-01-01T00:00:00+00:00", "end": "2025-01-01T00:00:00+00:00"}  # the clock was set back
    assert duration_of(run.path, record, alive=False) == 2
    now[0] += 5 * 86400
    again = Run.resume(run.path)
    again.restart(["train.py"], 1)
    now[0] += 3
    again.finish("completed")
    again.release()
    assert read_record(run.path)["seconds"] == pytest.approx(5)
    assert read_run(run.path).row()["duration"] == pytest.approx(5)


def test_inspecting_a_crashed_run_does_not_extend_its_duration(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", status="running", start="2026-01-01T00:00:00+00:00", end=None)
    died = datetime(2026, 1, 1, 0, 1, tzinfo=UTC).timestamp()
    with held_lock(run):
        pass
    os.utime(run / LOCK, (died, died))
    assert duration_of(run, read_record(run), alive=False) == 60
    looking = Run.resume(run)
    looking.settle()
    looking.release()
    assert duration_of(run, read_record(run), alive=False) == 60
    again = Run.resume(run)
    again.restart(["train.py"], 1)
    again.release()
    assert read_record(run)["seconds"] == 60
    assert time.time() - (run / LOCK).stat().st_mtime < 60


def test_the_duration_of_older_records_excludes_the_pauses(tmp_path: Path) -> None:
    before = {"status": "interrupted", "end": "2026-01-01T00:00:02+00:00"}
    resumes = [{"time": "2026-01-06T00:00:00+00:00", "step": 1, "before": before}]
    times = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-06T00:00:03+00:00"}
    assert duration_of(tmp_path, record_of("old", resumes=resumes, **times), alive=False) == 5
    backwards = {"start": "2026-01-01T00:00:00+00:00", "end": "2025-01-06T00:00:03+00:00"}
    assert duration_of(tmp_path, record_of("old", **backwards), alive=False) == 0


# --------------------------------------------------------------------------------------------- extended


@pytest.mark.slow
def test_an_extended_run_is_reproduced_with_the_evaluation_at_its_old_end(
    tiny_argv: Argv, only_run: Callable[[], Path]
) -> None:
    words = ("--schedule", "constant", "--warmup-iters", "0", "--learning-rate", "0.3", "--export-weights", "best")
    assert train.main(tiny_argv(*words, "--max-iters", "5")) == 0
    run = only_run()
    assert train.main(["--resume", str(run), "--max-iters", "9"]) == 0
    assert json.loads((run / "meta" / "full_config.json").read_text())["train"]["eval_at"] == [5]
    found = reproduce(read_run(run), ROOT, code="current")
    steps = [
        [record["step"] for record in map(json.loads, (path / "logs" / "metrics.jsonl").open()) if "val/loss" in record]
        for path in (run, run.with_name(found.repetition))
    ]
    assert steps == [[0, 3, 5, 6, 9]] * 2
    assert found.identical
    assert found.weights


# ----------------------------------------------------------------------------------------------- digits


def test_numbers_have_as_many_digits_as_distinguish_them() -> None:
    values = [0.00123456789, 0.00123456781, 1e-5, 3e-4, 64.0, 0.1 + 0.2]
    for text in (number_text, lambda value: column_text("learning_rate", value)):
        assert [float(text(value)) for value in values] == values
    assert number_text(0.0003) == "0.0003"
    assert number_text(64.0) == "64"
