"""The four networks of PPO: the policy, the reference, the value model and the reward model.

The reference is the SFT policy, whatever the method: a separate model, or under a parameter-efficient method a second
adapter with SFT's weights. The value model starts from the reward model, head and normalisation included. Where all of
them are adapters on one base, the base is in memory once (rlhf/models/peft/shared_base.py). Where the reward model
reads a format of its own, the value model starts from the policy, with a new head: it must read the policy's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.model_config import VIRTUAL_TOKEN_METHODS, ModelSection, PeftSection
from rlhf.models.loading import load_policy, load_reward_model, new_reward_model
from rlhf.models.peft.attaching import attach_adapter, base_settings, check_method
from rlhf.models.peft.folder import base_hash, find_adapter
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.methods import add_adapter, peft_of
from rlhf.models.peft.shared_base import all_share_base, policies_share_base, share_base, share_base_with_scalar_head
from rlhf.models.zero import frozen, trained, zero_stage
from rlhf.system.distributed import processes


@dataclass(frozen=True)
class PpoNetworks:
    """The four networks in eval mode, and for the log which of them share a base (empty without a PEFT method)."""

    policy: PreTrainedModel
    reference: PreTrainedModel  # frozen
    value: PreTrainedModel
    reward: PreTrainedModel  # frozen
    bases: str


def load_networks(
    recipe: Recipe, sft_dir: Path, reward_dir: Path, device: torch.device, value_from_policy: bool = False
) -> PpoNetworks:
    """Load the four networks, the frozen ones placed as launch.frozen says.

    Raises UserError as rlhf/models/loading.py does, or if the recipe's PEFT method is not that of SFT or reward model.
    """

    def value() -> PreTrainedModel:
        if value_from_policy:
            return new_reward_model(sft_dir, recipe.model, head_init="zero", peft=recipe.reward_peft)
        return value_to_train(reward_dir, recipe)

    if policies_share_base(recipe, zero_stage(recipe)):
        return _on_one_base(recipe, sft_dir, reward_dir, device, value)
    load_scorer = partial(frozen, recipe, device, drop_after_use=True)
    return PpoNetworks(
        policy=trained(recipe, lambda: policy_to_train(sft_dir, recipe.model)),
        reference=load_scorer(lambda: _reference(sft_dir, recipe)),
        value=trained(recipe, value),
        reward=load_scorer(lambda: load_reward_model(reward_dir, recipe.reward_format)),
        bases="each of the four networks has a base of its own" if recipe.model.peft.on else "",
    )


def _reference(sft_dir: Path, recipe: Recipe) -> PreTrainedModel:
    return load_policy(sft_dir, recipe.model, merged=not recipe.model.peft.on, round_to_model_dtype=_rounded(recipe))


def _rounded(recipe: Recipe) -> bool:
    """Return whether DeepSpeed rounds the policy's adapter; then the reference's is rounded too, so that KL is 0."""
    return processes() > 1 and recipe.model.dtype == "bfloat16"


def _on_one_base(
    recipe: Recipe, sft_dir: Path, reward_dir: Path, device: torch.device, load_value: Callable[[], PreTrainedModel]
) -> PpoNetworks:
    """Load policy and reference on one base, and value and reward model on the same base too if they can be."""
    peft, sft, reward_adapter = recipe.model.peft, find_adapter(sft_dir), find_adapter(reward_dir)
    base, section = str(sft_dir), recipe.model
    if sft is not None:
        check_method(sft, peft)
        sft.check_base()
        base, section = sft.base.name, base_settings(sft, recipe.model)
    policy = trained(recipe, lambda: load_policy(base, section))
    reference = share_base(policy)
    scalar: list[PreTrainedModel | None] = [None]  # value and reward model, where they share the policy's base
    if reward_adapter and all_share_base(recipe, zero_stage(recipe)) and reward_adapter.base.hash == base_hash(base):
        check_method(reward_adapter, recipe.reward_peft)
        options = (reward_adapter.keep_layers, section.trust_remote_code)
        scalar = [share_base_with_scalar_head(policy, *options) for _ in range(2)]
    size = sum(p.numel() * p.element_size() for p in policy.parameters()) / 1e9
    if sft is not None:
        policy, reference = (attach_adapter(sft, model, _rounded(recipe)) for model in (policy, reference))
    else:
        policy = add_fresh_adapter(peft, policy, sft_dir)
    reference.requires_grad_(False).to(device)
    if reward_adapter and None not in scalar:
        value, reward = (attach_adapter(reward_adapter, model) for model in scalar)
        reward.requires_grad_(False).to(device)
        bases = f"one base of {size:.2g} GB for policy, reference, value and reward model"
    else:
        value = trained(recipe, load_value)
        reward = frozen(
            recipe, device, lambda: load_reward_model(reward_dir, recipe.reward_format), drop_after_use=True
        )
        bases = f"one base of {size:.2g} GB for policy and reference; value and reward model have their own"
    return PpoNetworks(policy, reference, value, reward, bases)


def policy_to_train(sft_dir: Path, model: ModelSection) -> PreTrainedModel:
    """Load a policy to train by the recipe's method; it computes what the model in the folder computes.

    Raises UserError if the model has another method, has one that cannot be merged while all weights are trained, or
    has none and the recipe's would change what it computes.
    """
    peft, adapter = model.peft, find_adapter(sft_dir)
    if adapter is not None and peft.on:
        check_method(adapter, peft)
        return load_policy(sft_dir, model)
    policy = load_policy(sft_dir, model, merged=True)
    if adapter is not None and peft_of(policy) is not None:
        what = f"all weights are to be trained, and {why_not_mergeable(adapter.peft)}"
        raise UserError(what, str(sft_dir), f"set model.peft.method={adapter.peft.method}")
    return add_fresh_adapter(peft, policy, sft_dir) if peft.on else policy


def add_fresh_adapter(peft: PeftSection, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add a new adapter to a trained plain model.

    Raises UserError for virtual tokens, which would change what it computes.
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
    """Load the reward model as the value model, to train its adapter or all of its weights.

    Raises UserError if the reward model's method is not the recipe's.
    """
    peft, adapter = recipe.reward_peft, find_adapter(reward_dir)
    if adapter is not None and peft.on:
        check_method(adapter, peft)
        return load_reward_model(reward_dir, recipe.model)
    value = load_reward_model(reward_dir, recipe.model, merged=True)
    if adapter is not None and peft_of(value) is not None:
        what = f"all weights of the value model are to be trained, and {why_not_mergeable(adapter.peft)}"
        raise UserError(what, str(reward_dir), "set reward.peft.method=model")
    return add_fresh_adapter(peft, value, reward_dir) if peft.on else value
