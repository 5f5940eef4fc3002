"""Samplers, which choose the values of a trial: a pure function of the trials before it, the seed, and its number.

For each trial, a new study in memory asks one of Optuna's samplers for all values. So the journal of a sweep gets a
trial with all its parameters at once, and no state of a sampler has to be kept. With `random` and `grid`, the values
depend only on the seed and the number.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from utils.errors import UserError
from utils.sweeps.space import Dimension, Space, Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SamplerName = Literal["tpe", "random", "grid", "cmaes"]
SAMPLERS: tuple[SamplerName, ...] = ("tpe", "random", "grid", "cmaes")
# Arguments of Optuna's TPESampler. constant_liar: a running trial counts as a bad one, so that parallel ones differ.
TPE = {"n_startup_trials": 10, "n_ei_candidates": 24, "multivariate": True, "group": True, "constant_liar": True}
MOST_POINTS = 100_000  # of a grid
DIGITS = 5  # significant digits of a number drawn from a range


def quiet_optuna() -> Any:
    """Import Optuna, which takes half a second, and silence its messages on stderr."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def sampler_arguments(name: SamplerName, space: Space) -> dict[str, Any]:
    """The arguments of a sampler other than the seed, for the record of a sweep."""
    if name == "tpe":
        return dict(TPE)
    if name == "cmaes":
        from utils.sweeps.evolution import CMA_SIGMA, numeric, population_size

        return {"sigma": CMA_SIGMA, "population": population_size(len(numeric(space)))}
    return {}


def seed_of_trial(seed: int, number: int) -> int:
    """A seed of 32 bits for the trial `number`, unrelated to those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def distribution_of(dimension: Dimension) -> BaseDistribution:
    """The Optuna distribution that the values of a dimension are drawn from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.values)
    low, high, *step = dimension.values
    log = dimension.kind == "log"
    if dimension.whole:
        assert isinstance(low, int)
        assert isinstance(high, int)
        width = int(step[0] or 1) if step else 1
        return IntDistribution(low, low + (high - low) // width * width, log=log, step=width)
    counted = dimension.countable_values()
    last = counted[-1] if counted else high
    assert isinstance(low, float)
    assert isinstance(last, float)
    return FloatDistribution(low, last, log=log, step=float(step[0] or 0) if step else None)


def propose(
    space: Space,
    fixed: Mapping[str, Value],
    sampler: SamplerName,
    seed: int,
    history: Sequence[FrozenTrial],
    maximize: bool = False,
) -> dict[str, Value]:
    """The values of the trial that follows `history`, by setting; settings whose condition does not hold are left out.

    Args:
        fixed: the values of the settings that are not searched, which conditions may name.
        history: all trials before this one, in order. A pruned or paused trial counts with its last value.

    Raises:
        UserError: the grid has no point left.
    """
    number = len(history)
    if sampler == "grid":
        points = grid(space, fixed)
        if number >= len(points):
            raise UserError(f"the grid has {len(points):,} points, so there is no trial {number:,}")
        return points[number]
    optuna = quiet_optuna()
    own_seed = seed_of_trial(seed, number)
    evolved: dict[str, Value] = {}
    if sampler == "cmaes":
        from utils.sweeps.evolution import evolve

        evolved = evolve(space, seed, history, maximize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        of_optuna: Any = (
            optuna.samplers.TPESampler(seed=own_seed, **TPE)
            if sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=own_seed)
        )
    study = optuna.create_study(sampler=of_optuna, direction="maximize" if maximize else "minimize")
    if sampler == "tpe":
        study.add_trials(history)
    trial = study.ask()
    values: dict[str, Value] = {}
    for dimension in space.dimensions:
        if dimension.applies({**fixed, **values}):
            value = _suggest(trial, dimension)  # always drawn, so that the values after it do not depend on `evolved`
            values[dimension.key] = _rounded(dimension, evolved.get(dimension.key, value))
    return values


def _rounded(dimension: Dimension, value: Value) -> Value:
    """A number drawn from a range, rounded to the digits that a person would write in a table or on a command line."""
    if dimension.kind == "choice" or dimension.whole or not isinstance(value, float):
        return value
    low, high = (bound for bound in dimension.values[:2] if isinstance(bound, float))
    digits = DIGITS if dimension.countable_values() is None else 12
    return min(max(float(f"{value:.{digits}g}"), low), high)


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Value:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, found = dimension.key, distribution_of(dimension)
    if isinstance(found, CategoricalDistribution):
        value: Value = trial.suggest_categorical(key, found.choices)
        return value
    if isinstance(found, IntDistribution):
        return int(trial.suggest_int(key, found.low, found.high, step=found.step, log=found.log))
    assert isinstance(found, FloatDistribution)
    return float(trial.suggest_float(key, found.low, found.high, step=found.step, log=found.log))


# ---------------------------------------------------------------------------------------------------------- grid


def grid(space: Space, fixed: Mapping[str, Value]) -> list[dict[str, Value]]:
    """All points of a space, with the last setting changing fastest. Points that conditions make equal count once.

    Raises:
        UserError: a setting has no countable values, or there are too many points.
    """
    for dimension in space.dimensions:
        if dimension.countable_values() is None:
            raise UserError(
                f"{dimension.key}: a grid needs countable values: expected choice, or range with a step, "
                f"not {dimension.kind} {list(dimension.values)}"
            )
    size = math.prod(len(dimension.countable_values() or ()) for dimension in space.dimensions)
    if size > MOST_POINTS:
        raise UserError(f"the grid has {size:,} points, more than {MOST_POINTS:,}")
    points = {repr(point): point for point in _points(space.dimensions, fixed)}
    return list(points.values())


def _points(dimensions: Sequence[Dimension], fixed: Mapping[str, Value]) -> Iterator[dict[str, Value]]:
    keys = [dimension.key for dimension in dimensions]
    for combination in itertools.product(*(dimension.countable_values() or () for dimension in dimensions)):
        point: dict[str, Value] = {}
        for key, value, dimension in zip(keys, combination, dimensions, strict=True):
            if dimension.applies({**fixed, **point}):
                point[key] = value
        yield point
