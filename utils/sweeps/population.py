"""Population-based training: while all members train, the worst are replaced by forks of the best.

Jaderberg et al. 2017, Population Based Training of Neural Networks: truncation selection of a quarter, and perturbation
by a factor of 0.8 or 1.25. A member that continues from another's checkpoint is a fork of that run. Its settings are
new, so it is also a new trial of the sweep. Every choice depends only on the seed of the sampler, the generation and
the member.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from utils.errors import UserError
from utils.sweeps.pruning import Pruner
from utils.sweeps.sampling import DIGITS
from utils.sweeps.space import Dimension, Space, Value

FACTORS = (0.8, 1.25)
SHARE = 4  # one member in 4 counts as best, and one in 4 as worst
# Settings that may change during a run: not the model, the data, the lengths of the schedules, or what is measured.
CHANGEABLE = (
    *("learning_rate", "embedding_lr", "head_lr", "vector_lr", "min_lr", "weight_decay", "momentum"),
    *("beta1", "beta2", "adam_eps", "grad_clip", "dropout", "lora_dropout"),
    *("batch_size", "gradient_accumulation_steps"),
)


class Fork(NamedTuple):
    """From the next generation on, `member` trains with `values` from the checkpoint of `parent`.

    replaced, parent: numbers of trials.
    """

    member: int
    replaced: int
    parent: int
    values: dict[str, Value]


def check_population(space: Space, sampler: str, pruner: Pruner, trials: int) -> None:
    """Raises UserError if the pruner is population-based training and the rest of the sweep does not fit it.

    Args:
        trials: the wanted number of trials.
    """
    if pruner.population is None:
        return
    named = f"--pruner {pruner.name}"
    fixed = [one.key for one in space.dimensions if one.key not in CHANGEABLE]
    conditional = [one.key for one in space.dimensions if one.when]
    if fixed:
        raise UserError(
            f"{named} changes settings during a run, and {fixed[0]} cannot change: expected {', '.join(CHANGEABLE)}"
        )
    if conditional:
        raise UserError(f"{named} needs the same settings in all members, but {conditional[0]} has a condition (when)")
    if space.seeds_from(0)[1:]:
        raise UserError(f"{named} trains one run for each member: seeds must be 1, not {space.seeds}")
    if sampler not in ("random", "grid"):
        raise UserError(f"{named} needs a sampler that does not learn from other trials: --sampler random or grid")
    if trials != pruner.population:
        raise UserError(f"--trials: the population has {pruner.population} members, which cannot change to {trials}")


def forks(
    space: Space,
    seed: int,
    generation: int,
    members: Mapping[int, int],
    reached: Mapping[int, float],
    values: Mapping[int, Mapping[str, Value]],
    maximize: bool = False,
) -> list[Fork]:
    """The forks that replace members after `generation`, in the order of the members.

    Args:
        seed: the seed of the sampler.
        members: the member that each trial of the generation is, by the number of the trial.
        reached: the metric of each trial at the end of the generation; trials that diverged or failed are missing.
        values: the settings of each trial.
    """
    ranked = sorted(reached, key=lambda number: (-reached[number] if maximize else reached[number], number))
    quarter = max(1, len(members) // SHARE)
    best, others = ranked[:quarter], ranked[quarter:]
    lost = [number for number in members if number not in reached]
    worst = others[max(0, len(others) - max(0, quarter - len(lost))) :]
    found = []
    for number in sorted([*lost, *worst], key=lambda number: members[number]):
        draw = random.Random(f"{seed}:{generation}:{members[number]}")
        parent = draw.choice(best)
        changed = {one.key: perturbed(one, values[parent][one.key], draw) for one in space.dimensions}
        found.append(Fork(members[number], number, parent, changed))
    return found


def perturbed(dimension: Dimension, value: Value, draw: random.Random) -> Value:
    """A value near `value`, within the range of the dimension.

    If the dimension has countable values, it is a neighbour of `value`; otherwise 0.8 or 1.25 times `value`. Whole
    numbers change by at least 1, unless the range ends there.
    """
    if (values := dimension.countable_values()) is not None:
        place = values.index(value)
        return draw.choice([*values[max(0, place - 1) : place], *values[place + 1 : place + 2]] or values)
    low, high = (bound for bound in dimension.values[:2] if isinstance(bound, int | float))
    assert isinstance(value, int | float)
    factor = draw.choice(FACTORS)
    scaled = value * factor
    if dimension.whole:
        scaled = min(round(scaled), value - 1) if factor < 1 else max(round(scaled), value + 1)
    else:
        scaled = float(f"{scaled:.{DIGITS}g}")
    return min(max(scaled, low), high)
