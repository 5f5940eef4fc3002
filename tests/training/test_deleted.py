"""A run directory that is deleted or moved during training: noticed at the next write, and not created again."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from utils.runs.log import RunLog


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "one log"])
def test_a_log_that_is_no_longer_in_its_place_is_noticed(tmp_path: Path, how: str) -> None:
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    log = RunLog(logs)
    log.metrics.write([{"step": 1}])
    if how == "one log":
        log.metrics.path.unlink()
    elif how == "moved":
        logs.parent.rename(tmp_path / "moved")
    else:
        shutil.rmtree(logs.parent)
    if how == "replaced":
        logs.mkdir(parents=True)
        log.metrics.path.touch()
    with pytest.raises(OSError, match="was deleted or moved while it was trained") as caught:
        log.metrics.write([{"step": 2}])
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(logs.parent))
    if how == "moved":
        assert (tmp_path / "moved" / "logs" / "metrics.jsonl").read_text() == '{"step":1}\n'
    log.close()


@pytest.mark.parametrize("moved", [False, True])
def test_training_ends_with_one_line_and_recreates_nothing(
    tiny_argv: Callable[..., list[str]],
    runs_dir: Path,
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    moved: bool,
) -> None:
    gone: list[Path] = []

    def remove() -> None:
        gone.extend(runs_dir.iterdir())
        shutil.move(runs_dir, tmp_path / "moved")
        if not moved:
            shutil.rmtree(tmp_path / "moved")

    after_step(4, remove)
    assert train.main(tiny_argv("--checkpoint-interval", "1")) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {gone[0]}: was deleted or moved while it was trained\n"
    assert "was not written" not in printed.out
    assert not runs_dir.exists()
