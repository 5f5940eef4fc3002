"""The rungs and promotions of asynchronous successive halving."""

from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.sweeps.pruning import Promotion, Pruner, make_pruner, promotion, rung_steps

NOBODY: list[set[int]] = [set(), set()]


def test_the_last_rung_is_the_end_of_the_run() -> None:
    assert rung_steps(20, 540, 3) == (20, 60, 180, 540)
    assert rung_steps(100, 250, 2) == (100, 200, 250)
    pruner = make_pruner("asha", 1000, None, None)
    assert pruner == Pruner("asha", (37, 111, 333, 999, 1000), 3)
    assert Pruner.from_json(pruner.as_json()) == pruner
    assert make_pruner("median", 1000, None, None).rungs == (250,)


def test_one_of_eta_trials_is_promoted_from_the_highest_rung_first() -> None:
    first = {0: 3.0, 1: 1.0}
    assert promotion([first, {}, {}], NOBODY, 3) is None
    first |= {2: 2.0}
    assert promotion([first, {}, {}], NOBODY, 3) == Promotion(1, 1)
    assert promotion([first, {}, {}], NOBODY, 3, maximize=True) == Promotion(0, 1)
    assert promotion([first, {}, {}], [{1}, set()], 3) is None
    first |= {3: 0.5, 4: 4.0, 5: 5.0}
    assert promotion([first, {1: 0.9}, {}], [{1}, set()], 3) == Promotion(3, 1)
    assert promotion([first, {1: 0.9, 3: 0.4, 9: 8.0}, {}], [{1, 3, 9}, set()], 3) == Promotion(3, 2)


def test_at_the_end_at_least_one_trial_is_promoted() -> None:
    assert promotion([{0: 2.0, 1: 1.0}, {}, {}], NOBODY, 3, last_call=True) == Promotion(1, 1)
    assert promotion([{0: 2.0, 1: 1.0}, {1: 0.9}, {}], [{1}, set()], 3, last_call=True) == Promotion(1, 2)
    assert promotion([{0: 2.0, 1: 1.0}, {1: 0.9}, {1: 0.5}], [{1}, {1}], 3, last_call=True) is None


def test_at_the_end_a_trial_that_cannot_continue_does_not_block_another() -> None:
    failed_before, failed_after, ended = [{2}, {2}], [{0}, {0}], [{0, 1}, {0, 1}]
    for gone, expected in ((failed_before, Promotion(0, 1)), (failed_after, Promotion(1, 1)), (ended, None)):
        assert promotion([{0: 1.0, 1: 2.0}, {}, {}], gone, 3, last_call=True) == expected
        assert promotion([{0: 1.0, 1: 2.0}, {}, {}], gone, 3) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("asha", None, None, None), "--pruner asha compares trials at the same step: max_iters"),
        (("asha", 100, None, 1), "--eta must be at least 2, not 1"),
        (("asha", 100, 100, None), r"--min-steps must be at least 1 and below max_iters \(100\), not 100"),
        (("median", 100, 0, None), "--min-steps must be at least 1"),
        (("median", 100, None, 3), "--eta is for --pruner asha"),
        (("none", 100, 5, None), "--min-steps is for --pruner asha, median or pbt"),
        (("none", 100, None, 3), "--eta is for --pruner asha$"),
    ],
)
def test_pruner_flags_that_do_not_fit_are_rejected(flags: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_pruner(*flags)
