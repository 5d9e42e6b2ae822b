"""One set of base weights for the policy, the reference, the value and the reward model of PPO.

A reward model that was trained as an adapter on the SFT model is kept in two forms: merged, as a model of its own, and
as the adapter alone, in reward/adapter:

    adapter.safetensors    adapters and scalar head, by the names they have in the adapted model
    adapter.json           what they belong to: hashes of the SFT and the merged model, layers, LoRA settings; the
                           normalisation of the scores

With a policy that is an adapter on the same SFT model, PPO needs that model once. Value and reward model get modules of
their own around the same Parameters (`scalar_twin`), so that each has its adapter in place and none is ever switched.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.adapters import add_lora, is_adapted
from rlhf.cache import publish
from rlhf.config import LoraSection, Recipe
from rlhf.errors import UserError
from rlhf.models import cut_layers
from rlhf.placement import filled, full_shape
from rlhf.quiet import quiet_transformers

FOLDER, WEIGHTS, RECORD = "adapter", "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class RewardAdapter:
    """A reward model as an adapter on the SFT model."""

    folder: Path
    keep_layers: int  # of the SFT model; 0: all
    reward_mean: float
    reward_std: float

    def on(self, model: PreTrainedModel, lora: LoraSection) -> nn.Module:
        """The adapter around a scalar model of the SFT model's body, trainable and with its normalisation.

        Raises:
            UserError: when the file holds other weights than the model trains.
        """
        model.config.reward_mean, model.config.reward_std = self.reward_mean, self.reward_std
        # The weights that are drawn here are replaced: no other draw of the run is to depend on them.
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            adapted = add_lora(model, lora, "SEQ_CLS")
        stored, ours = load_file(self.folder / WEIGHTS), trainable(adapted)
        if other := sorted(stored.keys() ^ ours.keys()):
            raise UserError(
                f"the adapter and the model do not hold the same weights: {other[0]} is in one alone",
                where=str(self.folder),
                fix="run the reward stage again",
            )
        for name, parameter in ours.items():
            with filled([parameter]), torch.no_grad():
                parameter.copy_(stored[name])
        return adapted


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters and head by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(
    model: nn.Module, weights: dict[str, Tensor], recipe: Recipe, folder: Path, base: str, merged: str
) -> None:
    """Write a trained reward model's adapter; the folder appears whole or not at all. Call it on one process.

    Args:
        model: as `add_lora` returned it, trained and normalised.
        weights: all its weights by name, whole.
        base: hash of the SFT model's folder.
        merged: hash of the folder of the merged reward model.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: weights[name].cpu().contiguous() for name in trainable(model)}, partial / WEIGHTS)
    config = model.config
    record = _belongs_to(recipe.reward.lora, base, merged) | {
        "keep_layers": recipe.reward.keep_layers,
        "reward_mean": config.reward_mean,
        "reward_std": config.reward_std,
    }
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    publish(partial, folder)


def find_adapter(recipe: Recipe, folder: Path, base: str, merged: str) -> tuple[RewardAdapter | None, str]:
    """The reward adapter for a PPO run, or None and the reason.

    Args:
        folder: where the reward stage left it.
        base, merged: hashes of the SFT and the reward model that the run is given.
    """
    if not recipe.model.lora.enabled or not recipe.reward.lora.enabled:
        return None, "they are no adapters on the SFT model"
    if not (folder / RECORD).is_file():
        return None, f"there is no {folder}"
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    wanted = _belongs_to(recipe.reward.lora, base, merged)
    names = {"base": "another SFT model", "merged": "another reward model", "lora": "other settings of reward.lora"}
    for key, value in wanted.items():
        if record.get(key) != value:
            return None, f"{folder} belongs to {names[key]}"
    return RewardAdapter(folder, record["keep_layers"], record["reward_mean"], record["reward_std"]), ""


def _belongs_to(lora: LoraSection, base: str, merged: str) -> dict[str, Any]:
    return {"base": base, "merged": merged, "lora": lora.model_dump()}


def one_base(recipe: Recipe, zero_stage: int) -> bool:
    """Whether PPO holds the SFT model once for all four networks.

    Not under ZeRO-3: there DeepSpeed's hooks gather and partition a Parameter for the module it sits in, and one that
    sits in several would be taken from under the others. Where frozen models lie (launch.frozen) does not matter: the
    policy has the base on the device anyway, and what the reward model has of its own is small.
    """
    adapters = recipe.model.lora.enabled and recipe.reward.lora.enabled
    return adapters and recipe.reward.model == "sft" and zero_stage < 3


def base_line(policy: PreTrainedModel, shared: bool, why_not: str) -> str:
    """What a PPO run with a LoRA policy says about its base, before adapters are added."""
    size = sum(full_shape(p).numel() * p.element_size() for p in policy.parameters()) / 1e9
    if shared:
        return f"one base of {size:.2g} GB for policy, reference, value and reward model"
    why_not = why_not or "under ZeRO-3, and for some architectures, they cannot share it"
    return f"a base of {size:.2g} GB for policy and reference; value and reward model have their own ({why_not})"


def scalar_twin(policy: PreTrainedModel, keep_layers: int, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """A model with a scalar head (zeros) whose body has modules of its own around the policy's very weights.

    None for an architecture whose scalar model has another body than its language model, or weights besides. Call it
    before there are adapters on the policy, which replace modules in place.
    """
    if is_adapted(policy):
        raise ValueError("the policy has adapters already")
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
    # Copied are the modules. What the memo names is taken for copied already: weights, and the config, which is the
    # twin's (`keep_layers` changes it).
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*body.parameters(), *body.buffers())}
    memo |= {id(policy.config): twin.config, id(body.config): twin.config}
    setattr(twin, prefix, copy.deepcopy(body, memo))
    head = torch.zeros(twin.score.weight.shape, device=policy.device, dtype=policy.dtype)
    twin.score.weight = nn.Parameter(head)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        return None
    if keep_layers:
        cut_layers(twin, keep_layers)
    return twin.eval()
