"""Turn a judge's label log-probabilities into preferences and rankings, and score them against people's choices.

The judge is a language model. Log-probabilities and log-odds are in nats; log-odds are log(p / (1 - p)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class BothOrders(NamedTuple):
    """Log-odds for the output shown first, of a pair that is asked about in both orders."""

    ab: float  # a shown first
    ba: float  # b shown first

    @property
    def preference(self) -> float:
        """Return the log-odds that a is better; a shift toward the first that both orders share cancels."""
        return (self.ab - self.ba) / 2

    @property
    def shift(self) -> float:
        """Return the log-odds toward the output shown first, whichever it is: 0 without position bias."""
        return (self.ab + self.ba) / 2

    @property
    def flips(self) -> bool:
        """Return whether the two orders name different winners, or only one of them a tie."""
        return bool(np.sign(self.ab) != -np.sign(self.ba))


def normalise_labels(logprobs: Sequence[float]) -> list[float]:
    """Return the labels' log-probabilities given that one of the labels is the answer: the probabilities sum to 1."""
    total = np.logaddexp.reduce(logprobs)
    return [float(logp - total) for logp in logprobs]


def calibrated(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> list[float]:
    """Return log-probabilities after contextual calibration (Zhao et al. 2021, arXiv 2102.09690, section 5).

    Probabilities are p / p_cf, normalised to sum to 1; p_cf is the mean probability over content-free inputs.
    `logprobs` has one entry for each label; `content_free` is [inputs][labels], for inputs without content.
    """
    # The sum in place of the mean: the normalisation takes out the factor.
    free = np.logaddexp.reduce([normalise_labels(row) for row in content_free], axis=0)
    return normalise_labels([logp - each for logp, each in zip(logprobs, free, strict=True)])


def log_odds(logprobs: Sequence[float]) -> float:
    """Return the log-odds of the first of two labels."""
    return float(logprobs[0] - logprobs[1])


def expected_points(logprobs: Sequence[float]) -> float:
    """Return the expected number of points, where the labels stand for 1, 2, .. N points."""
    return sum(points * math.exp(logp) for points, logp in enumerate(normalise_labels(logprobs), 1))


def win_log_odds(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the log-odds that points drawn from a's distribution exceed points drawn from b's; a tie counts half.

    `a` and `b` are log-probabilities of the labels, from worst to best.
    """
    joint = np.add.outer(normalise_labels(a), normalise_labels(b))
    tied = np.logaddexp.reduce(np.diag(joint)) + math.log(0.5)
    above = np.logaddexp.reduce(joint[np.tril_indices(len(joint), -1)])
    below = np.logaddexp.reduce(joint[np.triu_indices(len(joint), 1)])
    return float(np.logaddexp(above, tied) - np.logaddexp(below, tied))


def mean_wins(preferences: Sequence[Sequence[float]]) -> list[float]:
    """Return for each output the mean probability that it is better than another one: Borda's count of probabilities.

    `preferences` is [K, K], the log-odds that i is better than j; the diagonal is not read.
    """
    k = len(preferences)
    return [sum(sigmoid(preferences[i][j]) for j in range(k) if j != i) / (k - 1) for i in range(k)]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_loss(log_odds_of_right: Sequence[float]) -> float:
    """Return the mean of -log p over pairs, p the probability of the side that people preferred; chance is log 2."""
    return float(np.mean([np.logaddexp(0, -x) for x in log_odds_of_right]))


def brier(log_odds_of_right: Sequence[float]) -> float:
    """Return the mean of (1 - p)^2 over pairs (Brier 1950); chance is 0.25."""
    return float(np.mean([sigmoid(-x) ** 2 for x in log_odds_of_right]))


def calibration_error(reliability: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error (Naeini et al. 2015): mean |accuracy - confidence| of bins, by pairs.

    `reliability` are the rows of `rlhf.functional.ranking.calibration`.
    """
    pairs = sum(row["n"] for row in reliability)
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in reliability) / pairs
