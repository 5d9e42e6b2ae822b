"""The simulated labeler: the rubric's score with noise, whose std makes two labelers agree as often as people do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from rlhf.config import RankSection
from rlhf.data.records import Prompt, Ranking
from rlhf.functional.seeding import row_seed
from rlhf.labeling.base import Labeler, Output, pooled_agreement, preference, ranks_of
from rlhf.labeling.outputs import Outputs
from rlhf.labeling.rubric import rubric_score


class RubricLabeler:
    """Ranks by rubric score plus normal noise of std `noise_sigma`, fixed by (seed, prompt, index); see `ranks_of`."""

    def __init__(self, noise_sigma: float = 0.0, tie_margin: float = 0.0) -> None:
        self.noise_sigma, self.tie_margin = noise_sigma, tie_margin

    def utilities(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> list[float]:
        """Return one noisy score for each output."""
        scores = [rubric_score(prompt.text, output.text, output.finished) for output in outputs]
        return [s + self.noise_sigma * _standard_normal(seed, prompt.key, i) for i, s in enumerate(scores)]

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """Return the ranks of the outputs by noisy score; see `Labeler`."""
        return ranks_of(self.utilities(prompt, outputs, seed), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """Return 1, 0 or 0.5 by the ranks of the two outputs; see `Labeler`."""
        return preference(self.rank(prompt, (a, b), order_seed))


def expected_agreement(groups: Sequence[Sequence[float]], sigma: float, tie_margin: float = 0.0) -> float:
    """Return the share of untied pairs on which two independent noisy labelers agree, nan when there is no such pair.

    The noise on the gap d of a pair has std s = sigma sqrt(2). A labeler puts the better output first by more than the
    margin m with probability p = Phi((d - m) / s), and the other output with q = Phi((-d - m) / s). Two labelers both
    order the pair with probability (p + q)^2 and agree with p^2 + q^2. The result is the sum of the second over all
    pairs divided by the sum of the first. Without a margin that is the mean of p^2 + (1 - p)^2, and a pair without a
    gap agrees half of the time. Ties that come about through a third output of the group are ignored. `groups` has the
    noise-free scores of each prompt; sigma 0 gives the limit of small noise.
    """
    gaps = [abs(a - b) for group in groups for a, b in combinations(group, 2)]
    agree = both = 0.0
    for gap in gaps:
        p, q = _normal_cdf(gap - tie_margin, sigma), _normal_cdf(-gap - tie_margin, sigma)
        agree, both = agree + p * p + q * q, both + (p + q) ** 2
    return agree / both if both > 0 else math.nan


def noise_for_agreement(groups: Sequence[Sequence[float]], target: float, tie_margin: float = 0.0) -> float:
    """Return the std of the noise at which two labelers agree on the share `target` of untied pairs, by bisection.

    Returns 0 when even labelers without noise do not agree on more than that, or when no pair has a gap. The labelers
    of Ouyang et al. 2022, section 3.4, agreed on 0.726 of the pairs. Raises ValueError unless 0.5 < target <= 1.
    """
    if not 0.5 < target <= 1:
        raise ValueError(f"agreement {target} is not in (0.5, 1]")
    if not any(a != b for group in groups for a, b in combinations(group, 2)):
        return 0.0

    def too_quiet(sigma: float) -> bool:
        # The agreement is nan where the noise is so small that every pair ties.
        return not expected_agreement(groups, sigma, tie_margin) <= target

    if not too_quiet(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while too_quiet(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if too_quiet(middle) else (low, middle)
    return high


def calibrated_noise(outputs: Sequence[Outputs], cfg: RankSection) -> dict[str, float | None]:
    """Return, for rank/summary.json, the noise at which two labelers agree on `rank.agreement` of these pairs."""
    groups = [rubric_scores(each) for each in outputs]
    sigma = noise_for_agreement(groups, cfg.agreement, cfg.tie_margin)
    expected = expected_agreement(groups, sigma, cfg.tie_margin)
    return {
        "noise_sigma": sigma,
        "tie_margin": cfg.tie_margin,
        "target_agreement": cfg.agreement,
        "expected_agreement": None if math.isnan(expected) else expected,
    }


def second_opinion(
    labeler: Labeler, outputs: Sequence[Outputs], rankings: Sequence[Ranking], seed: int
) -> dict[str, float | int | None]:
    """Return the labeler's agreement with itself under a second, independent draw of the noise."""
    seed = row_seed(seed, "second labeler")
    again = (labeler.rank(each.prompt, each.outputs, seed) for each in outputs)
    return pooled_agreement(zip((ranking.ranks for ranking in rankings), again, strict=True))


def rubric_scores(item: Outputs | Ranking) -> list[float]:
    """Return the noise-free rubric score of each output."""
    both = zip(item.responses, item.finished, strict=True)
    return [rubric_score(item.prompt.text, text, finished) for text, finished in both]


def _normal_cdf(distance: float, sigma: float) -> float:
    """Return Phi(distance / (sigma sqrt 2)), a step at 0 when there is no noise."""
    if sigma == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return 0.5 * (1 + math.erf(distance / (2 * sigma)))


def _standard_normal(seed: int, key: str, index: int) -> float:
    return float(np.random.Generator(np.random.Philox(key=row_seed(seed, "label", key, index))).standard_normal())
