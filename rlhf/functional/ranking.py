"""Compute the K-way ranking loss of the reward model, its pair accuracy and its calibration.

A batch holds G prompts; prompt g has K_g outputs, whose scores follow one another in a flat tensor [sum K_g]. Rank 1 is
best and equal ranks are a tie; only order and equality of ranks count.
Source: Ouyang et al. 2022, section 3.5, equation 1: the mean over the C(K, 2) pairs of a prompt of
-log sigmoid(r_w - r_l). "Ties were dropped" (appendix C.2), so the mean is over the pairs that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.functional.statistics import RESAMPLES, Interval, bootstrap_interval

TieHandling = Literal["drop", "half"]


class RankingLoss(NamedTuple):
    """The ranking loss of a batch; the caller divides `loss` by the number of prompts of the global batch."""

    loss: Tensor  # scalar: sum over prompts of each prompt's mean pair loss
    prompts: int  # prompts with at least one pair; the others contribute nothing


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs (better, worse) of output indices with different ranks."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def tied_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of output indices with equal ranks."""
    return [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] == ranks[j]]


def has_pairs(ranks: Sequence[int], ties: TieHandling) -> bool:
    """Return whether a prompt with these ranks contributes to the loss."""
    return len(ranks) > 1 if ties == "half" else len(set(ranks)) > 1


def ranking_loss(scores: Tensor, ranks: Sequence[Sequence[int]], ties: TieHandling = "drop") -> RankingLoss:
    """Return the sum over prompts of -(1/P) sum log sigmoid(r_w - r_l) over the P pairs of a prompt (equation 1).

    Every prompt has the same weight, for any K. `scores` [sum K_g] has one score per output, prompt after prompt;
    `ranks` are G rank lists whose lengths are the K_g. `ties`: "drop" leaves tied pairs out; "half" trains them to
    probability one half and counts them in the mean. Raises ValueError if the numbers of scores and ranks differ.
    """
    sizes = [len(group) for group in ranks]
    if scores.shape != (sum(sizes),):
        raise ValueError(f"{tuple(scores.shape)} scores for {sum(sizes)} ranks")
    total, prompts = scores.new_zeros((), dtype=torch.float32), 0
    # One group of scores serves all its pairs: K forwards, not K (K - 1).
    for group_scores, group in zip(scores.float().split(sizes), ranks, strict=True):
        if not has_pairs(group, ties):
            continue
        rank = torch.tensor(group, device=scores.device)
        margin = group_scores[:, None] - group_scores[None, :]
        better = rank[:, None] < rank[None, :]
        losses = -logsigmoid(margin[better])
        if ties == "half":
            tied = torch.triu(rank[:, None] == rank[None, :], diagonal=1)
            losses = torch.cat([losses, -0.5 * (logsigmoid(margin[tied]) + logsigmoid(-margin[tied]))])
        total = total + losses.mean()
        prompts += 1
    return RankingLoss(total, prompts)


class PairCounts(NamedTuple):
    """Scores of one prompt's outputs compared with their ranks, over the pairs that are not tied in rank."""

    correct: float  # pairs that the scores order as the labeler did; equal scores count half
    pairs: int
    margins: list[float]  # r_w - r_l of each pair


def count_pairs(scores: Sequence[float], ranks: Sequence[int]) -> PairCounts:
    """Compare the scores of one prompt's outputs with their ranks."""
    margins = [scores[i] - scores[j] for i, j in ordered_pairs(ranks)]
    correct = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)
    return PairCounts(correct, len(margins), margins)


def accuracy_interval(counts: Sequence[PairCounts], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the share of pairs ordered as the labeler did, with its bootstrap interval over prompts; nan if none."""
    return bootstrap_interval([c.correct for c in counts], [c.pairs for c in counts], seed, resamples)


def calibration(margins: Sequence[float], bins: int = 5) -> list[dict[str, float]]:
    """Return confidence and accuracy of pairs in equal-sized bins of sigmoid(|margin|), the lowest bin first.

    Each row has the mean `confidence` of the bin, the share `accuracy` ordered as the labeler did, and `n` pairs.
    """
    margin = np.asarray(margins, dtype=np.float64)
    order = np.argsort(np.abs(margin), kind="stable")
    rows = []
    for chunk in np.array_split(order, bins):
        if len(chunk):
            m = margin[chunk]
            right = (m > 0) + 0.5 * (m == 0)
            confidence = 1 / (1 + np.exp(-np.abs(m)))
            rows.append({"confidence": float(confidence.mean()), "accuracy": float(right.mean()), "n": len(chunk)})
    return rows
