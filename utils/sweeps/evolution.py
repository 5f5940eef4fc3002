"""CMA-ES [Hansen 2016, The CMA Evolution Strategy: A Tutorial], recomputed for each trial from the trials before it.

Optuna's own sampler would keep its state as a pickle in the journal. Recomputing the evolution takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.sweeps.space import Dimension, Space, Value

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CMA_SIGMA = 1 / 6  # of the first generation, as a share of the width of the space; as in Optuna


def population_size(dimensions: int) -> int:
    """The number of trials in a generation [Hansen 2016, The CMA Evolution Strategy: A Tutorial, table 1]."""
    return 4 + math.floor(3 * math.log(max(1, dimensions)))


def numeric(space: Space) -> list[Dimension]:
    """The dimensions that CMA-ES searches: numbers without a condition. The others are drawn at random."""
    return [one for one in space.dimensions if one.kind != "choice" and not one.when]


def evolve(space: Space, seed: int, history: Sequence[FrozenTrial], maximize: bool) -> dict[str, Value]:
    """The numeric values that CMA-ES proposes for the next trial.

    With P trials in a generation, the generations are the trials 0 to P-1, P to 2P-1, and so on. A trial of an earlier
    generation that has no value counts as the worst of its generation.
    """
    from cmaes import CMA

    dimensions = numeric(space)
    if not dimensions:
        return {}
    size = population_size(len(dimensions))
    generation, place = divmod(len(history), size)
    bounds = np.tile([0.0, 1.0], (len(dimensions), 1))  # (D, 2)
    optimizer = CMA(np.full(len(dimensions), 0.5), CMA_SIGMA, bounds=bounds, seed=seed % 2**32, population_size=size)
    for number in range(generation + 1):
        asked = [optimizer.ask() for _ in range(size)]  # (P, D)
        if number == generation:
            break
        trials = history[number * size : (number + 1) * size]
        known = [value for trial in trials if (value := _value(trial, maximize)) is not None]
        if known:
            values = [max(known) if (v := _value(trial, maximize)) is None else v for trial in trials]
            places = [np.array([_to_unit(one, trial.params[one.key]) for one in dimensions]) for trial in trials]
            optimizer.tell(list(zip(places, values, strict=True)))
    return {one.key: _from_unit(one, float(x)) for one, x in zip(dimensions, asked[place], strict=True)}


def _value(trial: FrozenTrial, maximize: bool) -> float | None:
    """The value of a trial or its last value so far, negated if larger is better; None if it has none yet."""
    found = trial.values[0] if trial.values else None
    if found is None and trial.intermediate_values:
        found = trial.intermediate_values[max(trial.intermediate_values)]
    return None if found is None else -found if maximize else found


def _to_unit(dimension: Dimension, value: Any) -> float:
    """The position of a value in the range of its dimension, from 0 to 1."""
    low, high = (float(bound) for bound in dimension.values[:2] if isinstance(bound, int | float))
    if dimension.kind == "log":
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def _from_unit(dimension: Dimension, place: float) -> Value:
    """The value at a position from 0 to 1, rounded to one that the dimension allows."""
    low, high, *step = (float(bound) for bound in dimension.values if isinstance(bound, int | float))
    if dimension.kind == "log":
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    else:
        value = low + place * (high - low)
        width = step[0] if step else 1.0 if dimension.whole else 0.0
        if width:
            value = low + min(round((value - low) / width), math.floor((high - low) / width + 1e-9)) * width
    value = min(max(value, low), high)
    return round(value) if dimension.whole else value
