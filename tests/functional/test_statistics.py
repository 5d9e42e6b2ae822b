"""Intervals, win rates and measures of samples, held to values worked by hand and to plain loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rlhf.functional import statistics
from rlhf.functional.statistics import bootstrap_interval, cluster_bootstrap, distinct_n, mean_interval, win_rate

nan = pytest.approx(math.nan, nan_ok=True)
SHARES = [0.1, 0.9, 0.35, 0.6, 0.2, 0.75, 0.5, 0.05]


@pytest.mark.parametrize(("seed", "resamples"), [(0, 2000), (4, 31), (4, 130)])
def test_bootstrap_is_the_documented_one(seed: int, resamples: int) -> None:
    """Resamples from numpy's generator, ratios and percentiles by plain loops."""
    rng = random.Random(5)
    below = [rng.randint(1, 6) for _ in range(12)]
    above = [rng.randint(0, n) for n in below]
    draws = np.random.default_rng(seed).integers(0, 12, size=(resamples, 12)).tolist()
    ratios = sorted(sum(above[i] for i in draw) / sum(below[i] for i in draw) for draw in draws)
    ends = []
    for share in (0.025, 0.975):
        position = share * (resamples - 1)
        rank = math.floor(position)
        ends.append(ratios[rank] + (position - rank) * (ratios[min(rank + 1, resamples - 1)] - ratios[rank]))
    expected = (sum(above) / sum(below), *ends)
    assert bootstrap_interval(above, below, seed, resamples) == pytest.approx(expected, abs=1e-12)
    if (seed, resamples) == (0, 2000):
        assert bootstrap_interval(above, below) == bootstrap_interval(above, below, seed, resamples)


def test_bootstrap_of_certain_cases() -> None:
    assert bootstrap_interval([3] * 5, [3] * 5) == (1.0, 1.0, 1.0)
    assert bootstrap_interval([0] * 5, [3] * 5) == (0.0, 0.0, 0.0)
    assert bootstrap_interval([0] * 3, [0] * 3) == bootstrap_interval([], []) == (nan, nan, nan)
    # Two prompts: resamples are right in 0, 1 or 2 of 2, with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([1, 0], [1, 1]) == (0.5, 0.0, 1.0)
    # Half the prompts have no pair; a resample without any is left out.
    for pairs in (1, 2):
        assert bootstrap_interval([pairs, 0], [pairs, 0]) == (1.0, 1.0, 1.0)


def test_bootstrap_resamples_prompts_and_not_pairs() -> None:
    # 200 prompts, 3 in 4 right: 0.75 +- 1.96 (0.75 x 0.25 / 200)^0.5 = 0.75 +- 0.0600, whether a prompt has 1 pair or
    # 10 that go together; as 2,000 independent pairs it would be +- 0.019.
    for pairs in (1, 10):
        share, low, high = bootstrap_interval([pairs * (i % 4 > 0) for i in range(200)], [pairs] * 200, seed=3)
        assert share == 0.75
        assert (low, high) == pytest.approx((0.69, 0.81), abs=0.012)


def test_mean_interval_against_all_resamples() -> None:
    # Two values: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4; both ends are beyond 2.5 %.
    assert mean_interval([0.0, 1.0], seed=1) == (0.5, 0.0, 1.0)
    # Four values of which one is 4: a resample holds it k times with probability C(4,k) 3^(4-k) / 4^4; k = 0 has 0.316
    # and k >= 3 has 0.051, k = 4 0.004: the ends are 0 and 3.
    assert mean_interval([0.0, 0.0, 0.0, 4.0], resamples=20000) == (1.0, 0.0, 3.0)
    assert mean_interval(SHARES) == bootstrap_interval(SHARES, [1] * len(SHARES))
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_wilson_interval() -> None:
    # z = 1.96: 8 of 10 is (0.8 + 0.19207) / 1.38415 +- ...; the published interval is (0.4902, 0.9433).
    assert statistics.wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)
    # k = 0: the upper end is z^2 / (n + z^2) = 3.8415 / 13.8415.
    assert statistics.wilson_interval(0, 10) == pytest.approx((0, 0, 0.27753), abs=1e-5)
    assert statistics.wilson_interval(10, 10) == pytest.approx((1, 0.72247, 1), abs=1e-5)
    # Rounding does not take an end past 0 or 1, as it would for some n.
    ends = [(statistics.wilson_interval(0, n).low, statistics.wilson_interval(n, n).high) for n in range(1, 200)]
    assert all(low == 0 and high == 1 for low, high in ends)
    for k, n in [(0, 0), (-1, 3), (4, 3)]:
        with pytest.raises(ValueError):
            statistics.wilson_interval(k, n)


