"""How far labelers who ranked the same outputs agree: arithmetic on ranks. Nothing of ours is imported.

Ouyang et al. 2022, section 3.4: training labelers "agree with each-other" 72.6 +- 1.5 % of the time, held-out labelers
77.3 +- 1.3 %. The paper says neither what is counted (pairs of outputs or whole rankings), nor what a tie counts, nor
what stands behind the +-. Here two labelers are compared over all pairs of outputs of a prompt that both ranked, and
all these comparisons are pooled. Ties have three conventions, and all three are reported:

    untied   pairs that both labelers ordered; those that either of them tied are left out. The headline: it is what
             the reward model learns from (the paper drops ties), and chance is one half whoever ties how often
    strict   all pairs; a tie agrees with a tie alone
    half     all pairs; a tie against a tie agrees, a tie against an order agrees by half

Pairs of one prompt hang together, so intervals and standard errors are over prompts, not pairs: they say how far other
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

TieConvention = Literal["untied", "strict", "half"]
CONVENTIONS: tuple[TieConvention, ...] = ("untied", "strict", "half")
HEADLINE: TieConvention = "untied"
Z95 = 1.959963984540054  # the normal's 97.5 % quantile
RESAMPLES, BATCH = 2000, 50  # in batches: all at once would take prompts x resamples of memory


class Tally(NamedTuple):
    """Pairs of K outputs under two rankings; the five numbers add up to K (K - 1) / 2."""

    concordant: int  # both put the same output first
    discordant: int
    first_ties: int  # tied by the first ranking alone
    second_ties: int
    both_tie: int


class SharedRankings(NamedTuple):
    """Outputs of one prompt that several labelers ranked: all ranks are of the same outputs in the same order."""

    prompt: str  # what tells prompts apart
    ranks: dict[str, Sequence[int]]  # labeler: ranks
    times: dict[str, datetime]  # labeler: when the ranking was given, where that is known


class LabelerPair(NamedTuple):
    """Two labelers' rankings of the same outputs; `time` is when the later was given, where both times are known."""

    prompt: str
    first: str
    second: str
    tally: Tally
    time: datetime | None


class AgreementEstimate(NamedTuple):
    """A share or mean with its 95 % interval and standard error, nan where there is none to give."""

    value: float
    low: float
    high: float
    error: float
    counted: float  # what the value is a share or mean of: pairs of outputs, or comparisons
    prompts: int
    interval: str  # how it was made: bootstrap, or wilson


