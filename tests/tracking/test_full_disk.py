"""runs/ and .aim are on one disk, as by default, and it fills up: the process ends, and the run is marked as failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.runs.run import read_status

pytestmark = pytest.mark.usefixtures("warm_processes")
ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECONDS = 60.0
STEPS = ("--max-iters", "40", "--eval-interval", "20", "--flush-interval", "5", "--checkpoint-interval", "10")


@pytest.fixture
def roomy_disk(small_disk: Path) -> Path:
    """A file system of 24 megabytes, which is enough for Aim."""
    subprocess.run(["mount", "-o", "remount,size=24m", small_disk], check=True)
    return small_disk


def fill(folder: Path) -> None:
    """Write until nothing more fits."""
    with (folder / "filling").open("wb", buffering=0) as file:
        for piece in (bytes(1 << 16), b"x"):
            while True:
                try:
                    file.write(piece)
                except OSError:
                    break


@pytest.mark.parametrize("tracker", ["--aim-logging", "--no-aim-logging"])
def test_training_ends_with_one_error_if_the_disk_of_runs_and_aim_is_full(
    tracker: str, roomy_disk: Path, tiny_argv: Callable[..., list[str]]
) -> None:
    if tracker == "--aim-logging":
        pytest.importorskip("aim", reason="Aim has no build for this Python", exc_type=ImportError)
    reader, writer = os.pipe()
    places = ("--runs-dir", str(roomy_disk / "runs"), "--aim-repo", str(roomy_disk))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "troubled_training.py"), "pause", "20"]
        + tiny_argv(*STEPS, *places, tracker),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writer],
        env={**os.environ, "PAUSE_FD": str(writer)},
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as paused:
            assert paused.readline() == "paused\n"
        fill(roomy_disk)
        output, errors = process.communicate("go on\n", timeout=ANSWER_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, output + errors
    assert "Traceback" not in output + errors, output + errors
    assert "No space left on device" in output + errors
    (run,) = (roomy_disk / "runs").iterdir()
    assert read_status(run) in ("failed", "crashed")
