"""Compute how far labelers who ranked the same outputs agree: pair agreement, Kendall's tau-b, Krippendorff's alpha.

Ouyang et al. 2022, section 3.4: training labelers "agree with each-other" 72.6 +- 1.5 % of the time, held-out labelers
77.3 +- 1.3 %. The paper says neither whether pairs of outputs or whole rankings are counted, nor how a tie counts, nor
what the +- measures. Here two labelers are compared over all pairs of outputs of a prompt that both ranked, and all
these comparisons are pooled. Ties have three conventions, and all three are reported:

    untied   counts the pairs that both labelers ordered. It is the headline: the reward model learns from such pairs
             (the paper drops ties), and chance is one half however often a labeler ties
    strict   counts all pairs; a tie agrees only with a tie
    half     counts all pairs; a tie agrees with a tie, and by half with an order

Pairs of one prompt are not independent, so intervals and standard errors are over prompts: they say how far other
prompts would move the figure for these labelers, not what other labelers would do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import combinations, permutations
from typing import Literal, NamedTuple

import numpy as np

from rlhf.functional.statistics import bootstrap_interval, wilson_interval

TieConvention = Literal["untied", "strict", "half"]
CONVENTIONS: tuple[TieConvention, ...] = ("untied", "strict", "half")
HEADLINE: TieConvention = "untied"


class Tally(NamedTuple):
    """Numbers of pairs of K outputs under two rankings; the five add up to K (K - 1) / 2."""

    concordant: int  # ordered alike by both rankings
    discordant: int  # ordered in opposite ways
    first_ties: int  # tied by the first ranking alone
    second_ties: int  # tied by the second ranking alone
    both_tie: int


class SharedRankings(NamedTuple):
    """The rankings that several labelers gave to the same outputs of one prompt, in the same order of outputs."""

    prompt: str  # identifies the prompt
    ranks: dict[str, Sequence[int]]  # by labeler
    times: dict[str, datetime]  # by labeler: time of the ranking, if known


class LabelerPair(NamedTuple):
    """Two labelers' rankings of the same outputs, compared."""

    prompt: str
    first: str  # a labeler's name
    second: str
    tally: Tally
    time: datetime | None  # of the later ranking, if both times are known


class AgreementEstimate(NamedTuple):
    """A share or mean with its 95 % interval and standard error; each of the three is nan where it is undefined."""

    value: float
    low: float
    high: float
    error: float  # standard error
    counted: float  # number of pairs of outputs, or of comparisons, that the value is a share or mean of
    prompts: int
    interval: str  # kind of interval: bootstrap or wilson


def tally(first: Sequence[int], second: Sequence[int]) -> Tally:
    """Count the pairs of outputs that two rankings order alike, order differently, or tie.

    Both are [K] ranks of the same outputs in the same order; only order and equality of ranks count. Raises ValueError
    if they differ in length.
    """
    counts = dict.fromkeys(Tally._fields, 0)
    for (a1, a2), (b1, b2) in combinations(list(zip(first, second, strict=True)), 2):
        if a1 == b1:
            counts["both_tie" if a2 == b2 else "first_ties"] += 1
        elif a2 == b2:
            counts["second_ties"] += 1
        else:
            counts["concordant" if (a1 < b1) == (a2 < b2) else "discordant"] += 1
    return Tally(**counts)


def agreement_counts(counts: Tally, ties: TieConvention = HEADLINE) -> tuple[float, int]:
    """Return (pairs that agree, pairs that count) under a convention of ties."""
    if ties == "untied":
        return counts.concordant, counts.concordant + counts.discordant
    one_ties = counts.first_ties + counts.second_ties
    return counts.concordant + counts.both_tie + (0.5 * one_ties if ties == "half" else 0), sum(counts)


def tau_b(counts: Tally) -> float:
    """Return Kendall's tau-b of two rankings with ties (Kendall 1945); nan if one of them ties everything.

    (concordant - discordant) / sqrt(P Q), P the number of pairs that the first ranking orders, Q that of the second.
    """
    ordered_by_both = counts.concordant + counts.discordant
    p, q = ordered_by_both + counts.second_ties, ordered_by_both + counts.first_ties
    return (counts.concordant - counts.discordant) / math.sqrt(p * q) if p * q else math.nan


def labeler_pairs(shared: Iterable[SharedRankings]) -> list[LabelerPair]:
    """Compare every two labelers of every set of outputs; the names of a pair are in alphabetical order."""
    found = []
    for item in shared:
        for first, second in combinations(sorted(item.ranks), 2):
            times = [item.times[name] for name in (first, second) if name in item.times]
            counts = tally(item.ranks[first], item.ranks[second])
            found.append(LabelerPair(item.prompt, first, second, counts, max(times) if len(times) == 2 else None))
    return found


def pairwise(compared: Sequence[LabelerPair], ties: TieConvention = HEADLINE, seed: int = 0) -> AgreementEstimate:
    """Return the share of pairs of outputs on which two labelers agree, all comparisons pooled."""
    credits = [(c.prompt, *agreement_counts(c.tally, ties)) for c in compared]
    return ratio(credits, seed, shares=all(agree in (0, 1) for _, agree, _ in credits))


