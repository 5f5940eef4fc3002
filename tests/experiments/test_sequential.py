"""The sequential test, simulated on recorded losses of trained runs: no training here.

recorded_losses.json has the last val/loss of runs of a model with two layers of 32 channels, by variant and seed: the
baseline, three small changes with the same seeds (learning rate, beta2, weight decay), and a third layer, which gives
the same seed other first weights.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy import stats

from utils.experiments.noise import deviation_interval, needed
from utils.experiments.sequential import LEVEL, MAX_SEEDS, look, look_levels, seeds_for

RECORDED: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("recorded_losses.json").read_text())
NOISE = statistics.stdev(RECORDED["baseline"].values())  # of one run
CASES = 200


def verdict(improvements: Sequence[float], max_seeds: int = MAX_SEEDS, min_effect: float = 0.0) -> str:
    """The verdict of a gate that sees these pairs one after the other."""
    looks = (look(improvements[:count], max_seeds, min_effect) for count in range(1, max_seeds + 1))
    return next((found.decision for found in looks if found.decision is not None), "unsure")


def paired(variant: str) -> list[float]:
    """The improvements of a recorded variant over the baseline, seed by seed, without their mean."""
    differences = [RECORDED["baseline"][seed] - loss for seed, loss in RECORDED[variant].items()]
    return [difference - statistics.fmean(differences) for difference in differences]


def verdicts(pool: Sequence[float], effect: float, cases: int = CASES) -> Counter[str]:
    """The verdicts of gates that draw their seeds from the recorded ones, with an effect planted in the candidate."""
    draw = random.Random(0)
    return Counter(verdict([value + effect for value in draw.sample(pool, MAX_SEEDS)]) for _ in range(cases))


@pytest.mark.parametrize("variant", ["learning_rate", "beta2", "weight_decay", "layer"])
def test_without_an_effect_at_most_5_percent_of_gates_give_a_verdict(variant: str) -> None:
    found = verdicts(paired(variant), 0.0)
    assert CASES - found["unsure"] <= LEVEL * CASES


def test_with_independent_seeds_at_most_5_percent_of_gates_give_a_verdict() -> None:
    """Without paired seeds, the losses of candidate and baseline vary independently."""
    draw, losses = random.Random(1), list(RECORDED["baseline"].values())
    drawn = [draw.sample(losses, 2 * MAX_SEEDS) for _ in range(CASES)]
    found = Counter(verdict([a - b for a, b in zip(some[::2], some[1::2], strict=True)]) for some in drawn)
    assert CASES - found["unsure"] <= LEVEL * CASES


@pytest.mark.parametrize("variant", ["learning_rate", "beta2", "weight_decay"])
@pytest.mark.parametrize(("sign", "expected"), [(1, "keep"), (-1, "discard")])
def test_an_effect_of_one_standard_deviation_is_found_with_paired_seeds(variant: str, sign: int, expected: str) -> None:
    assert verdicts(paired(variant), sign * NOISE)[expected] >= 0.8 * CASES


def test_an_effect_of_two_and_a_half_deviations_is_found_without_pairing() -> None:
    """One deviation is too little: a test at 5% that knew it would find it with 8 seeds in half of the cases."""
    assert stats.norm.cdf(math.sqrt(MAX_SEEDS / 2) - stats.norm.ppf(1 - LEVEL / 2)) < 0.52
    assert verdicts(paired("layer"), 2.5 * NOISE)["keep"] >= 0.8 * CASES


@pytest.mark.parametrize("max_seeds", [3, 4, 8, 20])
def test_the_levels_of_the_looks_sum_to_the_error_of_the_test(max_seeds: int) -> None:
    assert sum(look_levels(max_seeds).values()) == pytest.approx(LEVEL)


def test_the_interval_is_that_of_a_t_test_at_the_level_of_the_look() -> None:
    improvements = [0.3, 0.1, 0.25, 0.2]
    found = look(improvements, MAX_SEEDS)
    level = 1 - look_levels(MAX_SEEDS)[4]
    expected = stats.ttest_1samp(improvements, 0).confidence_interval(level)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.effect == pytest.approx(0.2125)


def test_nothing_is_decided_before_three_pairs() -> None:
    assert look([5.0, 5.0], MAX_SEEDS).decision is None
    assert look([], MAX_SEEDS).effect is None


def test_pairs_that_do_not_vary_decide_at_the_first_look() -> None:
    assert verdict([0.5] * 8) == "keep"
    assert verdict([-0.5] * 8) == "discard"
    assert verdict([0.0] * 8) == "unsure"


def test_an_improvement_below_the_minimum_effect_is_discarded() -> None:
    improvements = [0.05 + 0.001 * (-1) ** i for i in range(8)]
    assert verdict(improvements) == "keep"
    assert verdict(improvements, min_effect=0.1) == "discard"
    assert verdict(improvements, min_effect=0.05) == "unsure"


def test_the_predicted_number_of_seeds_is_confirmed_by_simulation() -> None:
    pairs = seeds_for(1.0, 1.0)
    assert pairs == 11
    draw = random.Random(0)
    found = Counter(verdict([draw.gauss(1, 1) for _ in range(pairs)], pairs) for _ in range(400))
    assert 0.77 <= found["keep"] / 400 <= 0.9
    assert seeds_for(0.001, 1.0) is None
    assert seeds_for(1.0, 0.0) == 3


def test_the_interval_of_a_deviation_is_the_textbook_one() -> None:
    low, high = deviation_interval(2.0, 10)  # sqrt(9 * 4 / 19.023), sqrt(9 * 4 / 2.700)
    assert (round(low, 3), round(high, 3)) == (1.376, 3.651)


def test_pairing_saves_seeds() -> None:
    found = needed(1.0, 1.0)
    assert found.paired is not None
    assert found.unpaired is not None
    assert found.paired < found.unpaired


def test_equal_improvements_count_by_their_sign() -> None:
    """Accuracies are often equal, so three equal improvements prove nothing."""
    assert look([0.25] * 3, 8).decision is None
    assert look([0.25] * 5, 8).interval is None
    assert verdict([0.25] * 8) == "keep"
    assert verdict([0.25] * 4, max_seeds=4) == "unsure"  # all have one sign by chance in an eighth of cases
    assert verdict([0.0] * 8, min_effect=0.1) == "discard"
