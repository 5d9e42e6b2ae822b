"""Load and save policies and reward models: plain Hugging Face folders, or adapters on such a base.

Every load is checked: weights that the folder lacks are an error, and never become a freshly initialised layer. A
loaded model carries the name of its base and the number of layers kept (`base_name`, `kept_layers`; 0: all), which are
saved with an adapter on it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.auto_classes import causal_class, scalar_class
from rlhf.models.layers import cut_layers
from rlhf.models.logit_map import verified_map
from rlhf.models.peft.attaching import attach_or_merge, base_name, base_settings, check_method, merge_adapter
from rlhf.models.peft.folder import HEAD, find_adapter, load_adapter_weights, save_adapter
from rlhf.models.peft.merging import merged_state_dict
from rlhf.models.peft.methods import add_adapter, peft_of
from rlhf.models.peft.virtual_tokens import attention_window, positions_taken
from rlhf.models.placement import writable
from rlhf.models.pretrained import (
    fit_to_tokenizer,
    is_classifier,
    is_reward_model,
    load_config,
    load_plain,
    scalar_head,
    set_dropout,
)
from rlhf.models.resolve import resolve_model
from rlhf.models.tokenizer import load_tokenizer, same_tokenizer
from rlhf.system.files import publish
from rlhf.system.quiet import quiet_transformers

__all__ = [
    "check_context",
    "check_positions",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "new_reward_model",
    "recompute_activations",
    "resolve_model",
    "same_tokenizer",
    "save_model",
]


def load_policy(
    name_or_dir: str | Path,
    model: ModelSection,
    dropout: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merged: bool = False,
    round_to_model_dtype: bool = False,
) -> PreTrainedModel:
    """Return a causal language model in eval mode, fit to its tokenizer.

    An adapter's folder gives the base with the adapter on it, whatever `model.peft` says. The generation config keeps
    special ids only, so sampling is from the plain softmax. `dropout` is the probability of residual dropout; all other
    dropout is 0. Without a `tokenizer` the one beside the model is taken. Raises UserError if the model does not exist,
    is a reward model, lacks weights, does something unknown to its logits, or is an adapter of another base.

    Args:
        name_or_dir: anything `resolve_model` takes.
        merged: merge an adapter into the weights if its method allows that, for a model that is not trained.
        round_to_model_dtype: round the weights of an adapter to the dtype of the model, as DeepSpeed does in training.
    """
    if adapter := find_adapter(name_or_dir):
        if adapter.scalar:
            raise _not_a_policy("a reward model's adapter", str(name_or_dir))
        tokenizer = tokenizer or load_tokenizer(adapter.folder, model)
        policy = load_policy(adapter.base.name, base_settings(adapter, model), dropout, tokenizer)
        return attach_or_merge(adapter, policy, merged, round_to_model_dtype)
    where = resolve_model(name_or_dir)
    config = load_config(where, model)
    if is_classifier(config):
        raise _not_a_policy(f"a reward model or classifier ({config.architectures[0]})", where)
    set_dropout(config, dropout, where)
    policy, missing = load_plain(causal_class(config), where, model, config)
    if missing:
        raise UserError(f"weights are missing: {_few(missing)}", where, fix="name a complete causal language model")
    policy.base_name, policy.kept_layers = base_name(name_or_dir), 0
    fit_to_tokenizer(policy, tokenizer or load_tokenizer(where, model))
    policy.logit_map = verified_map(policy)
    return policy


def new_reward_model(
    policy_dir: str | Path,
    model: ModelSection,
    keep_layers: int = 0,
    head_init: Literal["zero", "normal"] = "normal",
    peft: PeftSection | None = None,
) -> PreTrainedModel:
    """Return a reward model that starts from a policy: the policy's body with a new scalar head.

    A zero head has no random ranking to unlearn, which matters if rankings are few. The normal head is drawn from the
    global generator with std 1/sqrt(d + 1), d the hidden size, as in Stiennon et al. and Huang et al. 2024
    (arXiv 2403.17031). `reward_mean` 0 and `reward_std` 1 go into the config. Raises UserError if the model does not
    exist, lacks weights other than the head, or has fewer layers than asked for; or if the policy's method differs from
    `peft`, or cannot be merged.

    Args:
        policy_dir: anything `resolve_model` takes. A reward model keeps its head and its number of layers. A policy's
            adapter becomes the reward model's own adapter in the layers that are kept; without `peft` it is merged.
        keep_layers: keep only the first N transformer layers; 0 keeps all.
        peft: the method that the reward model is trained by; None, or the method none, trains all weights.
    """
    peft = None if peft is None or not peft.on else peft
    if adapter := find_adapter(policy_dir):
        tokenizer = load_tokenizer(adapter.folder, model)
        settings = base_settings(adapter, model)
        reward = _load_scalar(adapter.base.name, settings, adapter.keep_layers, head_init, tokenizer)
        if keep_layers:
            cut_layers(reward, keep_layers)
            reward.kept_layers = keep_layers
        adapter.check_base()
        if peft is None:
            merge_adapter(adapter, reward)
        else:
            check_method(adapter, peft)
            load_adapter_weights(add_adapter(reward, peft), adapter, partly=True)
        return reward
    reward = _load_scalar(str(policy_dir), model, keep_layers, head_init, None)
    return reward if peft is None else add_adapter(reward, peft)


def _load_scalar(
    name: str,
    model: ModelSection,
    keep_layers: int,
    head_init: Literal["zero", "normal"],
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    """Return a plain model with a scalar head, a new one if the folder holds none."""
    where = resolve_model(name)
    config = load_config(where, model)
    set_dropout(config, 0.0, where)
    config.num_labels = 1
    reward, missing = load_plain(scalar_class(config, where), where, model, config)
    head = scalar_head(reward, where)
    if others := [name for name in missing if not name.startswith(HEAD)]:
        raise UserError(f"weights are missing: {_few(others)}", where=where, fix="name a complete language model")
    if missing:
        with writable([head.weight]):
            nn.init.normal_(head.weight, std=0.0 if head_init == "zero" else 1 / math.sqrt(head.in_features + 1))
    if keep_layers:
        cut_layers(reward, keep_layers)
    reward.config.reward_mean, reward.config.reward_std = 0.0, 1.0
    reward.base_name, reward.kept_layers = base_name(name), keep_layers
    return fit_to_tokenizer(reward, tokenizer or load_tokenizer(where, model))


def load_reward_model(name_or_dir: str | Path, model: ModelSection, merged: bool = False) -> PreTrainedModel:
    """Return a trained reward model without dropout, in eval mode; `reward_mean` and `reward_std` default to 0 and 1.

    For `merged` see `load_policy`. Raises UserError if the model does not exist, lacks its head or other weights, has a
    head of more than one score, or is an adapter of another base.
    """
    if adapter := find_adapter(name_or_dir):
        if not adapter.scalar:
            raise _no_reward_model("a policy's adapter", str(name_or_dir))
        tokenizer = load_tokenizer(adapter.folder, model)
        # A zero head draws nothing from the generator, and the adapter replaces it.
        reward = _load_scalar(adapter.base.name, base_settings(adapter, model), adapter.keep_layers, "zero", tokenizer)
        return attach_or_merge(adapter, reward, merged)
    where = resolve_model(name_or_dir)
    config = load_config(where, model)
    set_dropout(config, 0.0, where)
    if not is_reward_model(config):
        raise _no_reward_model(f"{(config.architectures or ['unknown'])[0]}, {config.num_labels} labels", where)
    reward, missing = load_plain(scalar_class(config, where), where, model, config)
    if missing:
        what = f"the reward model's head or other weights were not loaded: {_few(missing)}"
        raise UserError(what, where, fix="save the reward model again; scores of a random head mean nothing")
    scalar_head(reward, where)
    for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
        if not hasattr(reward.config, name):
            setattr(reward.config, name, default)
    reward.base_name, reward.kept_layers = base_name(name_or_dir), 0
    return fit_to_tokenizer(reward, load_tokenizer(where, model))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    merged: bool = False,
) -> None:
    """Write a plain Hugging Face folder (safetensors), or only the adapter if there is one on the model.

    The folder, with the tokenizer and its chat template, appears whole or not at all, and replaces an older model in
    it; `model` is not changed. Call it on the first process only: transformers writes no weights on the others.
    `state_dict` has the model's weights under its own names, if they are partitioned over processes. With `merged` the
    folder is plain in any case, with the adapter merged into the weights.
    """
    folder = Path(folder)
    weights = model.state_dict() if state_dict is None else state_dict
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet_transformers():
        if peft_of(model) is not None and not merged:
            save_adapter(model, weights, partial)
        else:
            model.save_pretrained(partial, state_dict=merged_state_dict(model, weights))
        tokenizer.save_pretrained(partial)
    publish(partial, folder)


def check_context(model: PreTrainedModel, tokens: int, field: str) -> None:
    """Check that rows of up to `tokens` tokens, as `field` of the recipe allows, fit the model's context.

    Raises UserError if the model has too few positions, or layers whose attention window would lose virtual tokens.
    """
    check_positions(model.config, peft_of(model), tokens, field)


def check_positions(config: PretrainedConfig, peft: PeftSection | None, tokens: int, field: str) -> None:
    """Check as `check_context` does, from the config of a model and the method that trains it (None: all weights)."""
    text = config.get_text_config()
    limit, virtual = getattr(text, "max_position_embeddings", None), positions_taken(peft)
    if limit and tokens + virtual > limit:
        more = f" and {virtual} virtual ones" if virtual else ""
        what = f"rows may have {tokens} tokens{more}, and {config.model_type} has positions for {limit}"
        raise UserError(what, where=field, fix="lower it, or take a model with a longer context")
    window = attention_window(text)
    if virtual and 0 < window < tokens + virtual:
        # Otherwise padding would decide how many virtual tokens a short row still sees.
        what = f"rows may have {tokens} tokens and {virtual} virtual ones, and layers of {config.model_type} see "
        what += f"{window} alone"
        raise UserError(what, where=field, fix="lower it, or take a method without virtual tokens, as lora")


def recompute_activations(model: nn.Module) -> None:
    """Trade time for memory: the backward pass computes each layer's activations again (gradient checkpointing).

    transformers does so in training mode only, so the model is put into it. That changes no number, since every dropout
    but SFT's is set to 0.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()


def _not_a_policy(what: str, where: str) -> UserError:
    return UserError(f"this is {what}, not a policy", where=where, fix="name a causal language model")


def _no_reward_model(what: str, where: str) -> UserError:
    fix = "name a sequence-classification folder with one label, such as RUN/reward/model"
    return UserError(f"this is no reward model ({what})", where, fix)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
