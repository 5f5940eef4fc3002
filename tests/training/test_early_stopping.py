"""Early stopping: what counts as an improvement, when training stops, and that a resume continues the count."""

from __future__ import annotations

import json
import math

import pytest

from utils.training.early_stopping import EarlyStopping


def fed(stopping: EarlyStopping, *losses: float) -> EarlyStopping:
    for loss in losses:
        stopping.update(loss)
    return stopping


@pytest.mark.parametrize(
    ("losses", "best", "without"),
    [
        ((), math.inf, 0),
        ((3.0,), 3.0, 0),
        ((3.0, 2.0, 1.0), 1.0, 0),
        ((3.0, 3.0), 3.0, 1),  # equal is no improvement
        ((3.0, 4.0, 2.5), 2.5, 0),
        ((3.0, 4.0, 5.0, 3.5), 3.0, 3),
        ((math.inf,), math.inf, 1),
        ((3.0, math.nan, math.inf), 3.0, 2),
    ],
)
def test_evaluations_without_a_better_loss_are_counted(losses: tuple[float, ...], best: float, without: int) -> None:
    stopping = fed(EarlyStopping(5, 0.0), *losses)
    assert (stopping.best, stopping.without_improvement) == (best, without)


def test_training_stops_after_patience_evaluations_in_a_row() -> None:
    stopping = EarlyStopping(2, 0.0)
    stops = [fed(stopping, loss).stopped for loss in (3.0, 3.1, 2.9, 3.0, 3.0)]
    assert stops == [False, False, False, False, True]
    assert stopping.reason == "early stopping: val/loss did not improve by more than 0 in 2 evaluations"


def test_without_patience_it_never_stops() -> None:
    assert not fed(EarlyStopping(None, 0.0), *[1.0] * 1000).stopped


def test_an_improvement_is_more_than_min_delta() -> None:
    stopping = EarlyStopping(3, 0.25)
    assert fed(stopping, 3.0, 2.75).without_improvement == 1  # by min_delta exactly: not more
    assert stopping.best == 3.0
    assert fed(stopping, 2.9, 2.74).without_improvement == 0  # small steps add up against the same best
    assert stopping.best == 2.74


def test_many_small_steps_add_up_to_an_improvement() -> None:
    stopping = fed(EarlyStopping(10, 0.1), *(3.0 - 0.03 * step for step in range(9)))
    assert stopping.best == pytest.approx(2.76)
    assert not stopping.stopped


@pytest.mark.parametrize("losses", [(), (3.0,), (3.0, 3.0), (0.1 + 0.2, 1.0)])
def test_a_state_restored_from_json_continues_the_count(losses: tuple[float, ...]) -> None:
    stopping = fed(EarlyStopping(3, 0.0), *losses)
    state = json.loads(json.dumps(stopping.state_dict(), allow_nan=False))
    again = EarlyStopping(3, 0.0)
    again.load_state_dict(state)
    assert again == stopping
    assert fed(again, 9.0, 9.0) == fed(stopping, 9.0, 9.0)
    assert again.stopped == stopping.stopped
