"""Label probabilities, both orders, rankings and calibration against values worked by hand."""

from __future__ import annotations

import math

import pytest

from rlhf.functional import judge_odds
from rlhf.labeling.base import ranks_of


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_labels_are_compared_among_themselves() -> None:
    # 0.03 and 0.01 of all next tokens: 3 to 1.
    assert judge_odds.normalise_labels(logs(0.03, 0.01)) == pytest.approx(logs(0.75, 0.25))
    assert judge_odds.log_odds(logs(0.03, 0.01)) == pytest.approx(math.log(3))
    assert judge_odds.log_odds(logs(0.01, 0.03)) == pytest.approx(-math.log(3))
    assert sum(map(math.exp, judge_odds.normalise_labels([-800.0, -801.0, -900.0]))) == pytest.approx(1)


def test_what_the_order_adds_cancels() -> None:
    # a is better by 0.5, the first gets 2 on top: (a, b) gives 2.5 for a, (b, a) gives 1.5 for b.
    pair = judge_odds.BothOrders(ab=2.5, ba=1.5)
    assert (pair.preference, pair.shift) == (0.5, 2.0)
    assert pair.flips  # the first wins both times
    # Without bias the two orders are each other's negative.
    assert (judge_odds.BothOrders(0.7, -0.7).preference, judge_odds.BothOrders(0.7, -0.7).shift) == (0.7, 0.0)


@pytest.mark.parametrize(
    ("ab", "ba", "flips"),
    [(1, -2, False), (-1, 2, False), (1, 2, True), (-1, -2, True), (0, 0, False), (0, 1, True), (1, 0, True)],
)
def test_flips(ab: float, ba: float, flips: bool) -> None:
    assert judge_odds.BothOrders(ab, ba).flips is flips


def test_points_by_hand() -> None:
    # 0.2 x 1 + 0.3 x 2 + 0.5 x 3 = 2.3, for any share of the labels in all tokens.
    assert judge_odds.expected_points(logs(0.02, 0.03, 0.05)) == pytest.approx(2.3)


def test_a_win_on_points_by_hand() -> None:
    a, b = logs(0.2, 0.3, 0.5), logs(0.1, 0.6, 0.3)
    # a above b: 0.3 x 0.1 + 0.5 x (0.1 + 0.6) = 0.38; equal: 0.02 + 0.18 + 0.15 = 0.35; 0.38 + 0.175 = 0.555.
    assert judge_odds.sigmoid(judge_odds.win_log_odds(a, b)) == pytest.approx(0.555)
    assert judge_odds.win_log_odds(b, a) == pytest.approx(-judge_odds.win_log_odds(a, b))
    assert judge_odds.win_log_odds(a, a) == pytest.approx(0, abs=1e-12)
    # Two labels: p (1 - q) + half of the ties p q + (1 - p) (1 - q): 0.9 x 0.8 + (0.18 + 0.08) / 2 = 0.85.
    assert judge_odds.sigmoid(judge_odds.win_log_odds(logs(0.1, 0.9), logs(0.8, 0.2))) == pytest.approx(0.85)


def test_a_ranking_from_pair_probabilities_by_hand() -> None:
    p = {(0, 1): 0.9, (0, 2): 0.6, (0, 3): 0.3, (1, 2): 0.2, (1, 3): 0.2, (2, 3): 0.5}
    odds = [[0.0] * 4 for _ in range(4)]
    for (i, j), share in p.items():
        odds[i][j], odds[j][i] = logit(share), -logit(share)
    wins = judge_odds.mean_wins(odds)
    # 0: (0.9 + 0.6 + 0.3) / 3; 1: (0.1 + 0.2 + 0.2) / 3; 2: (0.4 + 0.8 + 0.5) / 3; 3: (0.7 + 0.8 + 0.5) / 3.
    assert wins == pytest.approx([0.6, 0.5 / 3, 1.7 / 3, 2.0 / 3])
    assert ranks_of(wins, 0.0) == (2, 4, 3, 1)
    # 0.667 - 0.6 = 0.067 is within 0.07, 0.667 - 0.567 = 0.1 is not.
    assert ranks_of(wins, 0.07) == (1, 3, 2, 1)
    assert judge_odds.mean_wins([[0, logit(0.8)], [-logit(0.8), 0]]) == pytest.approx([0.8, 0.2])


def test_contextual_calibration_by_hand() -> None:
    # Without content the model says A with (0.8 + 0.6) / 2 = 0.7; 0.7 / 0.7 against 0.3 / 0.3 is even.
    free = [logs(0.8, 0.2), logs(0.06, 0.04)]
    assert judge_odds.calibrated(logs(0.7, 0.3), free) == pytest.approx(logs(0.5, 0.5))
    # 0.5 / 0.7 against 0.5 / 0.3: 3 to 7.
    assert judge_odds.calibrated(logs(0.5, 0.5), free) == pytest.approx(logs(0.3, 0.7))


def test_scores_of_probabilities_by_hand() -> None:
    odds = [logit(0.8), logit(0.4)]
    assert judge_odds.log_loss(odds) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert judge_odds.brier(odds) == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert (judge_odds.log_loss([0.0]), judge_odds.brier([0.0])) == (pytest.approx(math.log(2)), 0.25)
    assert judge_odds.log_loss([-1000.0]) == 1000.0 and judge_odds.brier([-1000.0]) == 1.0
    rows = [{"confidence": 0.6, "accuracy": 0.5, "n": 30}, {"confidence": 0.9, "accuracy": 1.0, "n": 10}]
    assert judge_odds.calibration_error(rows) == pytest.approx((30 * 0.1 + 10 * 0.1) / 40)
