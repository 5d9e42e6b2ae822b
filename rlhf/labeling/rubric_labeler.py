"""The simulated labeler: the rubric's score with noise, set so that two labelers agree as often as people do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rlhf.config import Recipe
from rlhf.data.records import Prompt, Ranking
from rlhf.functional.seeding import row_seed
from rlhf.labeling.base import Labeler, Output, agreement, preference, ranks_of
from rlhf.labeling.outputs import Candidate
from rlhf.labeling.rubric import rubric_score


class RubricLabeler:
    """The rubric's score plus normal noise, drawn for each output from (seed, prompt, position) alone.

    Args:
        noise_sigma: deviation of the noise, in rubric points; 0 labels without noise.
        tie_margin: outputs whose noisy scores are no further than this from the best of their group tie with it.
    """

    def __init__(self, noise_sigma: float = 0.0, tie_margin: float = 0.0) -> None:
        self.noise_sigma, self.tie_margin = noise_sigma, tie_margin

    def utilities(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> list[float]:
        """Noisy scores, one per output."""
        return [
            rubric_score(prompt.text, output.text, output.finished)
            + self.noise_sigma * _standard_normal(seed, prompt.key, i)
            for i, output in enumerate(outputs)
        ]

    def rank(self, prompt: Prompt, outputs: Sequence[Output], seed: int) -> tuple[int, ...]:
        """Ranks by noisy score; see `Labeler.rank`."""
        return ranks_of(self.utilities(prompt, outputs, seed), self.tie_margin)

    def prefers(self, prompt: Prompt, a: Output, b: Output, order_seed: int) -> float:
        """See `Labeler.prefers`."""
        return preference(self.rank(prompt, (a, b), order_seed))


def expected_agreement(groups: Sequence[Sequence[float]], sigma: float, tie_margin: float = 0.0) -> float:
    """Agreement of two independent noisy labelers over the pairs that both leave untied; nan when there is no pair.

    Noise on the gap d of a pair has deviation s = sigma sqrt(2). One labeler puts the better output first by more than
    the margin m with probability p = Phi((d - m) / s) and the other first with q = Phi((-d - m) / s); two labelers
    both order the pair with (p + q)^2 and agree with p^2 + q^2. The result is the ratio of the sums of these over all
    pairs. Without a margin that is the mean of p^2 + (1 - p)^2, and a pair without a gap agrees half of the time.
    Ties through a third output of the group are left out of account.

    Args:
        groups: noise-free scores, one list per prompt.
        sigma: deviation of the noise on each score; at 0 the limit of small noise.
    """
    gaps = [abs(a - b) for group in groups for a, b in combinations(group, 2)]
    agree = both = 0.0
    for gap in gaps:
        p, q = _normal_cdf(gap - tie_margin, sigma), _normal_cdf(-gap - tie_margin, sigma)
        agree, both = agree + p * p + q * q, both + (p + q) ** 2
    return agree / both if both > 0 else math.nan


def noise_for_agreement(groups: Sequence[Sequence[float]], target: float, tie_margin: float = 0.0) -> float:
    """The noise at which two labelers are expected to agree on the share `target` of untied pairs, by bisection.

    Returns 0 when even labelers without noise do not agree more than that, or when there is no pair with a gap.

    Args:
        groups: noise-free scores, one list per prompt.
        target: in (0.5, 1]; the paper's labelers agreed on 0.726 of pairs.
    """
    if not 0.5 < target <= 1:
        raise ValueError(f"agreement {target} is not in (0.5, 1]")
    if not any(a != b for group in groups for a, b in combinations(group, 2)):
        return 0.0

    def too_quiet(sigma: float) -> bool:
        # nan: the noise is so small that every pair ties.
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


def _normal_cdf(distance: float, sigma: float) -> float:
    """Phi(distance / (sigma sqrt 2)); a step at 0 when there is no noise."""
    if sigma == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return 0.5 * (1 + math.erf(distance / (2 * sigma)))


def _standard_normal(seed: int, key: str, index: int) -> float:
    return float(np.random.Generator(np.random.Philox(key=row_seed(seed, "label", key, index))).standard_normal())


def rubric_scores(prompt: Prompt, outputs: Sequence[Output]) -> list[float]:
    """Noise-free rubric scores, one per output."""
    return [rubric_score(prompt.text, output.text, output.finished) for output in outputs]


def second_opinion(
    labeler: Labeler, candidates: Sequence[Candidate], rankings: Sequence[Ranking], recipe: Recipe
) -> dict[str, Any]:
    """Agreement with a second, independent draw of the noise over the pairs untied in both."""
    seed = row_seed(recipe.run.seed, "second labeler")
    counts = [
        agreement(r.ranks, labeler.rank(c.prompt, c.outputs, seed)) for c, r in zip(candidates, rankings, strict=True)
    ]
    agreeing, pairs = (sum(column) for column in zip(*counts, strict=True))
    return {"agreement": agreeing / pairs if pairs else None, "agreement_pairs": pairs}


def _none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
