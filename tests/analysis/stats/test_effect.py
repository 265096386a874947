"""The sign-flip test and its interval, against scipy, by hand, and by simulation."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from analysis.stats.effect import adjust_holm, estimate_effect


def random_differences(n: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0.3, 1, n)


def scipys_p(differences: NDArray[np.float64]) -> float:
    """SciPy's exact p-value: there are fewer sign patterns than resamples."""
    result = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=10**6
    )
    return float(result.pvalue)


def test_by_hand() -> None:
    # Of the 8 sign patterns of 1, 2, 3, only +++ and --- have a mean as extreme as 2.
    effect = estimate_effect([1, 2, 3], level=0.5)
    assert (effect.mean, effect.p, effect.n) == (2, 2 / 8, 3)
    # Means of the subsets: 1, 1.5, 2, 2, 2, 2.5, 3. At level 0.5 a shift is rejected if at most
    # 0.5 × 8 / 2 = 2 patterns on a side are as extreme, so the ends are the second means.
    assert (effect.low, effect.high) == (1.5, 2.5)


@pytest.mark.parametrize("n", [2, 6, 8, 11])
@pytest.mark.parametrize("seed", range(5))
def test_p_matches_scipy(n: int, seed: int) -> None:
    differences = random_differences(n, seed)
    assert estimate_effect(differences).p == pytest.approx(scipys_p(differences))


def test_ties_and_zeros_count_as_in_scipy() -> None:
    for differences in ([0.1, -0.1, 0.2, -0.2, 0.3, 0.0, 0.1], [0.0] * 6, [0.1] * 6):
        assert estimate_effect(differences).p == pytest.approx(scipys_p(np.array(differences)))


@pytest.mark.parametrize("n", [6, 8, 10])
@pytest.mark.parametrize("seed", range(20))
def test_the_interval_contains_the_shifts_that_are_not_rejected(n: int, seed: int) -> None:
    differences = random_differences(n, seed)
    effect = estimate_effect(differences)
    hair = 1e-9
    for end, inside in ((effect.low, 1), (effect.high, -1)):
        assert estimate_effect(differences - (end + inside * hair)).p > 0.05
        assert estimate_effect(differences - (end - inside * hair)).p <= 0.05
    assert (effect.low > 0 or effect.high < 0) == (effect.p <= 0.05)


def test_fewer_than_six_pairs_never_reject_no_effect() -> None:
    effect = estimate_effect([1.0, 1.1, 1.2, 0.9, 1.0])
    assert effect.p == 2 / 32
    assert (effect.low, effect.high) == (-np.inf, np.inf)
    assert estimate_effect([1.0, 1.1, 1.2, 0.9, 1.0, 1.1]).low == 0.9


def test_many_pairs_are_sampled_and_agree_with_the_t_test() -> None:
    differences = random_differences(40, seed=1)
    effect = estimate_effect(differences)
    student = stats.ttest_1samp(differences, 0)
    assert effect.p == pytest.approx(student.pvalue, rel=0.1)
    low, high = student.confidence_interval()
    assert (effect.low, effect.high) == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize("n", [6, 8, 10])
def test_the_interval_has_its_nominal_coverage(n: int) -> None:
    studies = 4_000
    random = np.random.default_rng(n)
    # Logistic: symmetric, with heavier tails than the normal distribution.
    effects = [estimate_effect(row) for row in random.logistic(0.7, 1, (studies, n))]
    covered = sum(effect.low <= 0.7 <= effect.high for effect in effects)
    # The exact level, since the ends are at whole numbers of sign patterns.
    exact = 1 - 2 * int(0.05 * 2**n / 2) / 2**n
    assert exact >= 0.95
    assert stats.binomtest(covered, studies, exact).pvalue > 0.001


def test_power_at_one_standard_deviation_is_close_to_the_t_test() -> None:
    n, studies = 10, 4_000
    # The t-test is optimal for normal differences; its power is 0.80.
    critical = stats.t.ppf(0.975, n - 1)
    best = stats.nct.sf(critical, n - 1, np.sqrt(n)) + stats.nct.cdf(-critical, n - 1, np.sqrt(n))
    assert best == pytest.approx(0.803, abs=0.001)
    random = np.random.default_rng(0)
    found = sum(estimate_effect(row).p < 0.05 for row in random.normal(1, 1, (studies, n)))
    assert best - 0.03 < found / studies < best + 0.01


def test_holm_by_hand() -> None:
    assert adjust_holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))
    assert adjust_holm([0.5, 0.6]) == (1, 1)
    assert adjust_holm([0.02]) == (0.02,)


@pytest.mark.parametrize("differences", [[], [0.1, float("nan")], [float("inf")]])
def test_empty_or_non_finite_differences_are_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate_effect(differences)
