"""Loading and saving of policies and reward models: plain Hugging Face folders, or adapters on such a base.

Every load is checked: weights that the folder did not bring are an error, never a freshly initialised layer. A loaded
model knows what it was loaded from (`base_name`, `kept_layers`), which an adapter on it is saved with.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config import ModelSection, PeftSection, settings_of
from rlhf.errors import UserError
from rlhf.models.layers import cut_layers
from rlhf.models.peft.folder import HEAD, AdapterFolder, find_adapter, load_adapter_weights, save_adapter
from rlhf.models.peft.merging import merge_into, merged_state_dict, why_not_mergeable
from rlhf.models.peft.methods import add_adapter, peft_of
from rlhf.models.peft.virtual_tokens import attention_window, positions_taken
from rlhf.models.placement import writable
from rlhf.models.pretrained import fit_to_tokenizer, is_classifier, load_config, load_plain, scalar_head, set_dropout
from rlhf.models.resolve import BUILT_IN, resolve_model
from rlhf.models.tokenizer import load_tokenizer, same_tokenizer
from rlhf.system.files import publish
from rlhf.system.quiet import quiet_transformers

__all__ = [
    "check_context",
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
    """A causal language model that fits its tokenizer (`tokenizer`, else the one beside it), dropout set, in eval mode.

    From an adapter's folder it is the base with the adapter on it, whatever `model.peft` says. Its generation config
    keeps special ids only, so that sampling is from the plain softmax.

    Args:
        merged: an adapter is written into the weights where that can be done, for a model that is not trained.
        round_to_model_dtype: round the weights of an adapter to the type of the model, as DeepSpeed does in training.

    Raises:
        UserError: no such model, a reward model, weights missing from it, or another base than the adapter's.
    """
    if adapter := find_adapter(name_or_dir):
        if adapter.scalar:
            raise _not_a_policy("a reward model's adapter", str(name_or_dir))
        tokenizer = tokenizer or load_tokenizer(adapter.folder, model)
        policy = load_policy(adapter.base.name, base_settings(adapter, model), dropout, tokenizer)
        return _with_adapter(adapter, policy, merged, round_to_model_dtype)
    where = resolve_model(name_or_dir)
    config = load_config(where, model)
    if is_classifier(config):
        raise _not_a_policy(f"a reward model or classifier ({config.architectures[0]})", where)
    set_dropout(config, dropout, where)
    policy, missing = load_plain(AutoModelForCausalLM, where, model, config)
    if missing:
        raise UserError(
            f"weights are missing: {_few(missing)}", where=where, fix="name a complete causal language model"
        )
    policy.base_name, policy.kept_layers = _name(name_or_dir), 0
    return fit_to_tokenizer(policy, tokenizer or load_tokenizer(where, model))


def new_reward_model(
    policy_dir: str | Path,
    model: ModelSection,
    keep_layers: int = 0,
    head_init: Literal["zero", "normal"] = "normal",
    peft: PeftSection | None = None,
) -> PreTrainedModel:
    """A reward model that starts from a policy: its body, and a new scalar head.

    A zero head has no random ranking to unlearn, which counts when rankings are few. The normal one is drawn from the
    global generator with deviation 1/sqrt(d + 1), d the hidden size: Stiennon et al.'s, as in Huang et al. 2024
    (arXiv 2403.17031). `reward_mean` 0 and `reward_std` 1 go into the config.

    Args:
        policy_dir: anything `resolve_model` takes; a reward model keeps its head and has no more layers than it had. A
            policy that is an adapter is merged into its base, or goes on as the reward model's own adapter, in the
            layers that are kept.
        model: the recipe's model section.
        keep_layers: keep only the first N transformer layers; 0 keeps all.
        peft: the method by which the reward model is trained; none, or None: all weights are.

    Raises:
        UserError: no such model, weights other than the head missing, more layers asked for than it has, or a policy
            whose method is another, or cannot be merged where all weights are trained.
    """
    peft = None if peft is None or not peft.on else peft
    if adapter := find_adapter(policy_dir):
        tokenizer = load_tokenizer(adapter.folder, model)
        reward = _new_scalar(
            adapter.base.name, base_settings(adapter, model), adapter.keep_layers, head_init, tokenizer
        )
        if keep_layers:
            cut_layers(reward, keep_layers)
            reward.kept_layers = keep_layers
        adapter.check_base()
        if peft is None:
            _merge(adapter, reward)
        else:
            check_method(adapter, peft)
            load_adapter_weights(add_adapter(reward, peft), adapter, partly=True)
        return reward
    reward = _new_scalar(str(policy_dir), model, keep_layers, head_init, None)
    return reward if peft is None else add_adapter(reward, peft)


def _new_scalar(
    name: str,
    model: ModelSection,
    keep_layers: int,
    head_init: Literal["zero", "normal"],
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    where = resolve_model(name)
    config = load_config(where, model)
    set_dropout(config, 0.0, where)
    config.num_labels = 1
    reward, missing = load_plain(AutoModelForSequenceClassification, where, model, config)
    head = scalar_head(reward, where)
    if others := [name for name in missing if not name.startswith(HEAD)]:
        raise UserError(f"weights are missing: {_few(others)}", where=where, fix="name a complete language model")
    if missing:
        with writable([head.weight]):
            nn.init.normal_(head.weight, std=0.0 if head_init == "zero" else 1 / math.sqrt(head.in_features + 1))
    if keep_layers:
        cut_layers(reward, keep_layers)
    reward.config.reward_mean, reward.config.reward_std = 0.0, 1.0
    reward.base_name, reward.kept_layers = _name(name), keep_layers
    return fit_to_tokenizer(reward, tokenizer or load_tokenizer(where, model))


def load_reward_model(name_or_dir: str | Path, model: ModelSection, merged: bool = False) -> PreTrainedModel:
    """A trained reward model, dropout off, in eval mode; `reward_mean` and `reward_std` default to 0 and 1.

    Args:
        merged: as of `load_policy`.

    Raises:
        UserError: no such model, a head or other weights missing, a head of more than one score, or another base than
            the adapter's.
    """
    if adapter := find_adapter(name_or_dir):
        if not adapter.scalar:
            raise _no_reward_model("a policy's adapter", str(name_or_dir))
        tokenizer = load_tokenizer(adapter.folder, model)
        # The zero head takes no draw from the generator, and the adapter brings its own.
        reward = _new_scalar(adapter.base.name, base_settings(adapter, model), adapter.keep_layers, "zero", tokenizer)
        return _with_adapter(adapter, reward, merged)
    where = resolve_model(name_or_dir)
    config = load_config(where, model)
    set_dropout(config, 0.0, where)
    if not is_classifier(config) or config.num_labels != 1:
        raise _no_reward_model(f"{(config.architectures or ['unknown'])[0]}, {config.num_labels} labels", where)
    reward, missing = load_plain(AutoModelForSequenceClassification, where, model, config)
    if missing:
        raise UserError(
            f"the reward model's head or other weights were not loaded: {_few(missing)}",
            where=where,
            fix="save the reward model again; scores of a random head mean nothing",
        )
    scalar_head(reward, where)
    for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
        if not hasattr(reward.config, name):
            setattr(reward.config, name, default)
    reward.base_name, reward.kept_layers = _name(name_or_dir), 0
    return fit_to_tokenizer(reward, load_tokenizer(where, model))


def base_settings(adapter: AdapterFolder, model: ModelSection) -> ModelSection:
    """The settings to load an adapter's base with: code that it brings is run if the recipe names that very base."""
    trusted = model.trust_remote_code and adapter.base.name == _name(model.name)
    return model.model_copy(update={"trust_remote_code": trusted})


