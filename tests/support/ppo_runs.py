"""Make PPO runs of one iteration of eight episodes, put together from real parts."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.plan import plan_ppo
from rlhf.training.engine import LocalEngine, ParamGroup
from rlhf.training.policy_value import PolicyValue
from rlhf.training.ppo_state import Ppo
from support.small_models import llama

EPISODES = 8
TEMPERATURE, CLIP, VALUE_CLIP, VF_COEF, PTX_COEF = 0.8, 0.2, 0.3, 0.7, 3.0
REWARD_MEAN, REWARD_STD = 0.3, 1.7
ALL, BOTH = list(range(EPISODES)), ("policy", "value")


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    """Return random token ids, from `low` to `high` of them."""
    return [rng.randrange(10, 1000) for _ in range(rng.randint(low, high))]


def network(cls: type, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
    """Return a small Llama for this tokenizer whose distributions are far from uniform, with dropout in its config."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.2, "attention_dropout": 0.3}
    return llama(cls, seed, **sizes, **ids)


def make_ppo(policy: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Ppo:
    """Return a PPO run of one iteration of eight episodes, put together from real parts."""
    sections = {"run": {"device": "cpu", "seed": 3}, "model": {"name": "tiny"}, "data": {"max_response_tokens": 12}}
    section = dict.fromkeys(("episodes", "batch_size", "minibatch_size", "micro_batch_size"), EPISODES)
    section |= {"temperature": TEMPERATURE, "clip": CLIP, "value_clip": VALUE_CLIP, "vf_coef": VF_COEF}
    section |= {"ptx_coef": PTX_COEF, "ptx_examples_per_episode": 1, "missing_eos_penalty": 0.5}
    recipe = Recipe.model_validate(sections | {"ppo": section})
    value, reward_model = (network(LlamaForSequenceClassification, tokenizer, seed=1) for _ in range(2))
    for model in (value, reward_model):
        model.config.reward_mean, model.config.reward_std = REWARD_MEAN, REWARD_STD
    networks = PolicyValue(policy.eval(), value.eval())
    groups = [ParamGroup("policy", networks.policy, 1e-3, 1.0), ParamGroup("value", networks.value, 1e-3, 1.0)]
    rng = random.Random(5)
    return Ppo(
        recipe=recipe,
        plan=plan_ppo(recipe),
        ptx_coef=PTX_COEF,
        tokenizer=tokenizer,
        prompts=[tokens(rng, 1, 9) for _ in range(EPISODES)],
        ptx_rows=[tokens(rng, 2, 12) for _ in range(EPISODES)],
        # One token in six ends a response, so that the lengths differ.
        stop_ids=[tokenizer.eos_token_id, *range(0, len(tokenizer), 6)],
        engine=LocalEngine(networks, groups, torch.device("cpu")),
        reference=reference,
        reward_model=reward_model.requires_grad_(False).eval(),
        kl_coef=0.05,
    )


def with_ppo(ppo: Ppo, **changes: Any) -> Ppo:
    """Return the same run with other options of the ppo section."""
    section = ppo.recipe.ppo.model_copy(update=changes)
    return dataclasses.replace(ppo, recipe=ppo.recipe.model_copy(update={"ppo": section}))
