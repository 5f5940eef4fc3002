"""Pruners, which decide which trials train on: asynchronous successive halving (ASHA), the median rule, a population.

ASHA [Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, algorithm 2]: every trial is trained to the
first rung and pauses there. Of the trials at a rung, the best 1/eta train on to the next rung, from their checkpoints.
The median rule [Golovin et al. 2017, Google Vizier, section 3.2] stops a trial at an evaluation where its best value is
worse than the median of the others at that step. Population-based training has its own module (population.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from utils.errors import UserError

PrunerName = Literal["asha", "median", "pbt", "none"]
PRUNERS: tuple[PrunerName, ...] = ("asha", "median", "pbt", "none")
ETA = 3
RUNGS_BELOW = 3  # rungs before the last one, by default
STARTUP_TRIALS = 5  # complete trials before the median rule ends one
GENERATIONS, MOST_GENERATIONS = 10, 1000  # with pbt: by default, and at most


@dataclass(frozen=True)
class Pruner:
    """The pruner of a sweep.

    rungs: with asha and pbt, the steps at which trials are compared, the last being the end of training; with median,
        the step before which no trial is stopped.
    eta: with asha, one trial in `eta` is promoted from a rung.
    population: with pbt, the number of members.
    """

    name: PrunerName = "none"
    rungs: tuple[int, ...] = ()
    eta: int = ETA
    population: int | None = None

    @property
    def pauses(self) -> bool:
        """Whether trials pause at rungs."""
        return self.name in ("asha", "pbt")

    def as_json(self) -> dict[str, Any]:
        if self.name == "asha":
            return {"name": self.name, "rungs": list(self.rungs), "eta": self.eta}
        if self.name == "pbt":
            return {"name": self.name, "rungs": list(self.rungs), "population": self.population}
        if self.name == "median":
            return {"name": self.name, "min_steps": self.rungs[0], "startup_trials": STARTUP_TRIALS}
        return {"name": self.name}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pruner:
        """The pruner that `as_json` describes."""
        return cls(
            data["name"],
            tuple(data.get("rungs") or filter(None, [data.get("min_steps")])),
            data.get("eta", ETA),
            data.get("population"),
        )


class Promotion(NamedTuple):
    """The trial `number` may train to the rung with this index."""

    number: int
    rung: int


def make_pruner(
    name: PrunerName, max_iters: int | None, min_steps: int | None, eta: int | None, trials: int = 0
) -> Pruner:
    """Make the pruner that the flags describe.

    Args:
        max_iters: steps of a whole trial; None: not the same for all trials.
        min_steps: steps before the first comparison; None: chosen for four rungs (asha) or ten generations (pbt), or a
            quarter of the trial (median).
        trials: number of trials of the sweep; with pbt, the population.

    Raises:
        UserError: the flags do not fit each other.
    """
    if name != "asha" and eta is not None:
        raise UserError("--eta is for --pruner asha")
    if name == "none":
        if min_steps is not None:
            raise UserError("--min-steps is for --pruner asha, median or pbt")
        return Pruner()
    if max_iters is None:
        raise UserError(
            f"--pruner {name} compares trials at the same step: max_iters must be one number for all trials"
        )
    eta = ETA if eta is None else eta
    if eta < 2:
        raise UserError(f"--eta must be at least 2, not {eta}")
    if min_steps is None:
        parts = {"asha": eta**RUNGS_BELOW, "median": 4, "pbt": GENERATIONS}
        min_steps = max(1, max_iters // parts[name])
    if not 1 <= min_steps < max_iters:
        raise UserError(f"--min-steps must be at least 1 and below max_iters ({max_iters:,}), not {min_steps:,}")
    if name == "median":
        return Pruner(name, (min_steps,))
    if name == "pbt":
        if trials < 2:
            raise UserError(f"--pruner pbt trains a population: --trials must be at least 2, not {trials}")
        if max_iters > MOST_GENERATIONS * min_steps:
            raise UserError(f"--min-steps {min_steps:,} makes more than {MOST_GENERATIONS:,} generations")
        return Pruner(name, (*range(min_steps, max_iters, min_steps), max_iters), population=trials)
    return Pruner(name, rung_steps(min_steps, max_iters, eta), eta)


def rung_steps(min_steps: int, max_iters: int, eta: int) -> tuple[int, ...]:
    """The steps of the rungs, each `eta` times the one before; the last rung is `max_iters`.

    >>> rung_steps(20, 540, 3)
    (20, 60, 180, 540)
    """
    steps = []
    while min_steps < max_iters:
        steps.append(min_steps)
        min_steps *= eta
    return (*steps, max_iters)


def promotion(
    at_rungs: Sequence[Mapping[int, float]],
    promoted: Sequence[Collection[int]],
    eta: int,
    maximize: bool = False,
    *,
    last_call: bool = False,
) -> Promotion | None:
    """The next trial to promote, looked for from the highest rung down; None if no trial can be promoted yet.

    Args:
        at_rungs: for each rung, the values of the trials that have reached it, by number.
        promoted: for each rung, the trials that cannot be promoted from it: they were already, or they have ended.
        last_call: there is no other work. Unless a trial has reached the end, the best trial of the highest rung that
            can be promoted is.
    """
    for rung in reversed(range(len(at_rungs) - 1)):
        values = at_rungs[rung]
        best = sorted(values, key=lambda number: (-values[number] if maximize else values[number], number))
        if not last_call or at_rungs[-1]:
            best = best[: len(values) // eta]
        for number in best:
            if number not in promoted[rung]:
                return Promotion(number, rung + 1)
    return None