def attach_adapter(
    adapter: AdapterFolder, model: PreTrainedModel, round_to_model_dtype: bool = False
) -> PreTrainedModel:
    """A plain model of the adapter's base with the adapter on it, in place, trainable and normalised.

    Args:
        round_to_model_dtype: see `load_policy`.

    Raises:
        UserError: when the file holds other weights than the method trains.
    """
    # The weights that are drawn here are replaced: no other draw of the run is to depend on them.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        add_adapter(model, adapter.peft, round_to_model_dtype)
    load_adapter_weights(model, adapter)
    return _normalised_as(adapter, model).eval()


def _with_adapter(
    adapter: AdapterFolder, model: PreTrainedModel, merged: bool, round_to_model_dtype: bool = False
) -> PreTrainedModel:
    """Its base with the adapter on it, or in it."""
    adapter.check_base()
    if not merged or why_not_mergeable(adapter.peft):
        return attach_adapter(adapter, model, round_to_model_dtype)
    _merge(adapter, model)
    return _normalised_as(adapter, model)


def _normalised_as(adapter: AdapterFolder, model: PreTrainedModel) -> PreTrainedModel:
    if adapter.scalar:
        model.config.reward_mean, model.config.reward_std = adapter.reward_mean, adapter.reward_std
    return model