def tally(first: Sequence[int], second: Sequence[int]) -> Tally:
    """Count the pairs of outputs by what two rankings say of them.

    Args:
        first, second: [K] ranks of the same outputs in the same order; only their order and equality count.

    Raises:
        ValueError: when they differ in length.
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
    """(pairs that agree, pairs that count) under a convention; see the head of this file."""
    if ties == "untied":
        return counts.concordant, counts.concordant + counts.discordant
    one_ties = counts.first_ties + counts.second_ties
    return counts.concordant + counts.both_tie + (0.5 * one_ties if ties == "half" else 0), sum(counts)


def tau_b(counts: Tally) -> float:
    """Kendall's tau-b of two rankings with ties (Kendall 1945); nan when one of them ties everything.

    (alike - opposed) / sqrt(P Q), with P the pairs that the first ranking orders and Q those that the second orders.
    """
    ordered_by_both = counts.concordant + counts.discordant
    p, q = ordered_by_both + counts.second_ties, ordered_by_both + counts.first_ties
    return (counts.concordant - counts.discordant) / math.sqrt(p * q) if p * q else math.nan


def labeler_pairs(shared: Iterable[SharedRankings]) -> list[LabelerPair]:
    """Every two labelers of every set of outputs, names in alphabetical order."""
    found = []
    for item in shared:
        for first, second in combinations(sorted(item.ranks), 2):
            times = [item.times[name] for name in (first, second) if name in item.times]
            counts = tally(item.ranks[first], item.ranks[second])
            found.append(LabelerPair(item.prompt, first, second, counts, max(times) if len(times) == 2 else None))
    return found


def pairwise(compared: Sequence[LabelerPair], ties: TieConvention = HEADLINE, seed: int = 0) -> AgreementEstimate:
    """Share of the pairs of outputs on which two labelers agree, all comparisons pooled."""
    credits = [(c.prompt, *agreement_counts(c.tally, ties)) for c in compared]
    return ratio(credits, seed, shares=all(agree in (0, 1) for _, agree, _ in credits))


def kendall(compared: Sequence[LabelerPair], seed: int = 0) -> AgreementEstimate:
    """Mean tau-b of the comparisons in which neither ranking ties everything."""
    taus = [(c.prompt, tau_b(c.tally)) for c in compared]
    return ratio([(prompt, tau, 1) for prompt, tau in taus if not math.isnan(tau)], seed, span=(-1.0, 1.0))


def pairs_of_labeler(compared: Iterable[LabelerPair], name: str) -> list[LabelerPair]:
    """The comparisons of one labeler with the others."""
    return [c for c in compared if name in (c.first, c.second)]


def time_windows(compared: Iterable[LabelerPair], count: int) -> list[list[LabelerPair]]:
    """Comparisons that have a time, in its order, cut into at most `count` parts of equal size.

    Parts of equal size rather than length: labelling comes in bursts, and their intervals are to be of like width.
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
    """Sum of numerators over sum of denominators, with an interval over prompts.

    The interval is the percentile bootstrap over prompts. Where every prompt gives one pair alone (`shares`), pairs are
    independent, and Wilson's interval (1927) is right; where all prompts have one ratio, resampling them shows no
    spread however few they are, and it is Wilson's for so many cases of that share of `span`. The standard error is
    that of a ratio of prompt totals, linearised: sqrt(m / (m - 1) sum (a - r b)^2) / sum b (Cochran 1977, section 6).

    Args:
        parts: (prompt, numerator, denominator), any number for a prompt.
        shares: whether a prompt whose denominator is 1 has a numerator of 0 or 1.
        span: the least and the greatest ratio that a prompt can have.
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
        low, high = (least + width * end for end in wilson((value - least) / width, m))
        return AgreementEstimate(value, low, high, float(error), float(b.sum()), m, "wilson")
    return AgreementEstimate(value, *_bootstrap(a, b, seed), float(error), float(b.sum()), m, "bootstrap")


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent cases."""
    z = Z95 * Z95 / n
    middle, half = share + z / 2, Z95 * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def _bootstrap(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    if len(a) < 2:
        return math.nan, math.nan
    generator, rates = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // BATCH):
        drawn = generator.integers(0, len(a), size=(BATCH, len(a)))
        rates.append(a[drawn].sum(1) / b[drawn].sum(1))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return float(low), float(high)


def positions(ranks: Sequence[int]) -> list[float]:
    """Where each output stands from 0, the best, to 1, the worst: (midrank - 1) / (K - 1).

    Tied outputs share the mean of the places that they take up, so [1, 4, 4] and [1, 2, 2] are the same, and rankings
    of 4 and of 9 outputs are on one scale.
    """
    r = np.asarray(ranks)
    better, tied = (r[None, :] < r[:, None]).sum(1), (r[None, :] == r[:, None]).sum(1) - 1
    return ((better + tied / 2) / (len(r) - 1)).tolist()


def alpha(shared: Iterable[SharedRankings]) -> float:
    """Krippendorff's ordinal alpha of the outputs' positions; an output is a unit, and labelers may be missing."""
    units: list[Sequence[float]] = []
    for item in shared:
        units += zip(*(positions(ranks) for ranks in item.ranks.values()), strict=True)
    return alpha_ordinal(units)


def alpha_ordinal(units: Iterable[Sequence[float]]) -> float:
    """Krippendorff's alpha for ordinal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    1 - observed / expected disagreement: 1 is perfect, 0 is chance. The distance of two values is the number of values
    from one to the other in the whole of the data, half of each end counted, squared.

    Args:
        units: the values that each unit was given, by however many labelers; those with a single value do not count.

    Returns:
        alpha; nan when nothing has two values, or when all values are equal.
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
