"""One set of base weights for the policy, the reference, the value and the reward model of PPO.

Under a parameter-efficient method all four are adapters on one base, which is needed once. Each of them gets modules of
its own around the same Parameters (`share_base`, `share_base_with_scalar_head`), so that each has its adapter in
place and none is ever switched.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.config import Recipe
from rlhf.models.layers import cut_layers
from rlhf.models.peft.methods import peft_of
from rlhf.system.quiet import quiet_transformers


def all_share_base(recipe: Recipe, zero_stage: int) -> bool:
    """Whether PPO holds the base once for all four networks.

    Not under ZeRO-3: there DeepSpeed's hooks gather and partition a Parameter for the module it sits in, and one that
    sits in several would be taken from under the others. Where frozen models lie (launch.frozen) does not matter: the
    policy has the base on the device anyway, and what the others have of their own is small.
    """
    return policies_share_base(recipe, zero_stage) and recipe.reward_peft.on and recipe.reward.model == "sft"


def policies_share_base(recipe: Recipe, zero_stage: int) -> bool:
    """Whether policy and reference, at least, are adapters on one base in memory."""
    return recipe.model.peft.on and zero_stage < 3


def share_base(policy: PreTrainedModel) -> PreTrainedModel:
    """A policy with modules of its own around the very weights of another, which has no method on it yet."""
    _check_plain(policy)
    return _share_modules(policy, {}).eval()


def share_base_with_scalar_head(
    policy: PreTrainedModel, keep_layers: int, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """A model with a scalar head (zeros) whose body has modules of its own around the policy's very weights.

    None for an architecture whose scalar model has another body than its language model, or weights besides.
    """
    _check_plain(policy)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    # What it is built with is thrown away: on the meta device it takes no memory and no time.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet_transformers():
        twin = AutoModelForSequenceClassification.from_config(
            config,
            dtype=policy.dtype,
            attn_implementation=config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    body, prefix = getattr(policy, policy.base_model_prefix), twin.base_model_prefix
    if type(getattr(twin, prefix)) is not type(body) or not isinstance(getattr(twin, "score", None), nn.Linear):
        return None
    setattr(twin, prefix, _share_modules(body, {id(policy.config): twin.config, id(body.config): twin.config}))
    head = torch.zeros(twin.score.weight.shape, device=policy.device, dtype=policy.dtype)
    twin.score.weight = nn.Parameter(head)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        return None
    if keep_layers:
        cut_layers(twin, keep_layers)
    twin.base_name, twin.kept_layers = policy.base_name, keep_layers
    return twin.eval()


def _check_plain(policy: PreTrainedModel) -> None:
    if peft_of(policy) is not None:
        raise ValueError("the model has a method already, which would be shared with its twin")


def _share_modules(model: nn.Module, memo: dict[int, Any]) -> Any:
    """A copy of the modules around the same weights; `memo`: further objects by id, and what stands for them."""
    # What the memo names is taken for copied already.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared | memo)
