"""The learning-rate range test: the rising rates, the analysis of the losses, and what is printed and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import profile_model
from model import LanguageModel
from utils.errors import UserError
from utils.training.lr_range import DIVERGED, LrRange, analyse, draw, rising_rates, save, table, terminal_plot

Argv = Callable[..., list[str]]
STEPS = 100
RATES = [1e-5 * 1e5 ** (k / (STEPS - 1)) for k in range(STEPS)]


def valley(edge: float = 3e-3, noise: float = 0.0, first: float = 4.6) -> list[float]:
    """Losses that fall to 3 at the rate `edge` and rise beyond it."""
    generator = np.random.default_rng(0)
    distance = np.log10(np.array(RATES) / edge)
    losses = 3 + (first - 3) * np.where(distance < 0, (distance / math.log10(RATES[0] / edge)), distance) ** 2
    return list(losses + noise * generator.standard_normal(STEPS))


def test_rates_grow_by_the_same_factor_from_the_first_to_the_last() -> None:
    rates, losses, diverged_at = rising_rates(lambda rate: 1.0, 1e-5, 1.0, STEPS)
    assert rates == pytest.approx(RATES)
    assert (rates[0], rates[-1]) == (1e-5, pytest.approx(1.0))
    assert (losses, diverged_at) == ([1.0] * STEPS, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_test(bad: float) -> None:
    rates, losses, diverged_at = rising_rates(lambda rate: bad if rate > 0.1 else 2.0, 1e-5, 1.0, STEPS)
    assert len(rates) == len(losses) < STEPS
    assert rates[-1] <= 0.1 < diverged_at  # type: ignore[operator]
    assert all(map(math.isfinite, losses))


def test_a_loss_above_that_of_the_initial_weights_ends_the_test_but_one_outlier_does_not() -> None:
    losses = iter([2.0] * 30 + [2.2 * DIVERGED] + [2.0] * 20 + [2.3 * DIVERGED] * STEPS)
    rates, seen, diverged_at = rising_rates(lambda rate: next(losses), 1e-5, 1.0, STEPS)
    assert 51 < len(seen) < 58
    assert diverged_at == rates[-1]


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("edge", [3e-4, 3e-3, 3e-2])
def test_the_suggestion_is_half_the_rate_at_which_the_loss_stops_falling(edge: float, noise: float) -> None:
    result = analyse(RATES, valley(edge, noise), None, STEPS)
    assert result.problem is None
    assert edge / (2.5 if noise else 1.3) < result.edge < edge * 1.3  # noise ends a flat valley early
    assert result.suggestion == pytest.approx(result.edge / 2, rel=0.05)
    assert result.steepest < result.edge


def test_a_second_valley_beyond_the_first_rise_is_ignored() -> None:
    losses = np.array(valley(3e-3))
    rates = np.array(RATES)
    losses[rates > 3e-2] = 2.5  # it fell once more, by luck
    assert analyse(RATES, list(losses), None, STEPS).edge == pytest.approx(3e-3, rel=0.3)


def test_without_a_fall_or_a_rise_there_is_no_suggestion() -> None:
    flat = analyse(RATES, [4.6] * STEPS, None, STEPS)
    assert flat.suggestion is None
    assert "the loss has not fallen" in str(flat.problem)
    falling = analyse(RATES, list(np.linspace(4.6, 3.0, STEPS)), None, STEPS)
    assert falling.suggestion is None
    assert "--lr-max must be higher" in str(falling.problem)
    with pytest.raises(UserError, match="diverged within 4 steps: --lr-min must be lower"):
        analyse(RATES[:3], [4.6, 5, 6], RATES[3], STEPS)


@pytest.fixture
def result() -> LrRange:
    return analyse(RATES[:90], valley(noise=0.05)[:90], RATES[90], STEPS)


@pytest.mark.parametrize("width", [60, 80, 110])
@pytest.mark.parametrize("colour", [True, False])
def test_the_plot_in_the_terminal_fits_its_size(result: LrRange, width: int, colour: bool) -> None:
    text = terminal_plot(result, width, 18, colour)
    lines = text.split("\n")
    assert len(lines) <= 18
    assert ("\x1b[" in text) == colour
    if not colour:
        assert max(map(len, lines)) <= width
    assert all(f"1e-{power}" in text for power in range(1, 6))
    assert "learning rate" in text


def test_the_table_names_the_flag_and_the_rule(result: LrRange) -> None:
    text = str(table(result))
    assert f"--learning-rate {result.suggestion:g}, half of the rate where" in text
    assert f"diverges       at {result.diverged_at:.1e}" in text
    assert "none: the loss has not fallen" in str(table(analyse(RATES, [4.6] * STEPS, None, STEPS)))


def test_the_saved_files_hold_the_result(result: LrRange, tmp_path: Path) -> None:
    assert save(result, tmp_path) == [tmp_path / "lr_range.json", tmp_path / "lr_range.png"]
    saved = json.loads((tmp_path / "lr_range.json").read_text(encoding="utf-8"))
    assert LrRange(**{key: value for key, value in saved.items() if key != "rule"}) == result
    assert (tmp_path / "lr_range.png").read_bytes() == draw(result)
    assert draw(result).startswith(b"\x89PNG")


def test_the_script_tests_the_configuration_and_creates_no_run(
    tiny_argv: Argv, tmp_path: Path, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--lr-range", "--lr-steps", "40", "--lr-max", "10", "--gradient-accumulation-steps", "2")
    saved = []
    for name in ("one", "two"):
        assert profile_model.main(tiny_argv(*words, "--out", str(tmp_path / name))) == 0
        saved.append((tmp_path / name / "lr_range.json").read_bytes())
    assert saved[0] == saved[1]  # the same seed gives the same test
    losses = json.loads(saved[0])["losses"]
    assert losses[0] == pytest.approx(math.log(40), rel=0.1)  # the loss of the initial weights
    assert min(losses) < losses[0]
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("loss (nats per token)", "falls fastest", "suggestion", "lr_range.png"))
    assert not runs_dir.exists()


def test_a_batch_in_lanes_is_never_in_memory_as_a_whole(
    tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []
    loss = LanguageModel.loss

    def watched(model: LanguageModel, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(idx))
        return loss(model, idx, targets)

    monkeypatch.setattr(LanguageModel, "loss", watched)
    words = ("--lr-range", "--lr-steps", "20", "--batch-size", "8", "--lanes", "4", "--json")
    assert profile_model.main(tiny_argv(*words)) == 0
    assert sizes == [2] * 4 * len(json.loads(capsys.readouterr().out)["losses"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--lr-min", "0"), "--lr-min and --lr-max: expected 0 < min < max, got 0 and 1"),
        (("--lr-min", "2"), "--lr-min and --lr-max: expected 0 < min < max, got 2 and 1"),
        (("--lr-max", "nan"), "--lr-min and --lr-max: expected 0 < min < max"),
        (("--lr-steps", "5"), "--lr-steps must be at least 20, not 5"),
        (("--lr-steps", "x"), "argument --lr-steps"),
    ],
)
def test_invalid_rates_and_steps_are_refused_in_one_line(
    tiny_argv: Argv, words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv("--lr-range", *words)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {error}")
    assert message.count("\n") == 1


def test_a_folder_that_cannot_be_created_is_reported_before_training(
    tiny_argv: Argv, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv("--lr-range", "--out", str(tiny_corpus))) == 2
    printed = capsys.readouterr()
    assert "cannot be created" in printed.err
    assert "suggestion" not in printed.out
