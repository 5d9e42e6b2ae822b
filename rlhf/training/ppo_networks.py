"""The four networks of PPO: the policy, the reference, the value model and the reward model.

The reference is the SFT policy, whatever the method: a model of its own, or under a parameter-efficient method a second
adapter with SFT's weights. The value model starts from the reward model, head and normalisation included. Where all of
them are adapters on one base, the base is in memory once (rlhf/models/peft/shared_base.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.config import VIRTUAL_TOKEN_METHODS, ModelSection, PeftSection, Recipe
from rlhf.errors import UserError
from rlhf.models.loading import load_policy, load_reward_model
from rlhf.models.peft.attaching import attach_adapter, base_settings, check_method
from rlhf.models.peft.folder import base_hash, find_adapter
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.methods import add_adapter, peft_of
from rlhf.models.peft.shared_base import all_share_base, policies_share_base, share_base, share_base_with_scalar_head
from rlhf.models.zero import frozen, trained, zero_stage
from rlhf.system.distributed import processes


@dataclass(frozen=True)
class PpoNetworks:
    """All in eval mode; `bases`: what is said of whose base weights are where, empty without a method."""

    policy: PreTrainedModel
    reference: PreTrainedModel  # frozen
    value: PreTrainedModel
    reward: PreTrainedModel  # frozen
    bases: str


def load_networks(recipe: Recipe, sft_dir: Path, reward_dir: Path, device: torch.device) -> PpoNetworks:
    """Load what PPO works with, each network where the recipe has it lie.

    Raises:
        UserError: as of rlhf/models/loading.py; and a method that does not go with what the SFT stage has left.
    """
    if policies_share_base(recipe, zero_stage(recipe)):
        return _on_one_base(recipe, sft_dir, reward_dir, device)
    load_scorer = partial(frozen, recipe, device, drop_after_use=True)
    return PpoNetworks(
        policy=trained(recipe, lambda: policy_to_train(sft_dir, recipe.model)),
        reference=load_scorer(lambda: _reference(sft_dir, recipe)),
        value=trained(recipe, lambda: value_to_train(reward_dir, recipe)),
        reward=load_scorer(lambda: load_reward_model(reward_dir, recipe.model)),
        bases="each of the four networks has a base of its own" if recipe.model.peft.on else "",
    )


def _reference(sft_dir: Path, recipe: Recipe) -> PreTrainedModel:
    return load_policy(sft_dir, recipe.model, merged=not recipe.model.peft.on, round_to_model_dtype=_rounded(recipe))


def _rounded(recipe: Recipe) -> bool:
    """Whether DeepSpeed rounds the policy's adapter: so must be the reference's, or KL does not start at 0."""
    return processes() > 1 and recipe.model.dtype == "bfloat16"


def _on_one_base(recipe: Recipe, sft_dir: Path, reward_dir: Path, device: torch.device) -> PpoNetworks:
    """Policy and reference on one base, and value and reward model too where they can be."""
    peft, sft, reward_adapter = recipe.model.peft, find_adapter(sft_dir), find_adapter(reward_dir)
    base, section = str(sft_dir), recipe.model
    if sft is not None:
        check_method(sft, peft)
        sft.check_base()
        base, section = sft.base.name, base_settings(sft, recipe.model)
    policy = trained(recipe, lambda: load_policy(base, section))
    reference = share_base(policy)
    scalar_models: list[PreTrainedModel | None] = [None, None]
    if (
        reward_adapter is not None
        and all_share_base(recipe, zero_stage(recipe))
        and reward_adapter.base.hash == base_hash(base)
    ):
        check_method(reward_adapter, recipe.reward_peft)
        scalar_models = [
            share_base_with_scalar_head(policy, reward_adapter.keep_layers, section.trust_remote_code)
            for _ in scalar_models
        ]
    size = sum(p.numel() * p.element_size() for p in policy.parameters()) / 1e9
    if sft is not None:
        policy, reference = (attach_adapter(sft, model, _rounded(recipe)) for model in (policy, reference))
    else:
        policy = add_fresh_adapter(peft, policy, sft_dir)
    reference.requires_grad_(False).to(device)
    value, reward = scalar_models
    if reward_adapter is not None and value is not None and reward is not None:
        value, reward = (
            attach_adapter(reward_adapter, value),
            attach_adapter(reward_adapter, reward).requires_grad_(False).to(device),
        )
        bases = f"one base of {size:.2g} GB for policy, reference, value and reward model"
    else:
        value = trained(recipe, lambda: value_to_train(reward_dir, recipe))
        reward = frozen(recipe, device, lambda: load_reward_model(reward_dir, recipe.model), drop_after_use=True)
        bases = f"one base of {size:.2g} GB for policy and reference; value and reward model have their own"
    return PpoNetworks(policy, reference, value, reward, bases)


def policy_to_train(sft_dir: Path, model: ModelSection) -> PreTrainedModel:
    """A policy to go on training from, by the recipe's method; it computes what the model in the folder computes.

    Raises:
        UserError: a model of another method, one that cannot be merged where all weights are trained, or a method that
            would change a plain model.
    """
    peft, adapter = model.peft, find_adapter(sft_dir)
    if adapter is not None and peft.on:
        check_method(adapter, peft)
        return load_policy(sft_dir, model)
    policy = load_policy(sft_dir, model, merged=True)
    if adapter is not None and peft_of(policy) is not None:
        raise UserError(
            f"all weights are to be trained, and {why_not_mergeable(adapter.peft)}",
            str(sft_dir),
            f"set model.peft.method={adapter.peft.method}",
        )
    return add_fresh_adapter(peft, policy, sft_dir) if peft.on else policy


def add_fresh_adapter(peft: PeftSection, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A new adapter on a trained plain model, which is to compute what it did.

    Raises:
        UserError: for virtual tokens, which would change that.
    """
    if peft.method in VIRTUAL_TOKEN_METHODS:
        raise UserError(
            f"this is a plain model, and new virtual tokens ({peft.method}) would change what it computes: PPO would "
            "not start from it",
            str(folder),
            "run the stage that writes it with this recipe first, or take a method that starts at no change, as lora",
        )
    return add_adapter(model, peft)


def value_to_train(reward_dir: Path, recipe: Recipe) -> PreTrainedModel:
    """The reward model, to be trained on as the value model: its adapter, or all of its weights.

    Raises:
        UserError: a reward model of another method than the recipe's.
    """
    peft, adapter = recipe.reward_peft, find_adapter(reward_dir)
    if adapter is not None and peft.on:
        check_method(adapter, peft)
        return load_reward_model(reward_dir, recipe.model)
    value = load_reward_model(reward_dir, recipe.model, merged=True)
    if adapter is not None and peft_of(value) is not None:
        raise UserError(
            f"all weights of the value model are to be trained, and {why_not_mergeable(adapter.peft)}",
            str(reward_dir),
            "set reward.peft.method=model",
        )
    return add_fresh_adapter(peft, value, reward_dir) if peft.on else value
