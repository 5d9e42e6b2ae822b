"""Labelers: noise that is calibrated, seeded and independent of other prompts; ties; agreement."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.labeling.base import Output, agreement, ranks_of
from rlhf.labeling.labelers import make_evaluation_labeler, make_labeler, stored_noise
from rlhf.labeling.reward_model_labeler import RewardModelLabeler
from rlhf.labeling.rubric import rubric_score
from rlhf.labeling.rubric_labeler import RubricLabeler, expected_agreement, noise_for_agreement
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_tokenizer, new_reward_model
from rlhf.rollout.scoring import scores
from rlhf.run.folder import RunFolder

PROMPT = Prompt.from_text("why does bread go stale faster in the fridge")
GOOD = Output("Bread dries out in the fridge.", True)  # rubric 1.0
YES = Output("Yes.", True)  # 0.6375
CUT = Output("The fridge is cold and", False)  # 0.525


@pytest.mark.parametrize(
    ("utilities", "margin", "ranks"),
    [
        ([0.2, 0.9, 0.5], 0.0, (3, 1, 2)),
        ([0.5, 0.5, 0.1], 0.0, (1, 1, 2)),
        # The group is measured from its best: 0.75 is within 0.25 of 1, 0.5 is not, and starts the next group.
        ([1.0, 0.75, 0.5, 0.25], 0.25, (1, 1, 2, 2)),
        ([], 0.1, ()),
    ],
)
def test_ranks_by_hand(utilities: list[float], margin: float, ranks: tuple[int, ...]) -> None:
    assert ranks_of(utilities, margin) == ranks


def test_agreement_counts_pairs_untied_in_both() -> None:
    # Pairs 01, 02, 12. First: 0 < 1 < 2; second: 0 and 1 tie, 2 is best: 02 and 12 are comparable, both reversed.
    assert agreement((1, 2, 3), (2, 2, 1)) == (0, 2)
    assert agreement((1, 2, 3), (1, 3, 2)) == (2, 3)
    assert agreement((1, 1), (1, 2)) == (0, 0)


def test_without_noise_the_rubric_decides() -> None:
    labeler = RubricLabeler()
    assert labeler.rank(PROMPT, [CUT, GOOD, YES], seed=1) == labeler.rank(PROMPT, [CUT, GOOD, YES], seed=2) == (3, 1, 2)
    assert (labeler.prefers(PROMPT, GOOD, YES, 0), labeler.prefers(PROMPT, YES, GOOD, 0)) == (1.0, 0.0)
    assert labeler.prefers(PROMPT, YES, YES, 0) == 0.5
    # 0.6375 - 0.525 = 0.1125
    assert RubricLabeler(tie_margin=0.12).prefers(PROMPT, YES, CUT, 0) == 0.5
    assert RubricLabeler(tie_margin=0.11).prefers(PROMPT, YES, CUT, 0) == 1.0


def test_noise_depends_on_seed_prompt_and_position_alone() -> None:
    labeler, other = RubricLabeler(noise_sigma=0.3), Prompt.from_text("another prompt")
    three = labeler.utilities(PROMPT, [GOOD, GOOD, GOOD], 5)
    assert len(set(three)) == 3
    assert labeler.utilities(PROMPT, [GOOD, GOOD, GOOD], 5) == three
    assert labeler.utilities(PROMPT, [GOOD, GOOD], 5) == three[:2]
    assert labeler.utilities(PROMPT, [GOOD, GOOD, GOOD], 6) != three
    noise = [u - 1.0 for u in three]
    base = rubric_score(other.text, GOOD.text, True)
    assert labeler.utilities(other, [GOOD, GOOD, GOOD], 5) != pytest.approx([base + n for n in noise])


def test_noise_has_the_deviation_asked_for() -> None:
    draws = np.array([RubricLabeler(0.3).utilities(PROMPT, [GOOD], seed)[0] - 1.0 for seed in range(4000)])
    # Standard errors: 0.3 / sqrt(4000) = 0.0047 for the mean, 0.3 / sqrt(8000) = 0.0034 for the deviation.
    assert abs(draws.mean()) < 0.02
    assert draws.std() == pytest.approx(0.3, abs=0.014)


def test_agreement_of_one_pair_by_hand() -> None:
    # sigma = 1 / sqrt(2) makes the deviation of the gap 1; p = Phi(1) = 0.841345, p^2 + (1 - p)^2 = 0.733033.
    assert expected_agreement([[0.0, 1.0]], math.sqrt(0.5)) == pytest.approx(0.733033, abs=1e-6)
    # The second pair has no gap and agrees half of the time.
    assert expected_agreement([[0.0, 1.0], [3.0, 3.0]], math.sqrt(0.5)) == pytest.approx((0.733033 + 0.5) / 2, abs=1e-6)
    assert expected_agreement([[0.0, 1.0], [3.0, 3.0]], 0.0) == 0.75
    # Margin 1: p = Phi(0) = 0.5, q = Phi(-2) = 0.022750; (p^2 + q^2) / (p + q)^2 = 0.250518 / 0.273268.
    assert expected_agreement([[0.0, 1.0]], math.sqrt(0.5), 1.0) == pytest.approx(0.250518 / 0.273268, abs=1e-5)
    # A pair inside the margin is tied without noise and leaves nothing to compare.
    assert math.isnan(expected_agreement([[0.0, 1.0]], 0.0, 2.0))


def test_noise_for_one_pair_by_hand() -> None:
    # 2 p^2 - 2 p + 1 = 0.73 gives p = (1 + sqrt(0.46)) / 2 = 0.839116; sigma = 1 / (sqrt(2) Phi^-1(p)).
    sigma = 1 / (math.sqrt(2) * NormalDist().inv_cdf((1 + math.sqrt(0.46)) / 2))
    assert noise_for_agreement([[0.0, 1.0]], 0.73) == pytest.approx(sigma, rel=1e-9)
    assert noise_for_agreement([[0.0, 0.1]], 0.73) == pytest.approx(sigma / 10, rel=1e-9)


def test_noise_is_zero_where_the_target_is_out_of_reach() -> None:
    assert noise_for_agreement([[0.0, 1.0], [3.0, 3.0]], 0.76) == 0.0  # 0.75 at best
    assert noise_for_agreement([[0.0, 1.0]], 1.0) == 0.0
    assert noise_for_agreement([[2.0, 2.0]], 0.73) == 0.0
    assert noise_for_agreement([], 0.73) == 0.0
    with pytest.raises(ValueError):
        noise_for_agreement([[0.0, 1.0]], 0.5)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_two_simulated_labelers_agree_as_calibrated(margin: float) -> None:
    """Label 40000 pairs with gaps like the rubric's twice, as a Monte Carlo estimate."""
    rng = np.random.default_rng(7)
    pairs = rng.choice([0.4, 0.525, 0.6375, 0.8, 0.875, 1.0], size=(40000, 2))
    sigma = noise_for_agreement(pairs.tolist(), 0.73, margin)
    heard = [(pairs + sigma * rng.standard_normal(pairs.shape)).tolist() for _ in range(2)]
    rankings = [[ranks_of(row, margin) for row in rows] for rows in heard]
    counts = np.array([agreement(a, b) for a, b in zip(*rankings, strict=True)]).sum(0)
    # The standard error is below sqrt(0.25 / 30000) = 0.003.
    assert counts[0] / counts[1] == pytest.approx(0.73, abs=0.01)


