"""One gradient however a minibatch is cut: every objective, and the pieces of PPO-ptx, on real models."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase, TrainerCallback

from rlhf.config import Recipe, TrackingSection
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rollout.experience import Experience
from rlhf.run.checkpoints import Checkpoints
from rlhf.run.tracking import Tracker
from rlhf.training.engine import LocalEngine, ParamGroup
from rlhf.training.ppo_state import Ppo
from rlhf.training.ranking_passes import Group, ScoringModule
from rlhf.training.sft_trainer import Reporter, build_trainer
from stages.ppo import advantages, ppo_step, ptx_step, rollout, score
from stages.reward import step as reward_step
from support import ppo_runs
from support.ppo_runs import ALL, BOTH, CLIP, TEMPERATURE, VALUE_CLIP, make_ppo, network, tokens, with_ppo

SPLITS = [1, 2, 4]  # micro-batch sizes held against one forward of all eight


@pytest.fixture
def ppo(tiny_tokenizer: PreTrainedTokenizerBase) -> Ppo:
    policy = network(LlamaForCausalLM, tiny_tokenizer)
    return make_ppo(policy, network(LlamaForCausalLM, tiny_tokenizer).requires_grad_(False).eval(), tiny_tokenizer)


def moved(ppo: Ppo) -> Experience:
    """Episodes of the policy, as if it had changed since: ratios and values on both sides of their clips."""
    experience = advantages(ppo, score(ppo, rollout(ppo)))
    lengths = experience.mask.sum(1).tolist()
    assert len(set(lengths)) > 3 and 0 < int(experience.finished.sum()) < ppo_runs.EPISODES, lengths
    generator = torch.Generator().manual_seed(7)

    def noise(size: float) -> Tensor:
        return torch.where(experience.mask, torch.randn(experience.mask.shape, generator=generator) * size, 0.0)

    return dataclasses.replace(
        experience, logprobs=experience.logprobs + noise(0.3), values=experience.values + noise(0.5)
    )


def take_gradient(engine: LocalEngine, group: str | None = None) -> Tensor:
    """The gradient accumulated so far as one vector, by group or whole; None clears it too."""
    names = [group] if group else [g.name for g in engine.groups]
    flat = torch.cat([g.flatten() for name in names for g in engine.grads(name)]).clone()
    if group is None:
        engine.adamw.zero_grad(set_to_none=True)
    return flat


def distance(one: Tensor, other: Tensor) -> float:
    assert float(other.norm()) > 1e-3, "a vanishing gradient would compare nothing"
    return float((one - other).norm() / other.norm())


# --- one gradient whatever the split ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_reward_gradient(tiny_tokenizer: PreTrainedTokenizerBase, ties: str) -> None:
    rng = random.Random(1)
    ranks = [(1, 2), (2, 1, 2, 3), (1, 1, 2), (3, 2, 1), (2, 1), (1, 2, 3, 4, 4), (2, 1, 1), (1, 2)]
    groups = [Group([(prompt, tokens(rng, 1, 12)) for _ in r], r) for r in ranks for prompt in [tokens(rng, 1, 9)]]
    model = ScoringModule(network(LlamaForSequenceClassification, tiny_tokenizer).eval())
    engine = LocalEngine(model, [ParamGroup("reward", model, 1e-3, 1.0)], torch.device("cpu"))

    def run(size: int) -> tuple[Tensor, float, int]:
        recipe = Recipe.model_validate({"reward": {"batch_size": 8, "micro_tokens": size, "ties": ties}})
        loss, counts = reward_step(engine, groups, recipe, tiny_tokenizer.pad_token_id)
        return take_gradient(engine), loss, sum(c.pairs for c in counts)

    whole, loss, pairs = run(10_000)
    assert pairs == 1 + 5 + 2 + 3 + 1 + 9 + 2 + 1
    # 16 tokens: an output or two at a time, so that almost every prompt is scored first and trained in parts.
    for size in (16, 40, 100, 200):
        gradient, split_loss, split_pairs = run(size)
        assert distance(gradient, whole) < 1e-5
        assert split_loss == pytest.approx(loss, rel=1e-5) and split_pairs == pairs


def test_ppo_gradient_and_metrics(ppo: Ppo) -> None:
    experience = moved(ppo)
    metrics = ppo_step(ppo, experience, ALL, BOTH)
    whole = take_gradient(ppo.engine)
    assert 0.1 < metrics["ppo/clip_fraction"] < 0.9, "both branches of the clip must be there"
    for size in SPLITS:
        got = ppo_step(with_ppo(ppo, micro_batch_size=size), experience, ALL, BOTH)
        assert got == pytest.approx(metrics, rel=1e-4)
        assert distance(take_gradient(ppo.engine), whole) < 1e-5


def test_the_order_of_episodes_does_not_matter(ppo: Ppo) -> None:
    experience = moved(ppo)
    ppo_step(ppo, experience, ALL, BOTH)
    whole = take_gradient(ppo.engine)
    ppo_step(with_ppo(ppo, micro_batch_size=2), experience, [5, 0, 3, 7, 1, 6, 2, 4], BOTH)
    assert distance(take_gradient(ppo.engine), whole) < 1e-5


def test_ptx_gradient(ppo: Ppo) -> None:
    loss = ptx_step(ppo, step=0)["ppo/ptx_loss"]
    whole = take_gradient(ppo.engine)
    for size in SPLITS:
        got = ptx_step(with_ppo(ppo, micro_batch_size=size), step=0)["ppo/ptx_loss"]
        assert got == pytest.approx(loss, rel=1e-5)
        assert distance(take_gradient(ppo.engine), whole) < 1e-5


def test_sft_gradient(tiny_dir: str, tmp_path: Path) -> None:
    """The same through TRL's trainer, as the SFT stage sets it up."""
    rng = random.Random(2)
    rows = []
    for _ in range(8):
        prompt, response = tokens(rng, 1, 9), tokens(rng, 1, 12)
        rows.append({"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)})
    tokenizer = load_tokenizer(tiny_dir)

    def run(size: int) -> Tensor:
        recipe = Recipe.model_validate(
            {
                "run": {"device": "cpu"},
                "model": {"name": "tiny"},
                "sft": {"epochs": 1, "batch_size": 8, "micro_batch_size": size, "packing": False, "max_grad_norm": 1e9},
            }
        )
        folder, caught = tmp_path / str(size), []

        class Catch(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
                caught.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

        tracker = Tracker(folder, "test", "sft", TrackingSection(wandb="disabled"), {}, axis="tokens")
        trainer = build_trainer(
            load_policy(tiny_dir, ModelSection(name="tiny")),
            tokenizer,
            rows,
            recipe,
            folder / "trainer",
            Reporter(Checkpoints(folder / "checkpoints"), tracker, lambda: False, {}),
        )
        trainer.add_callback(Catch())
        trainer.train()
        tracker.close()
        assert len(caught) == 1
        return caught[0]

    whole = run(8)
    for size in SPLITS:
        assert distance(run(size), whole) < 1e-5
    # And it is the gradient of the mean over response tokens, row by row without padding.
    policy = load_policy(tiny_dir, ModelSection(name="tiny"))
    count = sum(sum(row["completion_mask"]) for row in rows)
    for row in rows:
        first = row["completion_mask"].index(1)
        (text_nll(policy, row["input_ids"])[first - 1 :].sum() / count).backward()
    assert distance(torch.cat([p.grad.flatten() for p in policy.parameters()]), whole) < 1e-4


# --- against plain loops over rows without padding --------------------------------------------------------------------


def text_nll(policy: nn.Module, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """-log p of every token but the first, from the whole logits of one row."""
    logits = policy(torch.tensor([list(ids)])).logits[0, :-1].float() / temperature
    return -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_ppo_step_is_the_token_loop(ppo: Ppo) -> None:
    experience = moved(ppo)
    metrics = ppo_step(with_ppo(ppo, micro_batch_size=2), experience, ALL, BOTH)
    policy_gradient, value_gradient = take_gradient(ppo.engine, "policy"), take_gradient(ppo.engine, "value")
    take_gradient(ppo.engine)

    count = sum(len(response) for _, response in experience.pairs)
    policy_sum, value_sum = torch.zeros(()), torch.zeros(())
    clipped, entropy, ratios = 0, 0.0, []
    for i, (prompt, response) in enumerate(experience.pairs):
        ids = [*prompt, *response]
        logprobs = -text_nll(ppo.networks.policy, ids, TEMPERATURE)[len(prompt) - 1 :]
        with torch.no_grad():
            p = torch.softmax(ppo.networks.policy(torch.tensor([ids])).logits[0].double() / TEMPERATURE, -1)
            entropy += float(-(p * p.log()).sum(-1)[len(prompt) - 1 : -1].sum())
        hidden = ppo.networks.value.model(torch.tensor([ids])).last_hidden_state[0]
        values = (ppo.networks.value.score(hidden).squeeze(-1) - ppo_runs.REWARD_MEAN) / ppo_runs.REWARD_STD
        for t in range(len(response)):
            old, advantage = float(experience.logprobs[i, t]), float(experience.advantages[i, t])
            ratio = (logprobs[t] - old).exp()
            plain, bounded = -advantage * ratio, -advantage * min(max(ratio.item(), 1 - CLIP), 1 + CLIP)
            # The bounded branch is flat beyond its bounds and the same as the plain one within.
            if abs(ratio.item() - 1) > CLIP and bounded > plain.item():
                clipped, policy_sum = clipped + 1, policy_sum + bounded
            else:
                policy_sum = policy_sum + plain
            ratios.append(ratio.item())
            # The value of the state before token t: read at the token before it.
            v, v_old, target = values[len(prompt) + t - 1], experience.values[i, t], experience.returns[i, t]
            near = float(v_old) + min(max(v.item() - float(v_old), -VALUE_CLIP), VALUE_CLIP)
            beyond = abs(v.item() - float(v_old)) > VALUE_CLIP  # within, the two differ by rounding
            if beyond and (near - float(target)) ** 2 > float((v.detach() - target) ** 2):
                value_sum = value_sum + 0.5 * (near - float(target)) ** 2
            else:
                value_sum = value_sum + 0.5 * (v - target) ** 2
    ((policy_sum + ppo_runs.VF_COEF * value_sum) / count).backward()
    assert distance(policy_gradient, take_gradient(ppo.engine, "policy")) < 1e-4
    assert distance(value_gradient, take_gradient(ppo.engine, "value")) < 1e-4
    assert metrics == pytest.approx(
        {
            "ppo/policy_loss": policy_sum.item() / count,
            "ppo/value_loss": value_sum.item() / count,
            "ppo/clip_fraction": clipped / count,
            "ppo/approx_kl": sum(r - 1 - math.log(r) for r in ratios) / count,
            "ppo/entropy": entropy / count,
            "ppo/ratio_max": max(ratios),
            "ratio_error": max(abs(r - 1) for r in ratios),
        },
        rel=1e-3,
    )


def test_ptx_step_is_the_mean_over_pretraining_tokens(ppo: Ppo) -> None:
    loss = ptx_step(with_ppo(ppo, micro_batch_size=4), step=0)["ppo/ptx_loss"]
    assert ppo.engine.grads("value") == []
    got = take_gradient(ppo.engine)
    # Eight rows a step and eight rows in all: every row once. Pretraining text is scored at temperature 1.
    nll = torch.cat([text_nll(ppo.networks.policy, row) for row in ppo.ptx_rows])
    assert loss == pytest.approx(nll.mean().item(), rel=1e-4)
    (ppo_runs.PTX_COEF * nll.mean()).backward()
    assert distance(got, take_gradient(ppo.engine)) < 1e-4


# --- PPO-ptx is a sum -------------------------------------------------------------------------------------------------


def test_the_gradient_of_ppo_ptx_is_the_sum_of_both(ppo: Ppo) -> None:
    experience = moved(ppo)
    ppo_step(ppo, experience, ALL, BOTH)
    policy, value = take_gradient(ppo.engine, "policy"), take_gradient(ppo.engine, "value")
    take_gradient(ppo.engine)
    ptx_step(ppo, step=0)
    ptx = take_gradient(ppo.engine)
    split = with_ppo(ppo, micro_batch_size=2)
    ppo_step(split, experience, ALL, BOTH)
    ptx_step(split, step=0)
    assert distance(take_gradient(ppo.engine, "policy"), policy + ptx) < 1e-5
    assert distance(take_gradient(ppo.engine, "value"), value) < 1e-5


def test_ptx_coef_scales_its_gradient_and_not_its_metric(ppo: Ppo) -> None:
    loss = ptx_step(ppo, step=0)["ppo/ptx_loss"]
    once = take_gradient(ppo.engine)
    tenfold = dataclasses.replace(ppo, ptx_coef=10 * ppo_runs.PTX_COEF)
    assert ptx_step(tenfold, step=0)["ppo/ptx_loss"] == loss
    assert distance(take_gradient(ppo.engine), 10 * once) < 1e-5
    ptx_step(dataclasses.replace(ppo, ptx_coef=0.0), step=0)
    assert float(take_gradient(ppo.engine).abs().max()) == 0.0
