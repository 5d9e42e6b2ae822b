"""Share one set of base weights among the policy, reference, value and reward model of PPO.

Under a parameter-efficient method all four are adapters on one base, which memory needs to hold only once. Each network
gets modules of its own around the same Parameters (`share_base`, `share_base_with_scalar_head`), so each keeps its
adapter in place and no adapter is ever switched.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config import Recipe
from rlhf.models.auto_classes import scalar_class
from rlhf.models.layers import cut_layers
from rlhf.models.peft.methods import peft_of
from rlhf.system.quiet import quiet_transformers


def all_share_base(recipe: Recipe, zero_stage: int) -> bool:
    """Return whether PPO holds the base once for all four networks.

    It does not under ZeRO-3: DeepSpeed's hooks gather and partition a Parameter for the module that owns it, and would
    partition a shared one while another module still needs it. launch.frozen does not matter: the policy has the base
    on the device anyway, and the weights that the other networks add are few.
    """
    return policies_share_base(recipe, zero_stage) and recipe.reward_peft.on and recipe.reward.model == "sft"


def policies_share_base(recipe: Recipe, zero_stage: int) -> bool:
    """Return whether at least policy and reference are adapters on one base in memory."""
    return recipe.model.peft.on and zero_stage < 3


def share_base(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a policy with new modules around the same weights as `policy`, which must have no method on it yet."""
    _check_plain(policy)
    return _share_modules(policy, {}).eval()


def share_base_with_scalar_head(
    policy: PreTrainedModel, keep_layers: int, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """Return a model with a scalar head (zeros) and new modules around the same body weights as `policy`.

    Returns None for an architecture whose scalar model has another body than its language model, or further weights.
    """
    _check_plain(policy)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    kind = scalar_class(config, policy.base_name)
    # Its own weights are thrown away: on the meta device they take no memory and no time.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet_transformers():
        twin = kind.from_config(
            config,
            dtype=policy.dtype,
            attn_implementation=config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    body, prefix = getattr(policy, policy.base_model_prefix), twin.base_model_prefix
    if type(getattr(twin, prefix)) is not type(body) or not isinstance(getattr(twin, "score", None), nn.Linear):
        return None
    configs = {id(config): twin.config for config in (policy.config, body.config)}
    configs[id(policy.config.get_text_config())] = twin.config.get_text_config()
    setattr(twin, prefix, _share_modules(body, configs))
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
    """Return a copy of the modules around the same weights; `memo` maps the id of further objects to replacements."""
    # deepcopy takes whatever the memo names for copied already.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared | memo)
