"""Sampling: the filters, the distribution of what is drawn, and the random streams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from utils.config.settings import InferenceConfig
from utils.errors import UserError
from utils.inference.sampling import (
    AHEAD,
    HIGHEST_TEMPERATURE,
    RandomStreams,
    SamplingError,
    SamplingOptions,
    filter_logits,
    sample,
)

CPU = torch.device("cpu")
INF = float("inf")


def uniform(count: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------ filters

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 in another order, exact in binary.
PROBABILITIES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
LOGITS = PROBABILITIES.log()[None]  # (1, V)


def kept(logits: torch.Tensor = LOGITS, **settings: Any) -> set[int]:
    filtered = filter_logits(logits, SamplingOptions(temperature=1.0, **settings))
    chosen = filtered[0] > -INF
    shift = filtered[0][chosen] - logits[0][chosen]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))  # the odds among the kept tokens do not change
    return set(chosen.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("top_k", "tokens"),
    [(None, {0, 1, 2, 3, 4}), (1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (5, {0, 1, 2, 3, 4}), (100, {0, 1, 2, 3, 4})],
)
def test_top_k_keeps_the_most_likely_tokens(top_k: int | None, tokens: set[int]) -> None:
    assert kept(top_k=top_k) == tokens


def test_top_k_keeps_all_that_tie_with_the_last_kept() -> None:
    assert kept(top_k=4) == {0, 1, 2, 3, 4}  # tokens 2 and 4 are equally likely, so dropping one would be arbitrary


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, {1}),
        (0.4, {1}),
        (0.51, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {0, 1, 3}),
        (0.99, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, tokens: set[int]) -> None:
    assert kept(top_p=top_p) == tokens


def test_top_p_takes_no_more_than_needed_of_equal_tokens() -> None:
    assert len(kept(top_p=0.6, logits=torch.zeros(1, 4))) == 3
    assert kept(top_p=0.25, logits=torch.zeros(1, 4096)) == set(range(1024))  # the first ones
    assert len(kept(top_p=0.9, logits=LOGITS)) == 4


def test_the_smallest_top_p_keeps_the_most_likely_token() -> None:
    assert kept(top_p=1e-50) == {1}


def test_a_banned_token_stays_banned_at_the_highest_temperature() -> None:
    options = SamplingOptions(HIGHEST_TEMPERATURE, banned=(0, 3), repetition_penalty=1e3)
    logits = filter_logits(LOGITS, options, torch.ones(1, 5, dtype=torch.bool))
    assert (logits > -INF).tolist() == [[False, True, True, False, True]]


def test_nan_logits_draw_a_token_of_the_vocabulary() -> None:
    assert sample(LOGITS * float("nan"), SamplingOptions(1.0), torch.tensor([0.5]).double()).tolist() == [4]


def test_top_p_is_applied_to_the_tokens_that_top_k_keeps() -> None:
    # After top_k = 2 the probabilities are 2/3 and 1/3, so the first alone reaches 0.6.
    assert kept(top_k=2, top_p=0.6) == {1}
    assert kept(top_k=2, top_p=0.7) == {1, 3}


def test_each_row_has_its_own_filter() -> None:
    logits = torch.stack((LOGITS[0], LOGITS[0].flip(0)))
    options_of_two = (SamplingOptions(1.0, top_k=2), SamplingOptions(1.0, top_p=0.7), SamplingOptions(1.0, min_p=0.4))
    for options in options_of_two:
        filtered = filter_logits(logits, options)
        assert (filtered > -INF).nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [1, 3]]


@pytest.mark.parametrize(
    "options", [SamplingOptions(0), SamplingOptions(1.0, top_k=1), SamplingOptions(1.0, top_p=0.1)]
)
def test_three_ways_to_the_most_likely_token(options: SamplingOptions) -> None:
    assert sample(LOGITS.repeat(50, 1), options, uniform(50)).tolist() == [1] * 50


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert sample(LOGITS.repeat(20, 1), SamplingOptions(temperature), uniform(20)).tolist() == [1] * 20


def test_ties_are_drawn_at_random_from_a_temperature_of_a_millionth_on() -> None:
    ties, numbers = torch.zeros(64, 2), uniform(64)
    assert set(sample(ties, SamplingOptions(1e-6), numbers).tolist()) == {0, 1}
    assert set(sample(ties, SamplingOptions(0.99e-6), numbers).tolist()) == {0}


def test_large_logits_over_a_small_temperature_do_not_overflow() -> None:
    logits = torch.tensor([[1e37, 3e37, 2e37, 0.0]])
    assert filter_logits(logits, SamplingOptions(1e-3)).isfinite().tolist() == [[False, True, False, False]]
    assert sample(logits, SamplingOptions(1e-3), uniform(1)).tolist() == [1]
    far_apart = torch.tensor([[3e37, 2e37], [2.0, 1.0]])  # each row has its own largest logit
    assert filter_logits(far_apart, SamplingOptions(1.0))[1].tolist() == [0.0, -1.0]


def test_top_p_1_keeps_tokens_whose_probability_is_rounded_to_nothing() -> None:
    logits = torch.tensor([[0.0, *[-17.0] * 50_000, -40.0]])  # without the last token the rounded sum is 1
    assert filter_logits(logits, SamplingOptions(1.0, top_p=1.0)).isfinite().all()


def test_a_token_after_top_p_is_reached_exactly_is_left_out() -> None:
    for options, count in ((SamplingOptions(1.0, top_p=0.5), 2), (SamplingOptions(1.0, top_p=0.25), 1)):
        assert (filter_logits(torch.zeros(1, 4), options) > -INF).sum() == count  # a quarter each, exactly


def test_draws_are_exact_to_double_precision() -> None:
    """Random numbers a billionth from the borders of tokens; in single precision borders are less exact than that."""
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    weights = [math.exp(logit) for logit in (logits - logits.max())[0].tolist()]
    total = math.fsum(weights)
    borders = [math.fsum(weights[: i + 1]) / total for i in range(0, 999, 9)]
    for shift in (-1e-9, 1e-9):
        numbers = torch.tensor([border + shift for border in borders], dtype=torch.float64)
        tokens = sample(logits.expand(len(borders), -1), SamplingOptions(1.0), numbers).tolist()
        assert tokens == [i + (shift > 0) for i in range(0, 999, 9)]


def test_the_largest_random_number_draws_no_banned_token() -> None:
    """Rounded probabilities may add up to less than it, in which case the last token could be drawn by mistake."""
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(2))
    largest = torch.full((2000,), 1 - 2**-53, dtype=torch.float64)
    tokens = sample(logits, SamplingOptions(1.0, banned=(48, 49)), largest)
    assert tokens.max() < 48


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SamplingOptions(1.0), [2, 8, 1, 4, 1]),
        (SamplingOptions(1.0, top_k=3), [1, 4, 0, 2, 0]),
        (SamplingOptions(1.0, top_p=0.8), [1, 4, 0, 2, 0]),
        (SamplingOptions(0.5, top_k=3), [1, 16, 0, 4, 0]),  # temperature 1/2 squares the odds
        (SamplingOptions(0.5), [4, 64, 1, 16, 1]),
        (SamplingOptions(1.0, min_p=0.2), [1, 4, 0, 2, 0]),
        (SamplingOptions(1.0, min_p=0.125), [2, 8, 1, 4, 1]),
        (SamplingOptions(0.5, min_p=0.2), [0, 4, 0, 1, 0]),  # after the temperature
        (SamplingOptions(1.0, banned=(1,)), [2, 0, 1, 4, 1]),
        (SamplingOptions(1.0, banned=(1,), top_k=2), [1, 0, 0, 2, 0]),
        (SamplingOptions(1.0, top_k=4, top_p=0.8, min_p=0.3), [0, 2, 0, 1, 0]),
    ],
)
def test_sampled_frequencies_match_the_filtered_softmax(options: SamplingOptions, expected: list[int]) -> None:
    draws = 20_000
    tokens = sample(LOGITS.repeat(draws, 1), options, uniform(draws))
    assert tokens.shape == (draws,)
    assert_drawn_from(torch.tensor(expected, dtype=torch.float64), tokens)


def assert_drawn_from(odds: torch.Tensor, tokens: torch.Tensor) -> None:
    """Pearson's chi-square test at the level of 0.1 %. Tokens with odds 0 must not be drawn at all."""
    counts = torch.bincount(tokens, minlength=len(odds)).double()
    assert (counts[odds == 0] == 0).all()
    means = (odds / odds.sum() * len(tokens))[odds > 0]
    chi_square = float(((counts[odds > 0] - means) ** 2 / means).sum())
    assert chi_square <= chi2.ppf(0.999, max(len(means) - 1, 1))


