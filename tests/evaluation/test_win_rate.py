"""Wins of pairs of outputs by a labeler: both orders, several judgements, and where it stops."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.evaluation.win_rate import pairwise_wins


class Rule:
    """A labeler that decides by a function of the two outputs (plain strings here); it notes what it was asked."""

    def __init__(self, decide: Callable[[str, str], float]) -> None:
        self.decide = decide
        self.asked: list[tuple[str, str, str, int]] = []

    def prefers(self, prompt: str, a: str, b: str, order_seed: int) -> float:
        self.asked.append((prompt, a, b, order_seed))
        return self.decide(a, b)


def longer(a: str, b: str) -> float:
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def test_compare_asks_both_orders_with_seeds_of_their_own() -> None:
    labeler = Rule(longer)
    wins = pairwise_wins(labeler, ["p", "q"], [["aaa", "a"], ["a", "aa"]], [["b", "b"], ["bb", "bb"]], seed=3)
    assert wins == [[1.0, 0.5], [0.0, 0.5]]
    assert [(p, a, b) for p, a, b, _ in labeler.asked[:2]] == [("p", "aaa", "b"), ("p", "b", "aaa")]
    assert len({seed for *_, seed in labeler.asked}) == 8
    again = Rule(longer)
    pairwise_wins(again, ["p", "q"], [["aaa", "a"], ["a", "aa"]], [["b", "b"], ["bb", "bb"]], seed=3)
    assert again.asked == labeler.asked


def test_a_labeler_that_likes_the_first_output_gives_a_half() -> None:
    assert pairwise_wins(Rule(lambda a, b: 1.0), ["p"], [["x"]], [["y"]]) == [[0.5]]
    # First order: a wins; second order: a tie. (1 + 0.5) / 2.
    assert pairwise_wins(Rule(lambda a, b: 1.0 if a == "x" else 0.5), ["p"], [["x"]], [["y"]]) == [[0.75]]


def test_judgements_average_over_labelers_who_may_disagree() -> None:
    answers = iter([1.0, 0.0, 1.0, 1.0, 0.0, 0.5])
    labeler = Rule(lambda a, b: next(answers))
    # Three labelers, (x, y) then (y, x): 1 and 1-0, 1 and 1-1, 0 and 1-0.5; the mean of 1, 1, 1, 0, 0, 0.5 is 3.5 / 6.
    assert pairwise_wins(labeler, ["p"], [["x"]], [["y"]], judgements=3) == [[pytest.approx(3.5 / 6)]]
    assert [(a, b) for _, a, b, _ in labeler.asked] == [("x", "y"), ("y", "x")] * 3
    assert len({seed for *_, seed in labeler.asked}) == 6


def test_compare_refuses_sides_of_different_shape() -> None:
    with pytest.raises(ValueError):
        pairwise_wins(Rule(longer), ["p"], [["x", "y"]], [["z"]])
    with pytest.raises(ValueError):
        pairwise_wins(Rule(longer), ["p", "q"], [["x"]], [["z"]])


def test_what_follows_a_stop_is_left_out() -> None:
    class Longer:
        def prefers(self, prompt: str, a: str, b: str, order_seed: int) -> float:
            return float(len(a) > len(b))

    prompts, done = ["p", "q", "r", "s"], list[int]()
    wins = pairwise_wins(
        Longer(), prompts, [["long"]] * 4, [["no"]] * 4, advance=done.append, stop=lambda: len(done) == 2
    )
    assert wins == [[1.0], [1.0]]
