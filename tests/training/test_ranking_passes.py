"""Passes of bounded size: loss and gradient of a batch are those of all its pairs in one graph, whatever the budget."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf.config import Recipe
from rlhf.training.engine import LocalEngine, ParamGroup
from rlhf.training.ranking_passes import Group, ScoringModule, by_length, random_outputs, whole_passes
from stages.reward import step as reward_step

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_labels": 1, "vocab_size": 200}
CONFIG = LlamaConfig(**SIZES, pad_token_id=0, initializer_range=0.2)


def rankings(ks: list[int], seed: int = 0) -> list[Group]:
    """Prompts with so many outputs each, ranks with ties, but never all tied."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 200) for _ in range(rng.randint(low, high))]

    made = []
    for k in ks:
        prompt, ranks = tokens(1, 9), [1, 2] + [rng.randint(1, k) for _ in range(k - 2)]
        rng.shuffle(ranks)
        made.append(Group([(prompt, tokens(1, 12)) for _ in ranks], tuple(ranks)))
    return made


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return LlamaForSequenceClassification(CONFIG).eval()


def engine_of(model: nn.Module, shares: bool) -> LocalEngine:
    scored = ScoringModule(model)
    assert scored.shares
    scored.shares = shares
    return LocalEngine(scored, [ParamGroup("reward", model, 1e-3, 1.0)], torch.device("cpu"))


def stepped(engine: LocalEngine, groups: list[Group], tokens: int, ties: str) -> tuple[Tensor, float, list[tuple]]:
    recipe = Recipe.model_validate({"reward": {"micro_tokens": tokens, "ties": ties}})
    loss, counts = reward_step(engine, groups, recipe, 0)
    flat = torch.cat([g.flatten() for g in engine.grads("reward")]).clone()
    engine.adamw.zero_grad(set_to_none=True)
    return flat, loss, sorted((c.pairs, round(c.correct, 3)) for c in counts)


def brute(model: nn.Module, groups: list[Group], ties: str) -> tuple[Tensor, float]:
    """Every pair of every prompt by itself, two forwards each of a row alone, all in one graph."""

    def score(pair: tuple) -> Tensor:
        return model.score(model.model(torch.tensor([[*pair[0], *pair[1]]]))[0][0, -1])[0]

    total = torch.zeros(())
    for group in groups:
        losses = []
        for i, one in enumerate(group.pairs):
            for j, other in enumerate(group.pairs[:i]):
                sign = (group.ranks[i] < group.ranks[j]) - (group.ranks[i] > group.ranks[j])
                if sign == 0 and ties == "drop":
                    continue
                margin = score(one) - score(other)
                losses.append(-logsigmoid(sign * margin) if sign else -0.5 * (logsigmoid(margin) + logsigmoid(-margin)))
        total = total + torch.stack(losses).mean() / len(groups)
    total.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    model.zero_grad(set_to_none=True)
    return flat, total.item()


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("shares", [True, False])
def test_any_budget_gives_the_loss_and_gradient_of_all_pairs(model: nn.Module, ties: str, shares: bool) -> None:
    groups = rankings([2, 5, 3, 4])
    expected, loss = brute(model, groups, ties)
    engine = engine_of(model, shares)
    for tokens in (16, 30, 70, 150, 10_000):
        gradient, found, _ = stepped(engine, groups, tokens, ties)
        assert found == pytest.approx(loss, rel=1e-5)
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("k", range(2, 17))
def test_two_rounds_are_one_for_every_k(model: nn.Module, k: int, ties: str) -> None:
    groups = rankings([k, k], seed=k)
    engine = engine_of(model, True)
    gradient, loss, counts = stepped(engine, groups, 10_000, ties)
    parted, found, found_counts = stepped(engine, groups, 21, ties)  # one output of the longest
    assert not groups[0].fits_one_pass(21) or k == 2
    assert found == pytest.approx(loss, rel=1e-6) and found_counts == counts
    # float32 sums in another order: up to 1.0009e-6 of the norm was seen, on one kind of CPU.
    assert float((parted - gradient).norm()) < 3e-6 * max(1.0, float(gradient.norm()))


def test_one_prompt_over_the_budget_does_not_disturb_the_others(model: nn.Module) -> None:
    groups = rankings([2, 2, 16, 3], seed=9)
    assert [g.fits_one_pass(80) for g in groups] == [True, True, False, True]
    engine = engine_of(model, True)
    gradient, loss, counts = stepped(engine, groups, 10_000, "drop")
    mixed, found, found_counts = stepped(engine, groups, 80, "drop")
    assert found == pytest.approx(loss, rel=1e-6) and found_counts == counts
    assert float((mixed - gradient).norm() / gradient.norm()) < 1e-6


def test_no_pass_is_over_the_budget(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, sizes = rankings([2, 9, 16, 4, 3, 16, 2], seed=4), []
    engine = engine_of(model, False)
    build = ScoringModule.build

    def noted(self: ScoringModule, pairs: list, pad_id: int) -> object:
        sizes.append(len(pairs) * max(len(p) + len(r) for p, r in pairs))
        return build(self, pairs, pad_id)

    monkeypatch.setattr(ScoringModule, "build", noted)
    stepped(engine, groups, 60, "drop")
    assert max(sizes) <= 60 and len(sizes) > 10


def test_prompts_of_like_length_fill_a_pass_by_hand() -> None:
    def group(k: int, length: int) -> Group:
        return Group([([5], [6] * (length - 1))] * k, tuple(range(k)))

    groups = [group(2, 10), group(3, 4), group(2, 5), group(4, 9)]
    passes = whole_passes(by_length(groups), 40)
    # 3 x 4 and 2 x 5: 5 rows of 5 are 25; with 4 rows of 9, 81 are too many; nor do 36 and 2 rows of 10 fit together.
    assert [[len(g.pairs) for g in p.groups] for p in passes] == [[3, 2], [4], [2]]
    assert math.prod(len(p.pairs) for p in passes) == 5 * 4 * 2


def test_the_scale_is_measured_on_whole_prompts() -> None:
    """Chosen first in every row, as in files of pairs: a stride over outputs would take the chosen ones only."""
    groups = [Group([([1], [10 * i]), ([1], [10 * i + 1])], (1, 2)) for i in range(8)]
    drawn = [response[0] for _, response in random_outputs(groups, 8, seed=1)]
    assert len(drawn) == len(set(drawn)) == 8
    assert sorted(value % 10 for value in drawn) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(random_outputs(groups, 100, seed=1)) == 16