def test_a_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits, seen = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[True, True, False, False]])
    options = SamplingOptions(1.0, repetition_penalty=2.0)
    odds = torch.tensor([0.5, -2.0, 1.0, -1.0], dtype=torch.float64).exp()
    draws = 20_000
    tokens = sample(logits.repeat(draws, 1), options, uniform(draws), seen.repeat(draws, 1))
    assert_drawn_from(odds, tokens)
    greedy = SamplingOptions(0, repetition_penalty=2.0)
    assert sample(logits, greedy, uniform(1), seen).tolist() == [2]


def test_greedy_draws_no_banned_token() -> None:
    assert sample(LOGITS, SamplingOptions(0, banned=(1, 3)), uniform(1)).tolist() == [0]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_draw_an_allowed_token(number: float) -> None:
    logits = torch.tensor([[-INF, 0.0, 1.0, -INF]])
    (token,) = sample(logits, SamplingOptions(1.0), torch.tensor([number], dtype=torch.float64)).tolist()
    assert token == (1 if number == 0 else 2)


# ------------------------------------------------------------------------------ random streams


def test_a_stream_does_not_depend_on_the_others() -> None:
    alone, third = RandomStreams([7], CPU), RandomStreams([1, 2, 7], CPU)
    for _ in range(2 * AHEAD + 3):
        assert alone.draw()[0] == third.draw()[2]


