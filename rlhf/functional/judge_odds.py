"""Arithmetic on what a language model judges: label probabilities, both orders, rankings, calibration. Pure functions.

Nothing of ours is imported. Log-probabilities and log-odds are in nats; log-odds are log(p / (1 - p)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class BothOrders(NamedTuple):
    """A pair (a, b) asked as (a, b) and as (b, a): log-odds for the one shown first, each time."""

    ab: float
    ba: float

    @property
    def preference(self) -> float:
        """Log-odds that a is better. A shift toward the first, the same in both orders, cancels."""
        return (self.ab - self.ba) / 2

    @property
    def shift(self) -> float:
        """Log-odds toward the first, whatever stands there: 0 without position bias."""
        return (self.ab + self.ba) / 2

    @property
    def flips(self) -> bool:
        """Whether the two orders do not name the same winner (or the same tie)."""
        return bool(np.sign(self.ab) != -np.sign(self.ba))


def normalise_labels(logprobs: Sequence[float]) -> list[float]:
    """Log-probabilities of the labels given that one of them is said: they sum to 1."""
    total = np.logaddexp.reduce(logprobs)
    return [float(logp - total) for logp in logprobs]


def calibrated(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> list[float]:
    """Contextual calibration (Zhao et al. 2021, arXiv 2102.09690, section 5): p / p_cf, made to sum to 1 again.

    Args:
        logprobs: of each label.
        content_free: of each label, for inputs without content; p_cf is the mean of their probabilities.
    """
    free = np.logaddexp.reduce(
        [normalise_labels(row) for row in content_free], axis=0
    )  # of the sum: what follows divides
    return normalise_labels([logp - each for logp, each in zip(logprobs, free, strict=True)])


def log_odds(logprobs: Sequence[float]) -> float:
    """Of the first of two labels."""
    return float(logprobs[0] - logprobs[1])


def expected_points(logprobs: Sequence[float]) -> float:
    """Mean of the label's place 1, 2, .. N."""
    return sum(place * math.exp(logp) for place, logp in enumerate(normalise_labels(logprobs), 1))


def win_log_odds(a: Sequence[float], b: Sequence[float]) -> float:
    """Log-odds that a draw of points from a's distribution is above one from b's; equal points count half each.

    Args:
        a, b: log-probabilities of the labels, from worst to best.
    """
    joint = np.add.outer(normalise_labels(a), normalise_labels(b))
    tied = np.logaddexp.reduce(np.diag(joint)) + math.log(0.5)
    above = np.logaddexp.reduce(joint[np.tril_indices(len(joint), -1)])
    below = np.logaddexp.reduce(joint[np.triu_indices(len(joint), 1)])
    return float(np.logaddexp(above, tied) - np.logaddexp(below, tied))


def mean_wins(preferences: Sequence[Sequence[float]]) -> list[float]:
    """Mean probability of each output to be better than another one (Borda's count, with probabilities for votes).

    Args:
        preferences: [K, K] log-odds that i is better than j; the diagonal is not read.
    """
    k = len(preferences)
    return [sum(sigmoid(preferences[i][j]) for j in range(k) if j != i) / (k - 1) for i in range(k)]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_loss(log_odds_of_right: Sequence[float]) -> float:
    """Mean of -log p over pairs, p the probability given to the side that people preferred; log 2 = 0.693 is chance."""
    return float(np.mean([np.logaddexp(0, -x) for x in log_odds_of_right]))


def brier(log_odds_of_right: Sequence[float]) -> float:
    """Mean of (1 - p)^2 (Brier 1950); 0.25 is chance."""
    return float(np.mean([sigmoid(-x) ** 2 for x in log_odds_of_right]))


def calibration_error(reliability: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: |accuracy - confidence| of the bins, weighted by their pairs (Naeini et al. 2015)."""
    pairs = sum(row["n"] for row in reliability)
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in reliability) / pairs
