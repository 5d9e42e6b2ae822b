"""Compute statistics of samples and preferences: intervals of means and shares, win rates, diversity, lengths.

The prompt is the unit of every interval. The values of one prompt (of its samples, or of its pairs of outputs) are not
independent of each other, so they are averaged or summed first. All intervals are 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50  # all at once would take prompts x resamples of memory
ENOUGH_PROMPTS = 20  # with fewer prompts a bootstrap interval is much too narrow


class Interval(NamedTuple):
    """A mean, share or ratio and the ends of its interval; the ends are nan where there is none."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return sum(numerators) / sum(denominators) and its percentile bootstrap interval over prompts (Efron 1979).

    Each resample draws n prompts with replacement; the ends are the 2.5 % and 97.5 % quantiles of the resamples'
    ratios. A resample whose denominators are all 0 is left out. Everything is nan if all denominators are 0. There is
    one numerator and one denominator per prompt, both [n]; no denominator is negative.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if b.sum() == 0:
        return Interval(math.nan, math.nan, math.nan)
    generator, ratios = np.random.default_rng(seed), []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        drawn = generator.integers(0, len(a), size=(min(RESAMPLES_AT_ONCE, resamples - start), len(a)))
        above, below = a[drawn].sum(1), b[drawn].sum(1)
        ratios.append(above[below > 0] / below[below > 0])
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return Interval(float(a.sum() / b.sum()), float(low), float(high))


def wilson_interval(k: float, n: int) -> Interval:
    """Return the share k / n of n independent cases and its score interval (Wilson 1927).

    Raises ValueError unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is not a proportion")
    p, z2 = k / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At k = 0 and k = n one end equals p exactly; rounding may put it past.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean of one value per prompt and its bootstrap interval; raise ValueError if there are no values."""
    if not len(values):
        raise ValueError("a mean needs at least one value")
    return bootstrap_interval(values, np.ones(len(values)), seed, resamples)


def win_rate(wins: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean of per-prompt wins, each in [0, 1], and its bootstrap interval.

    Where all prompts have the same value, resampling shows no spread, however few prompts there are. The interval is
    then Wilson's. Raises ValueError if there are no prompts.
    """
    values = np.asarray(wins, dtype=np.float64)
    if not len(values):
        raise ValueError("a win rate needs at least one prompt")
    if np.ptp(values) == 0:
        return wilson_interval(float(values.sum()), len(values))
    return mean_interval(values, resamples, seed)


def cluster_bootstrap(groups: Sequence[Sequence[float]], seed: int = 0, shares: bool = True) -> Interval:
    """Return the mean over all values and its bootstrap interval over groups, such as the pairs of one prompt.

    Where all groups have the same mean, resampling shows no spread, however few groups there are. The interval is then
    Wilson's for as many cases as there are groups. Wilson's interval is for shares only: without `shares`, and for a
    single group, the ends are nan.
    """
    means = [fmean(group) for group in groups]
    if len(means) < 2 or max(means) - min(means) < 1e-12:
        if shares and len(means) > 1:
            return wilson_interval(means[0] * len(means), len(means))
        return Interval(fmean([value for group in groups for value in group]), math.nan, math.nan)
    return bootstrap_interval([sum(group) for group in groups], [len(group) for group in groups], seed)


def prompt_means(wins: Sequence[Sequence[float]]) -> list[float]:
    """Return one value per prompt, the mean over its samples; `wins` is [prompts][samples]."""
    return [float(np.mean(row)) for row in wins]


def length_matched_win_rate(
    wins: Sequence[Sequence[float]],
    lengths_a: Sequence[Sequence[int]],
    lengths_b: Sequence[Sequence[int]],
    tolerance: float = 0.2,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Interval | None, int]:
    """Return the win rate among pairs whose lengths differ by at most `tolerance` of the longer, and their number.

    Labelers tend to like longer answers; a win rate that falls here was partly due to length. Wins and lengths, in
    tokens, are [prompts][samples]. The interval is over the prompts that still have a pair; it is None if none is left.
    """
    kept = []
    for row, row_a, row_b in zip(wins, lengths_a, lengths_b, strict=True):
        triples = zip(row, row_a, row_b, strict=True)
        kept.append([win for win, a, b in triples if abs(a - b) <= tolerance * max(a, b)])
    kept = [row for row in kept if row]
    if not kept:
        return None, 0
    return win_rate(prompt_means(kept), resamples, seed), sum(len(row) for row in kept)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return unique n-grams / all n-grams of the texts, words split at white space (Li et al. 2016); 0 without any."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """Return the mean and the 10th, 50th and 90th percentile of token lengths; raise ValueError if there are none."""
    if not len(lengths):
        raise ValueError("length statistics need at least one length")
    p10, p50, p90 = (float(p) for p in np.percentile(lengths, [10, 50, 90]))
    return {"mean": float(np.mean(lengths)), "p10": p10, "median": p50, "p90": p90}


def with_interval(name: str, interval: Interval) -> dict[str, float | None]:
    """Return the value under its name and the ends under NAME_low and NAME_high, None for an end that is nan."""
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return {name: interval.mean, f"{name}_low": low, f"{name}_high": high}
