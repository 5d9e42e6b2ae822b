"""Statistics of samples and preferences: win rates, means and shares with their intervals, diversity, lengths.

Wins come as one list for each prompt with S samples each. The prompt is the unit of every interval: the samples of one
prompt are averaged first, since they are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import sqrt
from statistics import fmean
from typing import NamedTuple

import numpy as np

from rlhf.functional.ranking import PairCounts

ENOUGH_PROMPTS = 20  # below, a bootstrap interval is much too narrow


class Interval(NamedTuple):
    """A mean or proportion and the ends of its interval."""

    mean: float
    low: float
    high: float


def prompt_means(wins: Sequence[Sequence[float]]) -> list[float]:
    """One value per prompt: the mean over its samples."""
    return [float(np.mean(row)) for row in wins]


def win_rate(wins: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-prompt wins and its 95 % percentile bootstrap interval over prompts (Efron 1979).

    Where all prompts agree, resampling them shows no spread however few they are: then it is the Wilson interval.

    Args:
        wins: one value in [0, 1] for each prompt.
        resamples: bootstrap samples of as many prompts, drawn with replacement.

    Raises:
        ValueError: without any prompt.
    """
    values = np.asarray(wins, dtype=np.float64)
    if not len(values):
        raise ValueError("a win rate needs at least one prompt")
    if np.ptp(values) == 0:
        return wilson_interval(float(values.sum()), len(values))
    return mean_interval(values, resamples, seed)


def mean_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of one value per prompt and its 95 % percentile bootstrap interval over prompts (Efron 1979).

    Raises:
        ValueError: without any value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("a mean needs at least one value")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def length_matched_win_rate(
    wins: Sequence[Sequence[float]],
    lengths_a: Sequence[Sequence[int]],
    lengths_b: Sequence[Sequence[int]],
    tolerance: float = 0.2,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Interval | None, int]:
    """Win rate among pairs whose lengths differ by at most `tolerance` of the longer, and the number of such pairs.

    Labelers tend to like longer answers; a win rate that falls here was partly bought with length. The interval is
    over the prompts that still have a pair; it is None when no pair is left.

    Args:
        wins, lengths_a, lengths_b: [prompts][samples]; lengths in tokens.
    """
    kept = []
    for row, row_a, row_b in zip(wins, lengths_a, lengths_b, strict=True):
        triples = zip(row, row_a, row_b, strict=True)
        kept.append([win for win, a, b in triples if abs(a - b) <= tolerance * max(a, b)])
    kept = [row for row in kept if row]
    if not kept:
        return None, 0
    return win_rate(prompt_means(kept), resamples, seed), sum(len(row) for row in kept)


def wilson_interval(k: float, n: int, z: float = 1.959963984540054) -> Interval:
    """Proportion k / n and its Wilson score interval (Wilson 1927), 95 % by default.

    Raises:
        ValueError: unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is not a proportion")
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At k = 0 and k = n one end equals p exactly; rounding may put it past.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Unique n-grams over all n-grams of the texts together, on whitespace words (Li et al. 2016); 0 without any."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, 10th, 50th and 90th percentile of token lengths.

    Raises:
        ValueError: without any length.
    """
    if not len(lengths):
        raise ValueError("length statistics need at least one length")
    p10, p50, p90 = (float(p) for p in np.percentile(lengths, [10, 50, 90]))
    return {"mean": float(np.mean(lengths)), "p10": p10, "median": p50, "p90": p90}


def with_interval(name: str, interval: Interval) -> dict[str, float | None]:
    """The value under its name, and the ends of its interval under NAME_low and NAME_high: None where there is none."""
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return {name: interval.mean, f"{name}_low": low, f"{name}_high": high}


def cluster_bootstrap(groups: Sequence[Sequence[float]], seed: int = 0, shares: bool = True) -> Interval:
    """Mean over all values and its 95 % bootstrap interval over groups (pairs of one prompt are not independent).

    Groups of one and the same mean show no spread however few they are: then it is the Wilson interval of so many
    cases, which `shares` must be for; of other values, and of a single group, there is none (nan).
    """
    means = [fmean(group) for group in groups]
    if len(means) < 2 or max(means) - min(means) < 1e-12:
        if shares and len(means) > 1:
            return wilson_interval(means[0] * len(means), len(means))
        return Interval(fmean([value for group in groups for value in group]), math.nan, math.nan)
    return Interval(*accuracy_interval([PairCounts(sum(group), len(group), []) for group in groups], seed))


def accuracy_interval(counts: Sequence[PairCounts], seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Pair accuracy and its 95 % bootstrap interval over prompts (pairs of one prompt are not independent)."""
    correct = np.array([c.correct for c in counts], dtype=np.float64)
    pairs = np.array([c.pairs for c in counts], dtype=np.float64)
    if pairs.sum() == 0:
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(counts), size=(resamples, len(counts)))
    drawn = pairs[draws].sum(1)
    rates = correct[draws].sum(1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(correct.sum() / pairs.sum()), float(low), float(high)
