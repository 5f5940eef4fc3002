"""The values of a trial are a pure function of the trials before it, the seed and its number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from utils.errors import UserError
from utils.sweeps.sampling import SAMPLERS, SamplerName, distribution_of, grid, propose
from utils.sweeps.space import Dimension, Space

RATE = Dimension("learning_rate", "log", (1e-5, 1e-1))
WIDTH = Dimension("n_embd", "range", (16, 256, 16), whole=True)
NAME = Dimension("optimizer_name", "choice", ("adamw", "muon"))
MOMENTUM = Dimension("momentum", "range", (0.8, 0.98), {"optimizer_name": ("muon",)})
SPACE = Space((RATE, WIDTH, NAME, MOMENTUM))


def trial(space: Space, values: dict[str, Any], **facts: Any) -> FrozenTrial:
    known = {dimension.key: dimension for dimension in space.dimensions}
    return create_trial(params=values, distributions={key: distribution_of(known[key]) for key in values}, **facts)


def search(space: Space, sampler: SamplerName, seed: int, trials: int, loss: Callable[..., float]) -> list[float]:
    history: list[FrozenTrial] = []
    for _ in range(trials):
        values = propose(space, {}, sampler, seed, history)
        history.append(trial(space, values, value=loss(**values)))
    return [one.values[0] for one in history]


def hill(learning_rate: float, n_embd: int, **_: Any) -> float:
    return (math.log10(learning_rate) + 3) ** 2 + ((n_embd - 128) / 128) ** 2


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_proposed_values_are_in_the_space_and_reproducible(sampler: SamplerName) -> None:
    history: list[FrozenTrial] = []
    for number in range(12):
        values = propose(SPACE, {}, sampler, 3, history)
        assert values == propose(SPACE, {}, sampler, 3, history)
        assert 1e-5 <= values["learning_rate"] <= 1e-1
        assert values["n_embd"] in range(16, 257, 16)
        assert ("momentum" in values) == (values["optimizer_name"] == "muon")
        history.append(trial(SPACE, values, value=float(number)))
    assert len({one.params["learning_rate"] for one in history}) == 12


def test_random_values_depend_only_on_the_seed_and_the_number_of_the_trial() -> None:
    history = [trial(SPACE, propose(SPACE, {}, "random", 0, []), value=1.0)]
    other = [trial(SPACE, propose(SPACE, {}, "random", 9, []), state=TrialState.FAIL)]
    assert propose(SPACE, {}, "random", 0, history) == propose(SPACE, {}, "random", 0, other)
    assert propose(SPACE, {}, "random", 0, history) != propose(SPACE, {}, "random", 1, history)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_tpe_and_cmaes_beat_random_search(sampler: SamplerName) -> None:
    """The mean of the last ten of 40 trials, over three seeds, on a hill whose top is known."""
    space = Space((RATE, WIDTH))

    def mean(name: SamplerName) -> float:
        return statistics.fmean(statistics.fmean(search(space, name, seed, 40, hill)[-10:]) for seed in range(3))

    assert mean(sampler) < 0.5 * mean("random")


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_failed_paused_and_running_trials_do_not_stop_a_sampler(sampler: SamplerName) -> None:
    values = [propose(SPACE, {}, "random", seed, []) for seed in range(16)]
    history = [
        trial(SPACE, one, **facts)
        for one, facts in zip(
            values,
            [
                {"state": TrialState.FAIL},
                {"state": TrialState.RUNNING},
                {"state": TrialState.PRUNED, "intermediate_values": {5: 2.0}},
                {"value": 1.0},
            ]
            * 4,
            strict=True,
        )
    ]
    assert propose(SPACE, {}, sampler, 0, history)


def test_a_grid_contains_each_point_once() -> None:
    dropout = Dimension("dropout", "range", (0.0, 0.2, 0.1))
    momentum = Dimension("momentum", "choice", (0.8, 0.9), {"optimizer_name": ("muon",)})
    points = grid(Space((NAME, momentum, dropout)), {})
    assert len(points) == 3 + 2 * 3
    assert points[0] == {"optimizer_name": "adamw", "dropout": 0.0}
    assert points[-1] == {"optimizer_name": "muon", "momentum": 0.9, "dropout": 0.2}
    history = [trial(Space((NAME, momentum, dropout)), points[0], value=1.0)]
    assert propose(Space((NAME, momentum, dropout)), {}, "grid", 0, history) == points[1]


def test_a_grid_needs_countable_values_and_not_too_many_points() -> None:
    with pytest.raises(UserError, match="learning_rate: a grid needs countable values"):
        grid(SPACE, {})
    many = Space(tuple(Dimension(f"x{n}", "range", (1, 100), whole=True) for n in range(3)))
    with pytest.raises(UserError, match="the grid has 1,000,000 points"):
        grid(many, {})


def test_a_condition_may_name_a_fixed_setting() -> None:
    assert "momentum" in propose(Space((MOMENTUM,)), {"optimizer_name": "muon"}, "random", 0, [])
    assert propose(Space((MOMENTUM,)), {"optimizer_name": "adamw"}, "random", 0, []) == {}