def test_reward_model_labeler_ranks_by_score(tiny_dir: str) -> None:
    torch.manual_seed(3)
    model = new_reward_model(tiny_dir, ModelSection(name="tiny")).eval()
    tokenizer = load_tokenizer(tiny_dir)
    outputs = [GOOD, YES, CUT, YES]
    ids = encode_prompt(tokenizer, PROMPT)
    one_by_one = [scores(model, [(ids, encode_response(tokenizer, *output))]).item() for output in outputs]
    best_first = sorted(set(one_by_one), reverse=True)
    assert len(best_first) == 3
    ranks = RewardModelLabeler(model, tokenizer).rank(PROMPT, outputs, 0)
    assert ranks == tuple(best_first.index(score) + 1 for score in one_by_one)
    assert RewardModelLabeler(model, tokenizer).prefers(PROMPT, YES, YES, 0) == 0.5


def test_the_judge_takes_the_noise_of_the_rank_stage(tmp_path) -> None:
    run, recipe = RunFolder(tmp_path), Recipe()
    assert stored_noise(run) == 0.0
    (tmp_path / "rank").mkdir()
    (tmp_path / "rank" / "summary.json").write_text(json.dumps({"noise_sigma": 0.125}))
    judge = make_evaluation_labeler(recipe, run)
    assert isinstance(judge, RubricLabeler)
    assert (judge.noise_sigma, judge.tie_margin) == (0.125, recipe.rank.tie_margin)
    assert make_labeler("rubric", recipe, run, 0.5).noise_sigma == 0.5


@pytest.mark.parametrize("name", ["human", "file"])
def test_labelers_that_rank_nothing_here_are_refused(tmp_path, name: str) -> None:
    with pytest.raises(UserError, match="data.rankings"):
        make_labeler(name, Recipe(), RunFolder(tmp_path))
