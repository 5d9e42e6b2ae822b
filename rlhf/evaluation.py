"""The statistics of an evaluation: win rates with intervals, diversity, lengths. No model is touched here.

Outputs come as one list per prompt with S samples each; wins come back in the same shape. The prompt is the unit of
every interval: samples of one prompt are averaged first, since they are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rlhf.labelers import Labeler, Output
    from rlhf.records import Prompt

ENOUGH_PROMPTS = 20  # below, a bootstrap interval is much too narrow


class Interval(NamedTuple):
    """A mean or proportion and the ends of its interval."""

    mean: float
    low: float
    high: float


def compare(
    labeler: Labeler,
    prompts: Sequence[Prompt],
    outputs_a: Sequence[Sequence[Output]],
    outputs_b: Sequence[Sequence[Output]],
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    judgements: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> list[list[float]]:
    """How often side a wins: for each prompt and sample the mean of `judgements` x 2 answers, each in {0, 0.5, 1}.

    Every pair is asked in both orders, (a, b) and (b, a), each time with a seed of its own: a labeler that favours the
    output it sees first then favours neither side. A tie counts one half. Sample s of a meets sample s of b.

    Args:
        labeler: anything with `prefers(prompt, a, b, order_seed) -> 1 (a), 0 (b) or 0.5 (tie)`.
        outputs_a, outputs_b: per prompt the same number of samples.
        advance: called with 1 after every prompt, for progress.
        judgements: how often each order is asked, as of so many labelers; leaves the expected win rate as it is.
        stop: asked before every prompt; when true, what follows is left out.

    Raises:
        ValueError: when the two sides have different shapes.
    """
    wins = []
    order_seeds = np.random.default_rng(seed)
    for prompt, side_a, side_b in zip(prompts, outputs_a, outputs_b, strict=True):
        if stop():
            break
        row = []
        for a, b in zip(side_a, side_b, strict=True):
            answers = []
            for first, second in order_seeds.integers(0, 2**31, size=(judgements, 2)).tolist():
                answers += [labeler.prefers(prompt, a, b, first), 1 - labeler.prefers(prompt, b, a, second)]
            row.append(sum(answers) / len(answers))
        wins.append(row)
        if advance:
            advance(1)
    return wins


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
