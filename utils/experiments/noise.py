"""The noise floor: how much a metric varies with the seed alone, and how many seeds an effect needs."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.experiments.compare import comparable_metric
from utils.experiments.sequential import seeds_for
from utils.experiments.subjects import Subjects
from utils.experiments.trials import Trials, last_value, seed_order
from utils.machine.signals import raise_on_signals
from utils.terminal.words import duration

NOISE_SEEDS = 5  # the default
EFFECTS = (0.5, 1.0, 2.0, 4.0)  # in standard deviations; the seeds that they need are listed by default


@dataclass(frozen=True)
class NeededSeeds:
    """The number of pairs with which the gate finds an effect in 80% of cases; None: more than a thousand.

    paired: if the seed explains most of the noise of both (a correlation of PAIRED), as with small changes.
    unpaired: if the two vary independently, as with a change of shapes.
    """

    effect: float
    paired: int | None
    unpaired: int | None


PAIRED = 0.8


@dataclass(frozen=True)
class Noise:
    """The noise floor of one configuration.

    values: the metric by seed.
    deviation: standard deviation; interval: its 95% confidence interval, by the chi-squared distribution.
    trained: number of runs that were trained; seconds: how long it took.
    """

    name: str
    metric: str
    values: dict[int, float]
    mean: float
    deviation: float
    interval: tuple[float, float]
    needed: list[NeededSeeds]
    seconds: float
    trained: int


def noise(
    subject: str,
    root: Path,
    runs_dir: Path,
    *,
    seeds: int = NOISE_SEEDS,
    metric: str | None = None,
    effects: Sequence[float] = (),
    trusted: bool = False,
    output: IO[str],
) -> Noise:
    """Measure the noise floor of a configuration, training the seeds that are missing.

    Args:
        seeds: the least number of seeds; all complete runs count.
        effects: in units of the metric; by default multiples of the deviation.

    Raises:
        UserError: the subject names nothing known, or a run has no result.
    """
    with raise_on_signals(), tempfile.TemporaryDirectory(prefix="noise-") as folder:
        experiment = Subjects(root, runs_dir, Path(folder), trusted).one(subject)
        runs_dir.mkdir(parents=True, exist_ok=True)
        trials = Trials(root, runs_dir, Path(folder), output)
        [runs] = trials.existing(experiment)
        order = seed_order(list(runs), ())
        chosen = [next(order) for _ in range(max(seeds, len(runs)))]
        missing = [seed for seed in chosen if seed not in runs]
        known = [run.row()["duration"] for run in runs.values()]
        for number, seed in enumerate(missing, 1):
            seconds = (trials.trained or known or [None])[-1]
            about = "" if seconds is None else f", about {duration(seconds)}" + (" each" if missing[number:] else "")
            runs[seed] = trials.train(experiment, seed, f" ({number} of {len(missing)}{about})")
    name, _ = comparable_metric(list(runs.values()), metric)
    values = {seed: last_value(runs[seed], name) for seed in chosen}
    return summary(experiment.name, name, values, effects, trials)


def summary(name: str, metric: str, values: dict[int, float], effects: Sequence[float], trials: Trials) -> Noise:
    """The noise floor from the values of a metric by seed."""
    deviation = statistics.stdev(values.values())
    wanted = effects or [two_digits(times * deviation) for times in EFFECTS if deviation]
    return Noise(
        name,
        metric,
        values,
        statistics.fmean(values.values()),
        deviation,
        deviation_interval(deviation, len(values)),
        [needed(effect, deviation) for effect in wanted],
        round(trials.seconds, 1),
        len(trials.trained),
    )


def needed(effect: float, deviation: float) -> NeededSeeds:
    """The seeds that an effect needs if the standard deviation from seed to seed is `deviation`."""
    of_pairs = [math.sqrt(2 * (1 - correlation)) * deviation for correlation in (PAIRED, 0.0)]
    return NeededSeeds(effect, *(seeds_for(effect, of_pair) for of_pair in of_pairs))


def deviation_interval(deviation: float, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a standard deviation of `count` normal values."""
    from scipy.stats import chi2

    low, high = (float(chi2.ppf(level, count - 1)) for level in (0.975, 0.025))
    return deviation * math.sqrt((count - 1) / low), deviation * math.sqrt((count - 1) / high)


def two_digits(value: float) -> float:
    """`value` rounded to two significant digits, for a table."""
    return float(f"{value:.1e}")