def kendall(compared: Sequence[LabelerPair], seed: int = 0) -> AgreementEstimate:
    """Return the mean tau-b of the comparisons in which neither ranking ties everything."""
    taus = [(c.prompt, tau_b(c.tally)) for c in compared]
    return ratio([(prompt, tau, 1) for prompt, tau in taus if not math.isnan(tau)], seed, span=(-1.0, 1.0))


def pairs_of_labeler(compared: Iterable[LabelerPair], name: str) -> list[LabelerPair]:
    """Return the comparisons of one labeler with the others."""
    return [c for c in compared if name in (c.first, c.second)]


def time_windows(compared: Iterable[LabelerPair], count: int) -> list[list[LabelerPair]]:
    """Sort the comparisons that have a time by it and cut them into at most `count` parts of equal size.

    Not of equal duration: labels come in bursts, and the intervals of the parts should be of similar width.
    """
    timed = sorted((c for c in compared if c.time is not None), key=lambda c: c.time)
    edges = np.linspace(0, len(timed), min(count, len(timed)) + 1).round().astype(int)
    return [timed[a:b] for a, b in itertools.pairwise(edges)]


def ratio(
    parts: Sequence[tuple[str, float, float]],
    seed: int = 0,
    shares: bool = False,
    span: tuple[float, float] = (0.0, 1.0),
) -> AgreementEstimate:
    """Return the sum of numerators over the sum of denominators, with an interval and standard error over prompts.

    The interval is the percentile bootstrap over prompts, with two exceptions. If every prompt gives a single pair
    (`shares`), pairs are independent and Wilson's interval applies. If all prompts have the same ratio, resampling
    shows no spread however few they are; Wilson's interval is then of as many cases as there are prompts, with the
    ratio's place in `span` as the share. The standard error is that of a ratio of prompt totals, linearised:
    sqrt(m / (m - 1) sum (a - r b)^2) / sum b with m prompts (Cochran 1977, section 6).

    `parts` are (prompt, numerator, denominator); a prompt may have several. With `shares` a prompt whose denominator is
    1 has a numerator of 0 or 1. `span` is the least and the greatest ratio that a prompt can have.
    """
    sums: dict[str, list[float]] = {}
    for prompt, above, below in parts:
        if below:
            total = sums.setdefault(prompt, [0.0, 0.0])
            total[0], total[1] = total[0] + above, total[1] + below
    if not sums:
        return AgreementEstimate(math.nan, math.nan, math.nan, math.nan, 0, 0, "")
    a, b = np.array(list(sums.values())).T
    value, m = float(a.sum() / b.sum()), len(a)
    error = math.sqrt(m / (m - 1) * ((a - value * b) ** 2).sum()) / b.sum() if m > 1 else math.nan
    if (shares and bool((b == 1).all())) or (m > 1 and float(np.ptp(a / b)) < 1e-12):
        least, width = span[0], span[1] - span[0]
        low, high = (least + width * end for end in wilson_interval((value - least) / width * m, m)[1:])
        return AgreementEstimate(value, low, high, float(error), float(b.sum()), m, "wilson")
    low, high = bootstrap_interval(a, b, seed)[1:] if m > 1 else (math.nan, math.nan)
    return AgreementEstimate(value, low, high, float(error), float(b.sum()), m, "bootstrap")


def positions(ranks: Sequence[int]) -> list[float]:
    """Return each output's position from 0, the best, to 1, the worst: (midrank - 1) / (K - 1).

    Tied outputs share the mean of the ranks that they take up, so [1, 4, 4] and [1, 2, 2] are the same, and rankings of
    4 and of 9 outputs are on one scale.
    """
    r = np.asarray(ranks)
    better, tied = (r[None, :] < r[:, None]).sum(1), (r[None, :] == r[:, None]).sum(1) - 1
    return ((better + tied / 2) / (len(r) - 1)).tolist()


def alpha(shared: Iterable[SharedRankings]) -> float:
    """Return Krippendorff's ordinal alpha of the outputs' positions: outputs are units, and labelers may be missing."""
    units: list[Sequence[float]] = []
    for item in shared:
        units += zip(*(positions(ranks) for ranks in item.ranks.values()), strict=True)
    return alpha_ordinal(units)


def alpha_ordinal(units: Iterable[Sequence[float]]) -> float:
    """Return Krippendorff's alpha of ordinal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    1 - observed / expected disagreement: 1 is perfect, 0 is chance. The distance of two values is the squared number of
    values in all data from one to the other, where values equal to either end count half. `units` has for each unit the
    values that its labelers gave; a unit with a single value does not count. Alpha is nan if no unit has two values, or
    if all values are equal.
    """
    paired = [list(unit) for unit in units if len(unit) > 1]
    if not paired:
        return math.nan
    values, codes = np.unique(np.concatenate(paired), return_inverse=True)
    coincidences = np.zeros((len(values), len(values)))
    start = 0
    for unit in paired:
        own = codes[start : start + len(unit)]
        start += len(unit)
        for c, k in permutations(own, 2):
            coincidences[c, k] += 1 / (len(unit) - 1)
    totals = coincidences.sum(0)
    n, middle = totals.sum(), totals.cumsum() - totals / 2
    distance = (middle[:, None] - middle[None, :]) ** 2
    observed = (coincidences * distance).sum() / n
    expected = (np.outer(totals, totals) * distance).sum() / (n * (n - 1))
    return float(1 - observed / expected) if expected > 0 else math.nan
