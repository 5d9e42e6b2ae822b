"""Pairwise wins against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rlhf.config import Recipe
from rlhf.evaluation.heldout import HeldOut
from rlhf.evaluation.results import Answers
from rlhf.evaluation.win_rate import pairwise_wins
from stages import evaluate


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


def test_a_pair_is_asked_in_both_orders_with_seeds_of_their_own() -> None:
    labeler = Rule(longer)
    wins = list(pairwise_wins(labeler, *SIDES, seed=3))
    assert wins == [[1.0, 0.5], [0.0, 0.5]]
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


def test_refuses_sides_of_different_shape() -> None:
    with pytest.raises(ValueError):
        list(pairwise_wins(Rule(longer), ["p"], [["x", "y"]], [["z"]]))
    with pytest.raises(ValueError):
        list(pairwise_wins(Rule(longer), ["p", "q"], [["x"]], [["z"]]))


def test_only_the_prompts_whose_wins_are_taken_are_asked() -> None:
    labeler = Rule(longer)
    wins = pairwise_wins(labeler, ["p", "q", "r", "s"], [["long"]] * 4, [["no"]] * 4)
    assert [next(wins), next(wins)] == [[1.0], [1.0]]
    assert {prompt for prompt, *_ in labeler.asked} == {"p", "q"}


def test_a_stop_ends_the_stages_comparison_between_two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler, rollout = Rule(lambda a, b: 1.0), SimpleNamespace(finished=torch.ones(4, dtype=torch.bool))
    monkeypatch.setattr(evaluate, "make_evaluation_labeler", lambda recipe, run: labeler)

    class Context:
        recipe = Recipe.model_validate({"evaluate": {"samples_per_prompt": 1, "judgements": 1}})
        run = None
        stop_requested = property(lambda self: len(labeler.asked) >= 4)  # two prompts in both orders

    answers = {name: Answers(rollout, ["text"] * 4) for name in ("sft", "ppo", "ppo-ptx")}
    found = evaluate.compare_all(Context(), HeldOut(["p", "q", "r", "s"], [[1]] * 4, [0] * 4), answers)
    assert [(pair.a, pair.b, pair.wins) for pair in found] == [("ppo", "sft", [[0.5], [0.5]])]
