"""Pairwise wins and evaluation statistics against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.evaluation.win_rate import pairwise_wins
from rlhf.functional.statistics import (
    distinct_n,
    length_matched_win_rate,
    length_statistics,
    prompt_means,
    wilson_interval,
    win_rate,
)


class Rule:
    """A labeler that decides by a function of the two outputs (plain strings here) and records its questions."""

    def __init__(self, decide: Callable[[str, str], float]) -> None:
        self.decide = decide
        self.asked: list[tuple[str, str, str, int]] = []

    def prefers(self, prompt: str, a: str, b: str, order_seed: int) -> float:
        self.asked.append((prompt, a, b, order_seed))
        return self.decide(a, b)


SIDES = ["p", "q"], [["aaa", "a"], ["a", "aa"]], [["b", "b"], ["bb", "bb"]]


def longer(a: str, b: str) -> float:
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def test_compare_asks_both_orders_with_seeds_of_their_own() -> None:
    labeler = Rule(longer)
    wins = list(pairwise_wins(labeler, *SIDES, seed=3))
    assert wins == [[1.0, 0.5], [0.0, 0.5]]
    assert prompt_means(wins) == [0.75, 0.25]
    assert [(p, a, b) for p, a, b, _ in labeler.asked[:2]] == [("p", "aaa", "b"), ("p", "b", "aaa")]
    assert len({seed for *_, seed in labeler.asked}) == 8
    again = Rule(longer)
    list(pairwise_wins(again, *SIDES, seed=3))
    assert again.asked == labeler.asked


def test_a_labeler_that_likes_the_first_output_gives_a_half() -> None:
    assert list(pairwise_wins(Rule(lambda a, b: 1.0), ["p"], [["x"]], [["y"]])) == [[0.5]]
    # First order: a wins; second order: a tie. (1 + 0.5) / 2.
    wins = pairwise_wins(Rule(lambda a, b: 1.0 if a == "x" else 0.5), ["p"], [["x"]], [["y"]])
    assert list(wins) == [[0.75]]


def test_judgements_average_over_labelers_who_may_disagree() -> None:
    answers = iter([1.0, 0.0, 1.0, 1.0, 0.0, 0.5])
    labeler = Rule(lambda a, b: next(answers))
    # Three labelers, (x, y) then (y, x): 1 and 1-0, 1 and 1-1, 0 and 1-0.5; the mean of 1, 1, 1, 0, 0, 0.5 is 3.5 / 6.
    assert list(pairwise_wins(labeler, ["p"], [["x"]], [["y"]], judgements=3)) == [[pytest.approx(3.5 / 6)]]
    assert [(a, b) for _, a, b, _ in labeler.asked] == [("x", "y"), ("y", "x")] * 3
    assert len({seed for *_, seed in labeler.asked}) == 6


def test_compare_refuses_sides_of_different_shape() -> None:
    with pytest.raises(ValueError):
        list(pairwise_wins(Rule(longer), ["p"], [["x", "y"]], [["z"]]))
    with pytest.raises(ValueError):
        list(pairwise_wins(Rule(longer), ["p", "q"], [["x"]], [["z"]]))


def test_win_rate_interval() -> None:
    # All alike: Wilson for 3 of 3 with z = 1.96, z^2 = 3.8415: low = 3 / (3 + 3.8415) = 0.4385.
    assert win_rate([1, 1, 1]) == pytest.approx((1, 0.4385, 1), abs=1e-4)
    # One tie: centre 1/2, half width 1.96 / (1 + 3.8415) * sqrt(1/4 + 3.8415 / 4) = 0.4454.
    assert win_rate([0.5]) == pytest.approx((0.5, 0.0546, 0.9454), abs=1e-4)
    # Two prompts: resampled means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4, so the 2.5 % points are 0 and 1.
    assert win_rate([0, 1], resamples=500) == (0.5, 0, 1)
    # 400 prompts, half won: the standard error is 0.5 / 20 = 0.025, the interval 0.5 +- 0.049.
    rate = win_rate([0, 1] * 200, resamples=4000)
    assert rate.mean == 0.5
    assert rate.low == pytest.approx(0.451, abs=0.005)
    assert rate.high == pytest.approx(0.549, abs=0.005)
    assert win_rate([0, 1] * 20, seed=1) == win_rate([0, 1] * 20, seed=1)
    # Ties carry no spread. 100 prompts, 40 won, 60 tied: mean 0.7, std sqrt(.4 * .6) / 2 = 0.245, its error 0.0245.
    tied = win_rate([1] * 40 + [0.5] * 60, resamples=4000)
    assert tied.mean == pytest.approx(0.7)
    assert tied.high - tied.low == pytest.approx(2 * 1.96 * 0.0245, abs=0.008)
    with pytest.raises(ValueError):
        win_rate([])


def test_length_matched_win_rate() -> None:
    wins = [[1.0, 0.0], [1.0, 0.5], [0.0, 0.0]]
    # |10 - 8| = 2 <= 0.2 * 10 stays, 10 against 7 goes; 5 against 5 and 0.2 * 6 = 1.2 >= 1 stay; 1 against 9 goes.
    rate, n = length_matched_win_rate(wins, [[10, 10], [5, 6], [1, 1]], [[8, 7], [5, 5], [9, 9]])
    assert n == 3
    assert rate is not None
    assert rate.mean == pytest.approx((1.0 + 0.75) / 2)  # the first prompt keeps its win, the second (1 + 0.5) / 2
    assert length_matched_win_rate([[1.0]], [[10]], [[2]]) == (None, 0)


def test_wilson_interval() -> None:
    # z = 1.96: 8 of 10 is (0.8 + 0.19207) / 1.38415 +- ...; the published interval is (0.4902, 0.9433).
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)
    # k = 0: the upper end is z^2 / (n + z^2) = 3.8415 / 13.8415.
    assert wilson_interval(0, 10) == pytest.approx((0, 0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((1, 0.72247, 1), abs=1e-5)
    for k, n in [(0, 0), (-1, 3), (4, 3)]:
        with pytest.raises(ValueError):
            wilson_interval(k, n)


def test_distinct_n() -> None:
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a b", "a b"], 2) == 1 / 2  # n-grams do not span texts
    assert distinct_n(["a", ""], 2) == 0.0


def test_length_statistics() -> None:
    assert length_statistics(range(1, 12)) == {"mean": 6, "p10": 2, "median": 6, "p90": 10}
    with pytest.raises(ValueError):
        length_statistics([])


def test_only_the_prompts_whose_wins_are_taken_are_asked() -> None:
    labeler = Rule(longer)
    wins = pairwise_wins(labeler, ["p", "q", "r", "s"], [["long"]] * 4, [["no"]] * 4)
    assert [next(wins), next(wins)] == [[1.0], [1.0]]
    assert {prompt for prompt, *_ in labeler.asked} == {"p", "q"}
