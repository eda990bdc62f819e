"""The paired test over seeds: do two sides differ?

Both sides of a comparison start from the same weights and see the same samples, by seed. Of the
differences d_1 ... d_n with mean m and standard deviation s (n - 1):

    95 % interval      m -+ t_(n-1; 0.975) s / sqrt(n)
    p                  of t = m sqrt(n) / s with n - 1 degrees of freedom, two-sided
    seeds to tell      the least n with which such a test finds a true difference of m, with this
                       s, at p < 0.05 with a probability of 0.8 (noncentral t)

(Student 1908; Cohen 1988, chapter 2.) The differences are taken as drawn from a normal
distribution: a rough thing to say of three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05  # of the test; the interval has 1 - LEVEL
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A mean difference over seeds, and how sure it is.

    Attributes:
        low, high: 95 % interval of the difference.
        p: probability of a mean at least as far from 0 if there were no difference.
        seeds_to_tell: pairs with which the difference would be told with a probability of 0.8;
            None for more than 1000.
    """

    low: float
    high: float
    p: float
    seeds_to_tell: int | None


def paired_test(differences: Sequence[float]) -> PairedTest | None:
    """Return the test of the differences by seed; None for fewer than two, or where one is not
    finite.
    """
    n = len(differences)
    if n < 2 or not all(map(math.isfinite, differences)):
        return None
    from scipy.special import stdtr, stdtrit

    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0.0:
        return PairedTest(mean, mean, 0.0 if mean else 1.0, 2 if mean else None)
    error = spread / math.sqrt(n)
    half = float(stdtrit(n - 1, 1 - LEVEL / 2)) * error
    p = 2.0 * float(stdtr(n - 1, -abs(mean) / error))
    effect = abs(mean) / spread
    told = next((k for k in range(2, MOST_SEEDS + 1) if _power(effect, k) >= POWER), None)
    return PairedTest(mean - half, mean + half, p, told)


def _power(effect: float, n: int) -> float:
    """Return the probability that a test of n pairs finds `effect`."""
    from scipy.special import nctdtr, stdtrit

    bound, shift = float(stdtrit(n - 1, 1 - LEVEL / 2)), effect * math.sqrt(n)
    return 1.0 - float(nctdtr(n - 1, shift, bound)) + float(nctdtr(n - 1, shift, -bound))


def in_words(test: PairedTest, seeds: int) -> str:
    """Return what the test says of a gap, as a note."""
    if test.p == 1.0 and test.low == test.high:
        return f"equal to the baseline with all {seeds} seeds"
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.2g}"
    if test.p < LEVEL:
        return f"differs from the baseline (paired t test over {seeds} seeds, {p})"
    needed = f"more than {MOST_SEEDS}" if test.seeds_to_tell is None else f"{test.seeds_to_tell}"
    return (
        f"not told apart from the baseline with {seeds} seeds (paired t test, {p}); a gap of this "
        f"size would take about {needed} seeds"
    )
