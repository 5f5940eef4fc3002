"""What is reported at the end of a run, about a tracker that cannot be installed, and about unknown characters."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny_export import char_tokenizer
from tokenizer import TokenizerError
from utils.runs.run import Run
from utils.tracking import views
from utils.training.result import TrainResult, short_name


def result(last: float | None, best: float | None, exported: str | None) -> TrainResult:
    return TrainResult(Path("runs/x"), "completed", None, 10, 1.0, last, 10, best, 5, 1.0, 100, exported)


def test_last_weights_that_are_far_worse_than_the_best_are_reported() -> None:
    warning = result(422.0, 4.55, "last weights, of step 10").warning
    assert warning is not None
    for words in ("422.0000", "4.5500 at step 5", "the export has the last weights", "--export-weights best"):
        assert words in warning
    assert "export has" not in str(result(422.0, 4.55, None).warning)
    assert result(422.0, 4.55, "best weights, of step 5").warning is None
    assert result(4.6, 4.55, "last weights, of step 10").warning is None
    assert result(None, None, None).warning is None


@pytest.mark.parametrize(("tag", "by_tag"), [("wide", True), ("-wide", False)])
def test_a_command_names_a_run_by_its_tag_unless_that_reads_as_a_flag(
    tag: str, by_tag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.training.result.is_default_runs_dir", lambda folder: True)
    run = Run.create(tmp_path / "runs", tag)
    assert short_name(run) == tag if by_tag else short_name(run).endswith(run.id)
    run.release()


def test_platforms_without_builds_of_aim_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, platform, words in (
        ((3, 12), "linux", None),
        ((3, 13), "linux", "aim has no builds for Python 3.13 on linux"),
        ((3, 11), "win32", "aim has no builds for Python 3.11 on win32"),
    ):
        monkeypatch.setattr(views, "sys", SimpleNamespace(version_info=(*version, 0), platform=platform))
        assert views.without_builds("aim") == words
        assert views.without_builds("wandb") is None


def test_an_unknown_character_names_the_remedy() -> None:
    with pytest.raises(TokenizerError, match=r"'ü' .* of the vocabulary; --unknown-token ' ' reads it as ' '"):
        char_tokenizer("ab ").encode("aü")


def test_the_result_as_json_has_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    ended = dataclasses.replace(result(math.nan, 2.0, None), signum=15)
    assert ended.report(as_json=True) == 143
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == set(ended)
    assert (printed["run_dir"], printed["val_loss"], printed["best_val_loss"]) == ("runs/x", "nan", 2.0)
    assert ended.report(as_json=False) == 143
    assert not capsys.readouterr().out
