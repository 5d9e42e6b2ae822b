"""The ranking objective against explicit loops over pairs, finite differences and TRL's RewardTrainer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from rlhf.functional import ranking
from rlhf.functional.statistics import bootstrap_interval
from rlhf.rollout.batches import build_batch
from rlhf.rollout.scoring import raw_scores

# K = 4 with a tie, K = 2, K = 3 without ties, K = 3 with two tied, K = 2 all tied, K = 5
RANKS = [[2, 1, 2, 3], [1, 2], [3, 1, 2], [1, 1, 2], [1, 1], [4, 2, 2, 1, 4]]


def random_scores(seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(-3, 3) for _ in range(sum(len(group) for group in RANKS))]


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def brute(scores: Sequence[float], ranks: Sequence[Sequence[int]], ties: str) -> tuple[float, int]:
    """The loss by a loop over prompts and pairs in plain Python."""
    total, prompts, start = 0.0, 0, 0
    for group in ranks:
        r = scores[start : start + len(group)]
        start += len(group)
        losses = []
        for i in range(len(group)):
            for j in range(i):
                if group[i] == group[j]:
                    if ties == "half":
                        losses.append(0.5 * minus_log_sigmoid(r[i] - r[j]) + 0.5 * minus_log_sigmoid(r[j] - r[i]))
                elif group[i] < group[j]:
                    losses.append(minus_log_sigmoid(r[i] - r[j]))
                else:
                    losses.append(minus_log_sigmoid(r[j] - r[i]))
        if losses:
            total += sum(losses) / len(losses)
            prompts += 1
    return total, prompts


def test_pairs_by_hand() -> None:
    ranks = [2, 1, 2, 3]  # the second is best, the first and third tie, the fourth is worst
    assert sorted(ranking.ordered_pairs(ranks)) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert ranking.tied_pairs(ranks) == [(0, 2)]
    assert ranking.tied_pairs([7, 7, 7]) == [(0, 1), (0, 2), (1, 2)]
    assert ranking.ordered_pairs([7, 7, 7]) == [] and ranking.tied_pairs([1, 2, 3]) == []


@pytest.mark.parametrize(
    ("ranks", "drop", "half"), [([1, 2], True, True), ([1, 1], False, True), ([1], False, False), ([], False, False)]
)
def test_has_pairs(ranks: list[int], drop: bool, half: bool) -> None:
    assert ranking.has_pairs(ranks, "drop") is drop
    assert ranking.has_pairs(ranks, "half") is half


def test_loss_of_four_outputs_with_a_tie_by_hand() -> None:
    # Scores 0, ln 3, 0, -ln 3 for ranks 2, 1, 2, 3. Margins of the five ordered pairs: 1>2 and 1>2': ln 3, 2>3 and
    # 2'>3: ln 3, 1>3: 2 ln 3. -log sigmoid(ln 3) = ln(4/3), -log sigmoid(2 ln 3) = ln(10/9).
    ln3 = math.log(3)
    scores, ranks = torch.tensor([0.0, ln3, 0.0, -ln3]), [[2, 1, 2, 3]]
    ordered = 4 * math.log(4 / 3) + math.log(10 / 9)
    got = ranking.ranking_loss(scores, ranks)
    assert float(got.loss) == pytest.approx(ordered / 5, rel=1e-6) and got.prompts == 1
    # The tied pair has margin 0 and costs ln 2; it counts in the mean.
    got = ranking.ranking_loss(scores, ranks, "half")
    assert float(got.loss) == pytest.approx((ordered + math.log(2)) / 6, rel=1e-6) and got.prompts == 1


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_loss_is_the_pair_loop(ties: ranking.TieHandling) -> None:
    scores = random_scores()
    got = ranking.ranking_loss(torch.tensor(scores), RANKS, ties)
    loss, prompts = brute(scores, RANKS, ties)
    assert got.loss.item() == pytest.approx(loss, rel=1e-5)
    assert got.prompts == prompts == (5 if ties == "drop" else 6)


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_gradient_is_that_of_finite_differences(ties: ranking.TieHandling) -> None:
    numbers, h = random_scores(1), 1e-5
    scores = torch.tensor(numbers, requires_grad=True)
    ranking.ranking_loss(scores, RANKS, ties).loss.backward()
    for i, slope in enumerate(scores.grad.tolist()):
        up, down = ([x + s * h * (k == i) for k, x in enumerate(numbers)] for s in (1, -1))
        expected = (brute(up, RANKS, ties)[0] - brute(down, RANKS, ties)[0]) / (2 * h)
        assert slope == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_a_prompt_weighs_the_same_whatever_its_k(k: int) -> None:
    # Equal scores: every pair costs ln 2, and so does the prompt, with 1 pair or with 36.
    assert float(ranking.ranking_loss(torch.zeros(k), [list(range(k))]).loss) == pytest.approx(math.log(2))
    both = ranking.ranking_loss(torch.zeros(k + 2), [list(range(k)), [2, 1]])
    assert float(both.loss) == pytest.approx(2 * math.log(2)) and both.prompts == 2


def test_an_all_tied_prompt_contributes_nothing_when_ties_are_dropped() -> None:
    scores = torch.tensor([5.0, -3.0, 1.0, 0.0], requires_grad=True)
    got = ranking.ranking_loss(scores, [[1, 1], [1, 2]], "drop")
    assert got.prompts == 1 and got.loss.item() == pytest.approx(minus_log_sigmoid(1.0), rel=1e-6)
    got.loss.backward()
    assert scores.grad.tolist()[:2] == [0.0, 0.0] and scores.grad[2] < 0 < scores.grad[3]
    alone = ranking.ranking_loss(scores, [[1, 1], [3, 3]], "drop")
    assert float(alone.loss) == 0.0 and alone.prompts == 0


def test_half_pulls_tied_scores_together() -> None:
    scores = torch.tensor([2.0, 0.0], requires_grad=True)
    ranking.ranking_loss(scores, [[1, 1]], "half").loss.backward()
    # d/dm of -0.5 (log s(m) + log s(-m)) is s(m) - 0.5, and s(2) = 0.8807970780
    assert scores.grad.tolist() == pytest.approx([0.380797, -0.380797], abs=1e-5)


def test_only_order_and_equality_of_ranks_matter() -> None:
    scores = torch.tensor(random_scores(2)[:4])
    one, other = ranking.ranking_loss(scores, [[1, 2, 2, 3]]), ranking.ranking_loss(scores, [[-7, 40, 40, 1000]])
    assert float(one.loss) == float(other.loss)


def test_margins_are_taken_in_float32() -> None:
    # In bfloat16 256 - 0.5 is 256.
    got = ranking.ranking_loss(torch.tensor([0.5, 256.0], dtype=torch.bfloat16), [[1, 2]])
    assert got.loss.dtype == torch.float32 and float(got.loss) == 255.5


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1)])
def test_a_wrong_number_of_scores_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scores for 4 ranks"):
        ranking.ranking_loss(torch.zeros(shape), [[1, 2], [2, 1]])


# --- measures ---------------------------------------------------------------------------------------------------------


def test_count_pairs_by_hand() -> None:
    # ranks 1, 2, 2, 3 and scores 1, 1, 3, 0: 1>2 equal (half), 1>2' wrong, 1>3, 2>3 and 2'>3 right.
    counts = ranking.count_pairs([1.0, 1.0, 3.0, 0.0], [1, 2, 2, 3])
    assert counts.correct == 3.5 and counts.pairs == 5
    assert sorted(counts.margins) == [-2.0, 0.0, 1.0, 1.0, 3.0]
    assert ranking.count_pairs([0.0, 0.0, 0.0], [1, 2, 3]).correct == 1.5
    assert ranking.count_pairs([0.0, 1.0, 2.0], [1, 2, 3]).correct == 0.0


def one(correct: float, pairs: int) -> ranking.PairCounts:
    return ranking.PairCounts(correct, pairs, [])


def test_accuracy_is_over_pairs_and_its_interval_over_prompts() -> None:
    assert ranking.accuracy_interval([one(1, 1), one(0, 3)])[0] == 0.25
    assert all(math.isnan(x) for x in (*ranking.accuracy_interval([one(0, 0)] * 3), *ranking.accuracy_interval([])))
    counts = [one(i % 4, 3) for i in range(20)]
    for seed, resamples in ((0, 2000), (4, 31)):
        expected = bootstrap_interval([i % 4 for i in range(20)], [3] * 20, seed, resamples)
        assert ranking.accuracy_interval(counts, seed, resamples) == expected
    assert ranking.accuracy_interval(counts) == ranking.accuracy_interval(counts, 0, 2000)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_calibration_by_hand() -> None:
    # By size: 0 (half right), 0.5 (right), 0.8 (right) | 2 (right), -3 (wrong): five in two bins are three and two.
    rows = ranking.calibration([2.0, 0.8, 0.5, -3.0, 0.0], bins=2)
    assert [row["n"] for row in rows] == [3, 2]
    assert [row["accuracy"] for row in rows] == pytest.approx([2.5 / 3, 1 / 2])
    expected = [(0.5 + sigmoid(0.5) + sigmoid(0.8)) / 3, (sigmoid(2.0) + sigmoid(3.0)) / 2]
    assert [row["confidence"] for row in rows] == pytest.approx(expected)


def test_calibration_has_five_bins_and_leaves_empty_ones_out() -> None:
    assert [row["n"] for row in ranking.calibration([1.0] * 10)] == [2] * 5
    assert [row["n"] for row in ranking.calibration([1.0, -2.0])] == [1, 1]
    assert ranking.calibration([]) == []


# --- TRL --------------------------------------------------------------------------------------------------------------


def test_k_of_two_is_the_loss_of_trls_reward_trainer(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Loss and gradient of the real RewardTrainer.compute_loss on a batch of pairs of different lengths."""
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_labels": 1, "vocab_size": len(tiny_tokenizer)}
    ids = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, **ids, initializer_range=0.3)
    model = LlamaForSequenceClassification(config).eval()
    rng = random.Random(4)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(10, 1000) for _ in range(rng.randint(low, high))]

    rows = [(tokens(1, 6), tokens(1, 9), tokens(1, 9)) for _ in range(6)]
    dataset = Dataset.from_list([{"chosen_ids": x + best, "rejected_ids": x + worst} for x, best, worst in rows])
    options = {"use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False}
    args = RewardConfig(output_dir=str(tmp_path), **options)
    trainer = RewardTrainer(model=model, args=args, train_dataset=dataset, processing_class=tiny_tokenizer)

    def gradient() -> torch.Tensor:
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return flat

    model.eval()
    theirs = trainer.compute_loss(model, trainer.data_collator([dict(row) for row in dataset]))
    theirs.backward()
    their_gradient = gradient()
    # Loser first in every other group: the ranks say who won, not the place.
    pairs, ranks = [], []
    for i, (x, best, worst) in enumerate(rows):
        pairs += [(x, worst), (x, best)] if i % 2 else [(x, best), (x, worst)]
        ranks.append([2, 1] if i % 2 else [1, 2])
    got = ranking.ranking_loss(raw_scores(model, build_batch(pairs, tiny_tokenizer.pad_token_id)), ranks)
    ours = got.loss / got.prompts
    ours.backward()
    our_gradient = gradient()
    assert theirs.item() > 0.05, "a vanishing loss would compare nothing"
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert float((our_gradient - their_gradient).norm() / their_gradient.norm()) < 1e-5