def test_a_stream_equals_that_of_torch_in_double_precision() -> None:
    streams = RandomStreams([7], CPU)
    drawn = [streams.draw() for _ in range(AHEAD + 1)]
    generator = torch.Generator().manual_seed(7)
    expected = [torch.rand(AHEAD, dtype=torch.float64, generator=generator) for _ in range(2)]
    assert torch.equal(torch.cat(drawn), torch.cat(expected)[: AHEAD + 1])
    assert drawn[0].dtype == torch.float64


@pytest.mark.parametrize(("device", "numbers"), [("cpu", "cpu"), ("mps", "cpu"), ("meta", "meta")])
def test_random_numbers_are_on_the_device_if_it_has_double_precision(device: str, numbers: str) -> None:
    assert RandomStreams([7], torch.device(device)).draw().device.type == numbers


def test_streams_are_uniform_and_differ() -> None:
    streams = RandomStreams([0, 1], CPU)
    numbers = torch.stack([streams.draw() for _ in range(4000)])
    assert_drawn_from(torch.ones(20, dtype=torch.float64), (numbers[:, 0] * 20).long())
    assert abs(torch.corrcoef(numbers.T)[0, 1]) < 0.06


# ------------------------------------------------------------------------------ bounds

BOUNDS = {
    "temperature": "temperature must be from 0 (greedy) to 1,000,000",
    "top_k": "top-k must be at least 1",
    "top_p": "top-p must be above 0 and at most 1",
    "min_p": "min-p must be from 0 to 1",
    "repetition_penalty": "repetition-penalty must be from 0.001 to 1,000",
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": INF},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": -5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": -0.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": INF},
    ],
    ids=str,
)
def test_an_option_out_of_bounds_is_refused_by_name(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(SamplingError) as caught:
        SamplingOptions(**settings)
    assert str(caught.value) == f"{BOUNDS[name]}, not {value}"
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1e6},
        {"repetition_penalty": 1e3},
        {"repetition_penalty": 1e-3},
        {"top_k": 1},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_options_at_their_bounds_are_accepted(settings: dict[str, Any]) -> None:
    token = sample(LOGITS, SamplingOptions(**settings), uniform(1), torch.ones(1, 5, dtype=torch.bool))
    assert 0 <= int(token) < 5


def test_configured_options_follow_the_settings_of_inference() -> None:
    settings = InferenceConfig(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    assert SamplingOptions.configured(settings) == SamplingOptions(0.5, 7, 0.9, 0.1, 1.5)
    assert SamplingOptions.configured(InferenceConfig()) == SamplingOptions()


def test_every_row_is_filtered_as_if_alone() -> None:
    logits = 3 * torch.randn(6, 30, generator=torch.Generator().manual_seed(3))
    logits[1] -= 1e4  # far below the other rows
    seen = torch.rand(6, 30, generator=torch.Generator().manual_seed(4)) < 0.5
    for settings in ({}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}):
        options = SamplingOptions(0.7, repetition_penalty=1.5, banned=(2, 7), **settings)  # type: ignore[arg-type]
        together = filter_logits(logits, options, seen)
        alone = [filter_logits(logits[row : row + 1], options, seen[row : row + 1]) for row in range(6)]
        assert torch.equal(together, torch.cat(alone))


def test_filters_stay_on_the_device_of_the_logits() -> None:
    seen = torch.ones(2, 9, dtype=torch.bool, device="meta")
    options = SamplingOptions(0.7, top_k=5, top_p=0.6, min_p=0.1, repetition_penalty=1.5, banned=(2, 7))
    filtered = filter_logits(torch.zeros(2, 9, device="meta", dtype=torch.bfloat16), options, seen)
    assert (filtered.device.type, filtered.shape, filtered.dtype) == ("meta", (2, 9), torch.float32)