def _merge(adapter: AdapterFolder, model: PreTrainedModel) -> None:
    if reason := why_not_mergeable(adapter.peft):
        raise UserError(f"the adapter would have to be merged, and {reason}", str(adapter.folder), "train it as one")
    merge_into(model, adapter.tensors(), adapter.peft)


def check_method(adapter: AdapterFolder, peft: PeftSection) -> None:
    """Raise UserError unless the adapter is of this method and these settings."""
    if adapter.peft != peft:
        raise UserError(
            f"the model is an adapter of {settings_of(adapter.peft)}, and the recipe trains {settings_of(peft)}",
            str(adapter.folder),
            "run the SFT stage again with this recipe, or set model.peft as it was",
        )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    merged: bool = False,
) -> None:
    """Write a plain Hugging Face folder (safetensors), or the adapter alone where there is one on the model.

    The folder appears whole or not at all. `model` itself is left as it is: merging works on tensors of its own. Call
    it on one process.

    Args:
        tokenizer: saved beside it, chat template included.
        folder: where; an older model there is replaced.
        state_dict: the model's weights under its own names, for weights that are partitioned over processes.
        merged: a plain folder in any case, the adapter written into the weights.
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
    """Hold a row length of the recipe to the model's context.

    Args:
        tokens: of the longest row that `field` of the recipe allows.

    Raises:
        UserError: when the model has no positions for it, or layers whose window virtual tokens would fall out of.
    """
    limit, virtual = getattr(model.config, "max_position_embeddings", None), positions_taken(peft_of(model))
    if limit and tokens + virtual > limit:
        more = f" and {virtual} virtual ones" if virtual else ""
        raise UserError(
            f"rows may have {tokens} tokens{more}, and {model.config.model_type} has positions for {limit}",
            where=field,
            fix="lower it, or take a model with a longer context",
        )
    window = attention_window(model.config)
    if virtual and 0 < window < tokens + virtual:
        # How many of them a short row still sees would then depend on the padding between.
        raise UserError(
            f"rows may have {tokens} tokens and {virtual} virtual ones, and layers of {model.config.model_type} see "
            f"{window} alone",
            where=field,
            fix="lower it, or take a method without virtual tokens, as lora",
        )


def recompute_activations(model: nn.Module) -> None:
    """Trade time for memory: the backward pass computes each layer's activations again (gradient checkpointing).

    transformers does so in training mode only. That changes no number here, for every dropout but SFT's is set to 0.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()


def _name(name: str | Path) -> str:
    """What a base is called in an adapter's record: that of a folder holds wherever a program is started."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() and str(name) not in BUILT_IN else str(name)


def _not_a_policy(what: str, where: str) -> UserError:
    return UserError(f"this is {what}, not a policy", where=where, fix="name a causal language model")


def _no_reward_model(what: str, where: str) -> UserError:
    return UserError(
        f"this is no reward model ({what})",
        where=where,
        fix="name a sequence-classification folder with one label, such as RUN/reward/model",
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
