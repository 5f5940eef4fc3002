"""A test of paired differences that may be looked at after each seed: group-sequential t-tests.

The error probability LEVEL is divided among the looks beforehand: the looks before the last share a fifth of it
equally, and the last look has the rest, as in the rule of Haybittle (1971) and Peto et al. (1976). Each look is a
t-test at its own level. By the union bound the error of all looks together is at most LEVEL, however often one looks
and whenever one stops. The differences are assumed to be independent and about normal; their deviation is unknown.

J. L. Haybittle, "Repeated assessment of results in clinical trials of cancer treatment", Br. J. Radiol. 44 (1971).
R. Peto et al., "Design and analysis of randomized clinical trials requiring prolonged observation of each patient",
Br. J. Cancer 34 (1976).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05  # probability that a gate says keep or discard although there is no effect, all looks together
EARLY_SHARE = 0.2  # of LEVEL, for the looks before the last
FIRST_LOOK = 3  # pairs: with two, t would have to be in the hundreds
MAX_SEEDS = 8  # of a test, by default
WANTED_POWER = 0.8
MOST_SEEDS = 1000  # the most that `seeds_for` tries

Decision = Literal["keep", "discard"]


@dataclass(frozen=True)
class Evidence:
    """The evidence from the pairs so far.

    effect: the mean improvement; None without a pair.
    interval: confidence interval of the mean at the level of this look. The intervals of all looks hold together with
        probability 1 - LEVEL. None before the first look, and as long as all improvements are the same number, not 0,
        and too few for a sign test.
    decision: None if the test cannot decide yet.
    """

    effect: float | None
    interval: tuple[float, float] | None
    decision: Decision | None


def look_levels(max_seeds: int) -> dict[int, float]:
    """The level of the t-test after each number of pairs; the levels sum to LEVEL.

    >>> {pairs: round(level, 4) for pairs, level in look_levels(8).items()}
    {3: 0.002, 4: 0.002, 5: 0.002, 6: 0.002, 7: 0.002, 8: 0.04}
    """
    early = range(FIRST_LOOK, max_seeds)
    spent = EARLY_SHARE * LEVEL if early else 0.0
    return {**{pairs: spent / len(early) for pairs in early}, max_seeds: LEVEL - spent}


def look(improvements: Sequence[float], max_seeds: int, min_effect: float = 0.0) -> Evidence:
    """Decide, after some pairs, whether the mean improvement is above or below `min_effect`.

    Args:
        improvements: of the candidate over the baseline, one for each seed; positive is better.
        max_seeds: the planned number of pairs, fixed before the first look.
    """
    if not improvements:
        return Evidence(None, None, None)
    effect, count = statistics.fmean(improvements), len(improvements)
    level = look_levels(max_seeds).get(count)
    if level is None or not math.isfinite(effect):
        return Evidence(effect, None, None)
    deviation = statistics.stdev(improvements)
    if deviation == 0 and effect and 2.0 ** (1 - count) > level:  # equal, as shares may be: judge the sign alone
        return Evidence(effect, None, None)
    half = _critical(level, count) * deviation / math.sqrt(count)
    low, high = effect - half, effect + half
    decision: Decision | None = "keep" if low > min_effect else "discard" if high < min_effect else None
    return Evidence(effect, (low, high), decision)


@functools.cache
def _critical(level: float, pairs: int) -> float:
    """The two-sided critical value of Student's t for the mean of `pairs` differences."""
    from scipy.stats import t

    return float(t.ppf(1 - level / 2, pairs - 1))


def seeds_for(effect: float, deviation: float) -> int | None:
    """The smallest planned number of pairs that finds an effect with probability WANTED_POWER; None above MOST_SEEDS.

    Only the last look is counted, so the test finds the effect a little more often.

    Args:
        effect: how far the improvement exceeds `min_effect`.
        deviation: the standard deviation of the paired differences.
    """
    if deviation == 0:
        return FIRST_LOOK
    from scipy.stats import nct

    for pairs in range(FIRST_LOOK, MOST_SEEDS + 1):
        shift = abs(effect) / deviation * math.sqrt(pairs)
        if shift < WANTED_POWER:  # far too few pairs: skip the slow noncentral distribution
            continue
        critical = _critical(look_levels(pairs)[pairs], pairs)
        if 1 - float(nct.cdf(critical, pairs - 1, shift)) >= WANTED_POWER:
            return pairs
    return None
