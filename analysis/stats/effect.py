"""The exact sign-flip test of a mean of paired differences, and the interval that inverts it.

If the factor has no effect, each difference is equally likely to have the opposite sign; the
p-value is the share of the 2^n sign patterns whose mean is at least as far from zero as the
observed one (Fisher 1935). The test assumes only symmetry, no particular distribution. Inverting it
gives an interval whose ends are means of subsets of the differences (Hartigan 1969, "Using
subsample values as typical values"), so interval and p-value never disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.words import signed

#: Up to this many differences, all sign patterns are enumerated; beyond, RANDOM_SUBSETS of them.
ENUMERATED = 20
RANDOM_SUBSETS = 2**17 - 1


@dataclass(frozen=True)
class Effect:
    """A mean of paired differences, with its confidence interval and p-value.

    Attributes:
        mean: Mean of the differences, in their unit.
        low: Lower end of the confidence interval; -inf if n is too small for its level.
        high: Upper end of the confidence interval; inf if n is too small for its level.
        p: Two-sided p-value of the null hypothesis "no effect".
        n: Number of differences.
        level: Level of the interval, such as 0.95.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    level: float


def estimate_effect(
    differences: Sequence[float] | NDArray[np.float64], level: float = 0.95
) -> Effect:
    """Test and estimate the mean of paired differences.

    Zero lies outside the interval exactly if p <= 1 - level.

    Args:
        differences: One per pair, at least one; finite.
        level: Level of the interval, between 0 and 1.

    Raises:
        ValueError: There are no differences, or one is not finite.
    """
    values = np.asarray(differences, np.float64)
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("expected at least one paired difference, and all of them finite")
    means = np.sort(_subset_means(values))
    patterns = len(means) + 1
    # Flipping the signs of a subset whose mean is <= 0 does not lower the overall mean: these
    # patterns are at least as extreme as the observed one, and so are their mirror images.
    fewer = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p = min(1.0, 2 * (1 + int(fewer)) / patterns)
    rank = int((1 - level) * patterns / 2)
    low, high = (means[rank - 1], means[-rank]) if rank else (-np.inf, np.inf)
    return Effect(float(values.mean()), float(low), float(high), p, len(values), level)


def interval(effect: Effect, digits: int = 2) -> str:
    """Format the confidence interval: +0.20 to +1.00."""
    return f"{signed(effect.low, digits)} to {signed(effect.high, digits)}"


def adjust_holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p-values for multiple comparisons by Holm's method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return tuple(map(float, adjusted))


def _subset_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of all non-empty subsets, or of random ones if there are too many."""
    if len(values) <= ENUMERATED:
        sums, sizes = np.zeros(1), np.zeros(1)
        for value in values:
            sums = np.concatenate([sums, sums + value])
            sizes = np.concatenate([sizes, sizes + 1])
        sums, sizes = sums[1:], sizes[1:]
    else:
        chosen = np.random.default_rng(0).random((RANDOM_SUBSETS, len(values))) < 0.5
        sums, sizes = chosen @ values, np.maximum(chosen.sum(axis=1), 1)
    means = sums / sizes
    # Sums that are zero up to rounding must count as zero.
    means[np.abs(means) < 1e-12 * np.abs(values).max()] = 0
    return means