def test_win_rate_interval() -> None:
    # All alike: Wilson for 3 of 3 with z = 1.96, z^2 = 3.8415: low = 3 / (3 + 3.8415) = 0.4385.
    assert win_rate([1, 1, 1]) == pytest.approx((1, 0.4385, 1), abs=1e-4)
    # One tie: centre 1/2, half width 1.96 / (1 + 3.8415) * sqrt(1/4 + 3.8415 / 4) = 0.4454.
    assert win_rate([0.5]) == pytest.approx((0.5, 0.0546, 0.9454), abs=1e-4)
    # Two prompts: resampled means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4, so the 2.5 % points are 0 and 1.
    assert win_rate([0, 1], resamples=500) == (0.5, 0, 1)
    # 400 prompts, half won: the standard error is 0.5 / 20 = 0.025, the interval 0.5 +- 0.049.
    rate = win_rate([0, 1] * 200, resamples=4000)
    assert rate.mean == 0.5
    assert (rate.low, rate.high) == pytest.approx((0.451, 0.549), abs=0.005)
    assert win_rate(SHARES) == mean_interval(SHARES)
    # Ties carry no spread: 100 prompts, 40 won, 60 tied: mean 0.7, std sqrt(.4 * .6) / 2 = 0.245, error 0.0245.
    tied = win_rate([1] * 40 + [0.5] * 60, resamples=4000)
    assert tied.mean == pytest.approx(0.7)
    assert tied.high - tied.low == pytest.approx(2 * 1.96 * 0.0245, abs=0.008)
    with pytest.raises(ValueError):
        win_rate([])


def test_length_matched_win_rate() -> None:
    assert statistics.prompt_means([[1.0, 0.5], [0.0, 0.5]]) == [0.75, 0.25]
    wins = [[1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]
    # |10 - 8| = 2 <= 0.2 * 10 stays, 10 against 7 goes; 5 against 5 and 0.2 * 6 = 1.2 >= 1 stay; 1 against 9 goes.
    rate, n = statistics.length_matched_win_rate(wins, [[10, 10], [5, 6], [1, 1]], [[8, 7], [5, 5], [9, 9]])
    assert n == 3
    assert rate is not None
    assert rate.mean == pytest.approx((1.0 + 0.75) / 2)  # the first prompt keeps its win, the second (1 + 0.5) / 2
    assert statistics.length_matched_win_rate([[1.0]], [[10]], [[2]]) == (None, 0)
    ones = [[1]] * len(SHARES)
    assert statistics.length_matched_win_rate([[x] for x in SHARES], ones, ones) == (win_rate(SHARES), len(SHARES))
    for lengths in ([], [[1, 2]]):
        with pytest.raises(ValueError):
            statistics.length_matched_win_rate([[1.0]], [[1]], lengths)


def test_cluster_bootstrap() -> None:
    # Two groups with 3 of 4 right, Wilson's for n = 2: (0.75 + z^2/4 -+ z sqrt(0.1875/2 + z^2/16)) / (1 + z^2/2).
    assert cluster_bootstrap([[1, 1, 1, 0]] * 2)[1:] == pytest.approx((0.1979, 0.9733), abs=1e-4)
    # No flip in 4 groups: the upper end is z^2 / (n + z^2) = 3.8415 / 7.8415. Values that are no shares have no ends.
    assert cluster_bootstrap([[0.0] * 3] * 4) == pytest.approx((0, 0, 0.4899), abs=1e-4)
    assert cluster_bootstrap([[0.0] * 3] * 4, shares=False) == (0, nan, nan)
    # Of one group nothing is known, however many values it has.
    assert cluster_bootstrap([[1.0] * 27 + [0.0]]) == (pytest.approx(27 / 28), nan, nan)
    assert cluster_bootstrap([[x] for x in SHARES]) == mean_interval(SHARES)
    # Two groups of 1 and 3 values: the means of resamples are 0, 3/4 and 1 with probability 1/4, 1/2, 1/4.
    assert cluster_bootstrap([[0.0], [1.0, 1.0, 1.0]]) == (0.75, 0, 1)


def test_an_end_that_is_nan_is_written_as_none() -> None:
    flips = statistics.with_interval("flips", cluster_bootstrap([[0.0], [1.0]]))
    assert flips == {"flips": 0.5, "flips_low": 0, "flips_high": 1}
    assert statistics.with_interval("x", cluster_bootstrap([[2.0]])) == {"x": 2.0, "x_low": None, "x_high": None}


def test_distinct_n() -> None:
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a b", "a b"], 2) == 1 / 2  # n-grams do not span texts
    assert distinct_n(["a", ""], 2) == 0.0


def test_length_statistics() -> None:
    assert statistics.length_statistics(range(1, 12)) == {"mean": 6, "p10": 2, "median": 6, "p90": 10}
    with pytest.raises(ValueError):
        statistics.length_statistics([])
