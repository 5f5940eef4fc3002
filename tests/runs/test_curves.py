"""artifacts/curves.png is drawn after a run, whatever the losses were."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import train
from utils.runs import curves
from utils.runs.curves import draw_curves, thinned_records
from utils.runs.layout import CURVES, METRICS_LOG
from utils.runs.metrics import decode_number, metric_record

Argv = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def quick_pictures() -> None:
    """Render the pictures in these tests, unlike in the others."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that has no log yet."""
    path = tmp_path / "20260131_142501_some-tag_1.0"
    for folder in ("logs", "artifacts"):
        (path / folder).mkdir(parents=True)
    return path


def write_log(run: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "logs" / "metrics.jsonl").write_text(lines, encoding="utf-8")


def steps(losses: Iterable[float]) -> list[dict[str, Any]]:
    return [metric_record(step, 0.0, {"train/loss": loss}) for step, loss in enumerate(losses)]


def size(picture: Path) -> tuple[int, int]:
    """The width and height in the header of a PNG."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_a_training_leaves_a_picture_of_its_losses(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv()) == 0
    picture = only_run() / CURVES
    assert size(picture) == (960, 540)
    assert 5_000 < picture.stat().st_size < 500_000
    assert not list(picture.parent.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(
    "records",
    [[], [metric_record(0, 0.0, {"lr": 0.1})], [metric_record(3, 0.0, {"system/process_cpu": 5.0})]],
    ids=["empty", "no losses", "system only"],
)
def test_without_losses_there_is_no_picture(records: list[dict[str, Any]], run: Path) -> None:
    write_log(run, records)
    assert not draw_curves(run)
    assert not (run / CURVES).exists()


def test_without_a_log_there_is_no_picture(run: Path) -> None:
    assert not draw_curves(run)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses",
    [
        ["nan"],
        ["inf", "-inf", "nan"],
        [3.0, 2.5, "nan"],
        [3.0, "inf", 2.5, "-inf"],
        [3e38, -3e38, 1.0],
        [1e-300, 0.0],
        [2.0],
        [2.0, 2.0],
    ],
    ids=str,
)
def test_losses_that_are_not_finite_do_not_break_the_picture(losses: list[float | str], run: Path) -> None:
    write_log(run, steps(map(decode_number, losses)))
    assert draw_curves(run)
    assert size(run / CURVES) == (960, 540)


def test_the_same_log_gives_the_same_picture(run: Path) -> None:
    evaluation = metric_record(3, 0.0, {"train/eval_loss": 2.0, "val/loss": 2.5})
    write_log(run, [*steps([3.0, 2.5, 2.2]), evaluation])
    assert draw_curves(run)
    first = (run / CURVES).read_bytes()
    assert draw_curves(run)
    assert (run / CURVES).read_bytes() == first
    write_log(run, [*steps([3.0, 2.5, 2.1]), evaluation])
    assert draw_curves(run)
    assert (run / CURVES).read_bytes() != first


def test_records_of_callbacks_do_not_thin_out_the_losses(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "POINTS", 500)
    pairs = ((record, {"step": record["step"], "own": 1.0}) for record in steps(2.0 for _ in range(6000)))
    write_log(run, [*itertools.chain.from_iterable(pairs)])
    shown = [record["step"] for record in thinned_records(run / METRICS_LOG)]
    gaps = {after - before for before, after in itertools.pairwise(shown)}
    assert len(gaps) == 1
    assert 100 < len(shown) < 1200


def test_a_long_run_is_drawn_in_seconds(run: Path) -> None:
    write_log(run, steps(2 + 1 / (1 + step) + step % 7 / 100 for step in range(100_000)))
    began = time.process_time()
    assert draw_curves(run)
    assert time.process_time() - began < 10  # about 1 s
    assert size(run / CURVES) == (960, 540)
