"""The curves of several runs as text and as pictures."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from fake_runs import indexed, training_records
from rich.console import Console

from utils.errors import UserError
from utils.experiments.bands import band
from utils.experiments.curve import Curve
from utils.experiments.plot import (
    PlottedCurve,
    load_curves,
    names_of,
    plot_screen,
    save_plot,
    smoothed,
    terminal_plot,
)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FALLING = PlottedCurve("falling", [0, 10, 20, 30], [4.0, 3.0, 2.5, 2.25])
RISING = PlottedCurve("rising", [0, 10, 20, 30], [2.25, 2.5, 3.0, 4.0])


def run_with(tmp_path: Path, name: str, losses: list[Any], **facts: Any) -> Any:
    return indexed(tmp_path, name, metrics=training_records(losses), **facts)


def test_a_curve_has_the_values_of_the_log_on_each_axis(tmp_path: Path) -> None:
    run = run_with(tmp_path, "run", [4.0, 3.0, 2.5], tag="small")
    x = {axis: load_curves([run], "val/loss", axis, 0.0)[0].x for axis in ("step", "tokens", "time")}
    assert x == {"step": [0, 10, 20], "tokens": [0, 1000, 2000], "time": [0.0, 10.0, 20.0]}
    assert load_curves([run], "val/loss", "step", 0.0) == [PlottedCurve("small", [0, 10, 20], [4.0, 3.0, 2.5])]


def test_values_that_are_not_finite_are_left_out_of_a_curve(tmp_path: Path) -> None:
    runs = [run_with(tmp_path, "a", [4.0, "nan", "inf", 2.0]), run_with(tmp_path, "b", ["nan"])]
    assert load_curves(runs, "val/loss", "step", 0.5) == [PlottedCurve("a", [0, 30], pytest.approx([4.0, 8 / 3]))]
    with pytest.raises(UserError, match="no value of val/loss is finite"):
        load_curves(runs[1:], "val/loss", "step", 0.0)


def test_runs_without_the_metric_are_left_out(tmp_path: Path) -> None:
    runs = [indexed(tmp_path, "without"), run_with(tmp_path, "with", [1.0]), indexed(tmp_path, "gone")]
    (tmp_path / "gone" / "logs" / "metrics.jsonl").unlink()
    assert [curve.name for curve in load_curves(runs, "val/loss", "step", 0.0)] == ["with"]


def test_a_metric_that_no_run_logged_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    run = run_with(tmp_path, "run", [1.0])
    with pytest.raises(UserError, match=r"no run has logged val/los; did you mean val/loss\?"):
        load_curves([run], "val/los", "step", 0.0)
    with pytest.raises(UserError, match=r"no run has logged accuracy$"):
        load_curves([run], "accuracy", "step", 0.0)


@pytest.mark.parametrize("line", ["{", "[]", '{"val/loss": 1.0}'])
def test_a_damaged_log_is_reported_with_its_run(line: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, "run", [1.0])
    (run.path / "logs" / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^run: .* log is damaged"):
        load_curves([run], "val/loss", "step", 0.0)


def test_smoothing_is_a_moving_average_without_bias_towards_zero() -> None:
    assert smoothed([3.0, 1.0, 2.0], 0.0) == [3.0, 1.0, 2.0]
    assert smoothed([5.0] * 4, 0.9) == pytest.approx([5.0] * 4)
    assert smoothed([4.0, 2.0, 1.0], 0.5) == pytest.approx([4.0, (4 + 2 * 2) / 3, (4 + 2 * 2 + 4 * 1) / 7])


def test_runs_are_named_by_tag_and_equal_tags_by_id(tmp_path: Path) -> None:
    tags = {"a": "same", "b": "same", "c": "own", "d": None}
    assert names_of([indexed(tmp_path, name, tag=tag) for name, tag in tags.items()]) == ["a", "b", "own", "d"]


@pytest.mark.parametrize("size", [(100, 30), (80, 24), (60, 12)])
@pytest.mark.parametrize("colour", [True, False])
def test_the_text_plot_has_the_requested_size(size: tuple[int, int], colour: bool) -> None:
    width, height = size
    text = terminal_plot([FALLING, RISING], "val/loss", "time", width, height, colour)
    lines = COLOUR.sub("", text).split("\n")
    assert len(lines) == height
    assert max(map(len, lines)) == width
    assert lines[0] == "val/loss (nats)"
    assert "falling" in lines[1]
    assert "rising" in lines[1]
    assert lines[-1].strip() == "time of training (s)"
    assert bool(COLOUR.search(text)) == colour


def test_curves_can_be_told_apart_with_and_without_colours() -> None:
    colours = set(COLOUR.findall(terminal_plot([FALLING, RISING], "lr", "step", 80, 24)))
    assert {"\x1b[38;5;33m", "\x1b[38;5;208m"} <= colours
    assert not any("48;5" in colour for colour in colours)  # the background is the terminal's
    head, *plot = terminal_plot([FALLING, RISING], "lr", "step", 80, 24, colour=False).split("\n")[1:]
    assert head == "** falling   oo rising"
    assert all(mark in "".join(plot) for mark in "*o")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm-256color")])
def test_a_terminal_without_colours_has_a_mark_for_each_curve(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    console.print(*plot_screen([FALLING, RISING], "lr", "step", console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("** falling   oo rising" in text) == (value != "xterm-256color")


def test_numbers_on_the_axes_are_round() -> None:
    curve = PlottedCurve("a", [i * 1e4 for i in range(100)], [4 - i / 50 for i in range(100)])
    lines = terminal_plot([curve], "val/loss", "tokens", 80, 24, colour=False).split("\n")
    assert lines[-2].split() == ["0", *(f"{n}k" for n in range(100, 1000, 100))]
    assert [line[:3] for line in lines if "┤" in line] == ["4.0", "3.5", "3.0", "2.5"]


def test_the_legend_of_many_runs_fits_into_the_size_of_the_plot() -> None:
    names = [f"20260131_142501_a-run-with-a-long-tag_{i}" for i in range(9)]
    curves = [PlottedCurve(name, FALLING.x, FALLING.y) for name in [*names, "x" * 200]]
    lines = COLOUR.sub("", terminal_plot(curves, "val/loss", "step", 80, 30)).split("\n")
    assert (len(lines), max(map(len, lines))) == (30, 80)
    assert all(any(name in line for line in lines) for name in names)
    assert any(line.endswith("x…") for line in lines)


@pytest.mark.parametrize("y", [[2.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 3e-9], [3e38, -3e38]], ids=str)
def test_extreme_values_do_not_break_the_plots(y: list[float], tmp_path: Path) -> None:
    curves = [PlottedCurve("odd", [float(i) for i in range(len(y))], y)]
    assert len(terminal_plot(curves, "val/loss", "step", 80, 24, colour=False).split("\n")) == 24
    save_plot(curves, "val/loss", "step", tmp_path / "odd.png")


def test_a_long_run_is_drawn_as_text_quickly() -> None:
    curve = PlottedCurve("long", [float(i) for i in range(200_000)], [float(i % 13) for i in range(200_000)])
    assert len(terminal_plot([curve], "train/loss", "step", 100, 30).split("\n")) == 30


def test_a_png_file_is_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    save_plot([FALLING, RISING], "val/loss", "step", out)
    data = out.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 675)
    assert list(tmp_path.iterdir()) == [out]  # no temporary file is left


@pytest.mark.filterwarnings("error")
def test_an_svg_file_has_the_curves_and_is_the_same_each_time(tmp_path: Path) -> None:
    hidden = PlottedCurve("_a $name$", [0, 7200], [1.0, 2.0])
    for name in ("one.svg", "two.SVG"):
        save_plot([FALLING, hidden], "val/loss", "time", tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.SVG").read_text(encoding="utf-8")
    for comment in ("val/loss (nats)", "time of training (h)", "falling", "_a $name$"):
        assert f"<!-- {comment} -->" in text


def test_another_file_suffix_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curves.pdf: expected a file that ends in .png or .svg"):
        save_plot([FALLING], "val/loss", "step", tmp_path / "curves.pdf")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_plot([FALLING], "val/loss", "step", tmp_path / "none" / "curves.png")


@pytest.mark.parametrize("count", [3, 401, 2000])
def test_a_band_ends_where_its_curves_end(count: int) -> None:
    steps = [float(step) for step in range(count)]
    curves = [Curve(step=steps, values=[seed] * count) for seed in (1.0, 2.0)]
    found = band(curves, "step")
    assert (found.places[0], found.places[-1]) == (0, count - 1)
    assert len(found.places) <= 402
