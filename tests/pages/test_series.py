"""The points of a metric: they equal those of `Curve`, grow with the log, and keep their extremes when thinned."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from fake_runs import indexed, log_lines

from utils.errors import UserError
from utils.experiments.curve import AXES, read_curve
from utils.experiments.thinning import kept_points
from utils.pages import series as series_module
from utils.pages.curves import ChartRequest, chart
from utils.pages.series import SERIES_POINTS, Series, SeriesStore
from utils.runs.index import IndexedRun, read_run
from utils.runs.layout import METRICS_LOG


def records(first: int, last: int, pause: float = 0.0) -> list[dict[str, Any]]:
    """Records with a training loss at each step and a validation loss at every tenth."""
    rng, found = random.Random(first), []
    for step in range(first, last):
        time = 1000.0 + step * 0.5 + pause
        if step % 10 == 0:
            found.append({"step": step, "time": time, "tokens": 64 * step, "val/loss": rng.random()})
        found.append({"step": step, "time": time + 0.1, "tokens": 64 * step, "train/loss": rng.random()})
    return found


def append(run: IndexedRun, text: str) -> None:
    with (run.path / METRICS_LOG).open("a", encoding="utf-8") as file:
        file.write(text)


def assert_as_curve(run: IndexedRun, series: Series, metric: str) -> None:
    curve = read_curve(run.path, metric)
    assert repr(list(series.values)) == repr(curve.values)  # repr, because nan is not equal to itself
    for axis in AXES:
        assert list(series.places(axis)) == curve.places(axis)


def test_a_series_equals_the_curve_of_the_log(tmp_path: Path) -> None:
    resumes = [{"time": "1970-01-01T00:17:10+00:00", "step": 30}]  # 1030 s
    odd = [{"step": 60, "time": 900.0, "train/loss": "nan"}, {"step": 61, "time": 1300.0, "val/loss": "-inf"}]
    runs = [
        indexed(tmp_path, "a", metrics=[*records(0, 30), *records(30, 60, pause=200.0), *odd], resumes=resumes),
        indexed(tmp_path, "b[1]*", metrics=records(0, 25)),
        indexed(tmp_path, "empty"),
        indexed(tmp_path, "none", metrics=[{"step": 1, "time": 2.0}]),
    ]
    store = SeriesStore()
    for metric in ("val/loss", "train/loss", "tokens", 'it\'s "odd"'):
        for run, series in zip(runs, store.read(runs, metric), strict=True):
            assert series.problem is None
            assert_as_curve(run, series, metric)


def test_reading_continues_at_the_end_of_the_known_log_and_a_torn_line_waits(tmp_path: Path) -> None:
    run, store = indexed(tmp_path, metrics=records(0, 20)), SeriesStore()
    (first,) = store.read([run], "train/loss")
    append(run, log_lines(records(20, 40)) + '{"step": 40, "time": 9')
    (second,) = store.read([run], "train/loss")
    assert second is first
    assert len(second.values) == 40
    append(run, '999.0, "train/loss": 3.5}\n')
    assert store.read([run], "train/loss")[0].values[-1] == 3.5
    assert_as_curve(run, first, "train/loss")


def test_the_first_reading_leaves_a_torn_line_for_the_next_one(tmp_path: Path) -> None:
    run, store = indexed(tmp_path, metrics=records(0, 20)), SeriesStore()
    append(run, '{"step": 20, "time": 9999.0, "train/loss": 3.5}')  # complete except for its line break
    assert len(store.read([run], "train/loss")[0].values) == 20
    append(run, "\n")
    assert list(store.read([run], "train/loss")[0].values)[20:] == [3.5]


def test_a_log_that_a_resume_has_cut_is_read_again_from_the_start(tmp_path: Path) -> None:
    run, store = indexed(tmp_path, metrics=records(0, 20)), SeriesStore()
    (before,) = store.read([run], "train/loss")
    other = [*records(0, 10), *records(10, 30, pause=50.0)]
    (run.path / METRICS_LOG).write_text(log_lines(other), encoding="utf-8")
    (after,) = store.read([run], "train/loss")
    assert after.generation != before.generation
    assert_as_curve(run, after, "train/loss")


def test_a_damaged_log_hides_no_other_log(tmp_path: Path) -> None:
    good, bad = indexed(tmp_path, "good", metrics=records(0, 20)), indexed(tmp_path, "bad", metrics=records(0, 20))
    away = indexed(tmp_path, "away", metrics=records(0, 5))
    (bad.path / METRICS_LOG).write_bytes(b"\x00\xff{" + b"[" * 5000)
    (away.path / METRICS_LOG).unlink()
    (away.path / METRICS_LOG).symlink_to("/etc/passwd")
    found = SeriesStore().read([bad, good, away], "train/loss")
    assert [len(series.values) for series in found] == [0, 20, 0]
    assert found[2].problem


def test_thinning_keeps_the_ends_and_the_extremes_of_each_stretch() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(100_000)]
    values[77_777], values[50_001] = 1e6, -1e6
    places = [float(i) for i in range(len(values))]
    for is_log in (False, True):
        kept = list(kept_points(places, values, 1000, is_log))
        assert kept == sorted(set(kept))
        assert {0, 77_777, 50_001, 99_999} <= set(kept)
        assert len(kept) <= 1002
    stretches = [list(kept_points(places[1:], values[1:], 1000, is_log)) for is_log in (False, True)]
    assert sum(i < 1000 for i in stretches[1]) > 10 * sum(i < 1000 for i in stretches[0])  # 3 of 5 decades


@pytest.mark.parametrize("places", [[0.0] * 50, [*range(50)], [5.0, *[7.0] * 49]])
def test_thinning_of_points_at_one_place_keeps_their_extremes(places: list[float]) -> None:
    values = [float(i * 7 % 50) for i in range(50)]
    kept = kept_points(places, values, 10, log_axis=True)
    assert {min(values), max(values)} <= {values[i] for i in kept}
    assert list(kept_points([], [], 10)) == []


def test_a_chart_sends_only_points_that_the_page_does_not_have(tmp_path: Path) -> None:
    runs = [indexed(tmp_path, name, metrics=records(0, 500)) for name in ("a", "b")]
    store = SeriesStore()
    whole = chart(runs, store, ChartRequest("train/loss", smooth=0.5))
    known = {curve["run"]: curve["cursor"] for curve in whole["curves"]}
    assert [len(curve["x"]) for curve in whole["curves"]] == [500, 500]
    append(runs[0], log_lines(records(500, 503)))
    delta = chart(runs, store, ChartRequest("train/loss", smooth=0.5, known=known))
    (curve,) = delta["curves"]
    assert (curve["run"], curve["added"], curve["x"]) == ("a", True, [500, 501, 502])
    again = chart(runs, store, ChartRequest("train/loss", smooth=0.5, points=4000))["curves"][0]
    assert curve["y"] == pytest.approx(again["y"][-3:], abs=1e-5)  # smoothed with all earlier points
    known["a"] = curve["cursor"]
    assert chart(runs, store, ChartRequest("train/loss", smooth=0.5, known=known))["curves"] == []
    assert len(json.dumps(delta)) < 400 < 10_000 < len(json.dumps(whole))
    for bad in ("", "x.y", "1.", f"{known['b']}0"):
        (curve,) = chart(runs[1:], store, ChartRequest("train/loss", known={"b": bad}))["curves"]
        assert len(curve["x"]) == 500 or curve.get("added")


def test_a_group_shows_the_mean_and_deviation_of_its_runs(tmp_path: Path) -> None:
    def steps(value: float) -> list[dict[str, Any]]:
        return [{"step": i, "time": float(i), "val/loss": value + i} for i in range(5)]

    runs = [
        indexed(tmp_path, f"r{i}", settings={"learning_rate": rate, "seed": i}, metrics=steps(value))
        for i, (rate, value) in enumerate([(0.1, 1.0), (0.1, 3.0), (0.2, 9.0)])
    ]
    first, second = chart(runs, SeriesStore(), ChartRequest("val/loss", group="learning_rate"))["groups"]
    assert (first["name"], first["runs"]) == ("learning_rate=0.1", ["r0", "r1"])
    assert first["y"] == [2, 3, 4, 5, 6]
    assert [high - low for low, high in zip(first["low"], first["high"], strict=True)] == pytest.approx(
        [8**0.5] * 5, abs=1e-4
    )
    assert (second["runs"], second["y"], "low" in second) == (["r2"], [9, 10, 11, 12, 13], False)


def test_a_group_whose_runs_share_no_step_says_so(tmp_path: Path) -> None:
    runs = [
        indexed(tmp_path, name, metrics=[{"step": i, "time": 1.0, "val/loss": 1.0} for i in steps])
        for name, steps in (("crashed", (0, 10)), ("fork", (20, 30)))
    ]
    (group,) = chart(runs, SeriesStore(), ChartRequest("val/loss", group="learning_rate"))["groups"]
    assert (group["x"], group["problem"]) == ([], "its 2 runs share no part of the axis, so they have no mean")


def test_a_zoomed_chart_has_all_points_of_its_range(tmp_path: Path) -> None:
    run = indexed(tmp_path, metrics=[{"step": i, "time": float(i), "x": i % 7} for i in range(5000)])
    request = ChartRequest("x", points=200, start=100.0, end=150.0)
    (curve,) = chart([run], SeriesStore(), request)["curves"]
    assert curve["x"] == list(range(99, 152))
    assert chart([run], SeriesStore(), ChartRequest("x", start=9e9))["curves"][0]["x"] == []


@pytest.mark.parametrize("name", ["", "step", "TIME", "Tokens", "file"])
def test_a_name_that_cannot_be_a_metric_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a metric"):
        chart([read_run(tmp_path)], SeriesStore(), ChartRequest(name))


def test_values_that_are_not_finite_are_counted_but_not_drawn(tmp_path: Path) -> None:
    values = [1.0, "nan", 2.0, "inf", 3.0]
    run = indexed(tmp_path, metrics=[{"step": i, "time": float(i), "val/loss": v} for i, v in enumerate(values)])
    (curve,) = chart([run], SeriesStore(), ChartRequest("val/loss"))["curves"]
    assert (curve["y"], curve["not_finite"]) == ([1, 2, 3], 2)
    assert all(map(math.isfinite, curve["y"]))
    (group,) = chart([run], SeriesStore(), ChartRequest("val/loss", group="seed"))["groups"]
    assert (group["y"], group["not_finite"]) == ([1, 2, 3], 2)


def test_a_curve_that_is_continued_counts_all_values_that_are_not_finite(tmp_path: Path) -> None:
    run, store = indexed(tmp_path, metrics=[{"step": 0, "time": 0.0, "x": "nan"}]), SeriesStore()
    (whole,) = chart([run], store, ChartRequest("x"))["curves"]
    with (run.path / METRICS_LOG).open("a") as log:
        log.write(log_lines([{"step": 1, "time": 1.0, "x": 1.0}, {"step": 2, "time": 2.0, "x": "nan"}]))
    (added,) = chart([run], store, ChartRequest("x", known={whole["run"]: whole["cursor"]}))["curves"]
    assert (added["added"], added["y"], added["not_finite"]) == (True, [1], 2)


def test_a_cursor_with_an_absurd_number_gets_the_whole_curve(tmp_path: Path) -> None:
    run, store = indexed(tmp_path, metrics=[{"step": 0, "time": 0.0, "x": 1.0}]), SeriesStore()
    (whole,) = chart([run], store, ChartRequest("x"))["curves"]
    generation = whole["cursor"].partition(".")[0]
    request = ChartRequest("x", known={whole["run"]: f"{generation}.{'9' * 5000}"})
    assert chart([run], store, request)["curves"] == [whole]


def test_series_of_unknown_metrics_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = indexed(tmp_path, metrics=[{"step": 0, "time": 0.0, "x": 1.0}]), SeriesStore()
    monkeypatch.setattr(series_module, "MOST_POINTS", 3 * SERIES_POINTS)
    for i in range(6):
        store.read([run], f"none/{i}")
    assert len(store._series) <= 3
