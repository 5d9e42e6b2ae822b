"""Loading and saving of policies and reward models, in the standard Hugging Face layout.

Every load is checked: weights that the folder did not bring are an error, never a freshly initialised layer.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.adapters import add_lora, decoder_layers, is_adapted, merged_state_dict
from rlhf.cache import publish
from rlhf.config import ModelSection
from rlhf.errors import UserError
from rlhf.placement import filled, full_shape
from rlhf.quiet import quiet_transformers, say
from rlhf.resolve import not_loaded, resolve_model
from rlhf.tokenizer import load_tokenizer, same_tokenizer

__all__ = [
    "add_lora",
    "check_context",
    "cut_layers",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "new_reward_model",
    "recompute_activations",
    "resolve_model",
    "same_tokenizer",
    "save_model",
]

RESIDUAL_DROPOUT = ("resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "dropout")


def load_policy(
    name_or_dir: str | Path,
    model: ModelSection,
    dropout: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """A causal language model that fits its tokenizer (`tokenizer`, else the one beside it), dropout set, in eval mode.

    Its generation config keeps special ids only, so that sampling is from the plain softmax.

    Raises:
        UserError: no such model, a reward model, or weights missing from it.
    """
    where = resolve_model(name_or_dir)
    config = _load_config(where, model)
    if _is_classifier(config):
        raise UserError(
            f"this is a reward model or classifier ({config.architectures[0]}), not a policy",
            where=where,
            fix="name a causal language model",
        )
    _set_dropout(config, dropout, where)
    policy, missing = _load(AutoModelForCausalLM, where, model, config)
    if missing:
        raise UserError(
            f"weights are missing: {_few(missing)}", where=where, fix="name a complete causal language model"
        )
    return _fit_to_tokenizer(policy, tokenizer or load_tokenizer(where, model.prompt_format, model.trust_remote_code))


def new_reward_model(
    policy_dir: str | Path,
    model: ModelSection,
    keep_layers: int = 0,
    head_init: Literal["zero", "normal"] = "normal",
) -> PreTrainedModel:
    """A reward model that starts from a policy: its body, and a new scalar head.

    A zero head has no random ranking to unlearn, which counts when rankings are few. The normal one is drawn from the
    global generator with deviation 1/sqrt(d + 1), d the hidden size: Stiennon et al.'s, as in Huang et al. 2024
    (arXiv 2403.17031). `reward_mean` 0 and `reward_std` 1 go into the config.

    Args:
        policy_dir: anything `resolve_model` takes; a reward model keeps its head.
        model: the recipe's model section.
        keep_layers: keep only the first N transformer layers; 0 keeps all.

    Raises:
        UserError: no such model, weights other than the head missing, or more layers asked for than it has.
    """
    where = resolve_model(policy_dir)
    config = _load_config(where, model)
    _set_dropout(config, 0.0, where)
    config.num_labels = 1
    reward, missing = _load(AutoModelForSequenceClassification, where, model, config)
    head = _head(reward, where)
    if others := [name for name in missing if not name.startswith("score.")]:
        raise UserError(f"weights are missing: {_few(others)}", where=where, fix="name a complete language model")
    if missing:
        with filled([head.weight]):
            nn.init.normal_(head.weight, std=0.0 if head_init == "zero" else 1 / math.sqrt(head.in_features + 1))
    if keep_layers:
        cut_layers(reward, keep_layers)
    reward.config.reward_mean, reward.config.reward_std = 0.0, 1.0
    return _fit_to_tokenizer(reward, load_tokenizer(where, model.prompt_format, model.trust_remote_code))


def load_reward_model(name_or_dir: str | Path, model: ModelSection) -> PreTrainedModel:
    """A trained reward model, dropout off, in eval mode; `reward_mean` and `reward_std` default to 0 and 1.

    Raises:
        UserError: no such model, a head or other weights missing, or a head of more than one score.
    """
    where = resolve_model(name_or_dir)
    config = _load_config(where, model)
    _set_dropout(config, 0.0, where)
    if not _is_classifier(config) or config.num_labels != 1:
        raise UserError(
            f"this is no reward model ({(config.architectures or ['unknown'])[0]}, {config.num_labels} labels)",
            where=where,
            fix="name a sequence-classification folder with one label, such as RUN/reward/model",
        )
    reward, missing = _load(AutoModelForSequenceClassification, where, model, config)
    if missing:
        raise UserError(
            f"the reward model's head or other weights were not loaded: {_few(missing)}",
            where=where,
            fix="save the reward model again; scores of a random head mean nothing",
        )
    _head(reward, where)
    for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
        if not hasattr(reward.config, name):
            setattr(reward.config, name, default)
    return _fit_to_tokenizer(reward, load_tokenizer(where, model.prompt_format, model.trust_remote_code))


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a plain Hugging Face folder (safetensors), adapters merged; it appears whole or not at all.

    `model` itself is left as it is: merging works on tensors of its own. Call it on one process.

    Args:
        model: a transformers model, or one with LoRA adapters around it.
        tokenizer: saved beside it, chat template included.
        folder: where; an older model there is replaced.
        state_dict: the model's weights under its own names, for weights that are partitioned over processes.
    """
    folder = Path(folder)
    weights = model.state_dict() if state_dict is None else state_dict
    plain = model.get_base_model() if is_adapted(model) else model
    if is_adapted(model):
        weights = merged_state_dict(model, weights)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet_transformers():
        plain.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
    publish(partial, folder)


def check_context(model: PreTrainedModel, tokens: int, field: str) -> None:
    """Hold a row length of the recipe to the model's context.

    Args:
        tokens: of the longest row that `field` of the recipe allows.

    Raises:
        UserError: when the model has no positions for it.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"rows may have {tokens} tokens, and {model.config.model_type} has positions for {limit}",
            where=field,
            fix="lower it, or take a model with a longer context",
        )


def recompute_activations(model: nn.Module) -> None:
    """Trade time for memory: the backward pass computes each layer's activations again (gradient checkpointing).

    transformers does so in training mode only. That changes no number here, for every dropout but SFT's is set to 0.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()


def _load_config(where: str, model: ModelSection) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_loaded("model", where, error) from error
    if not getattr(config, "is_causal", True):
        raise UserError(
            "its attention sees what comes after a token (is_causal is false)",
            where=where,
            fix="name a causal language model; nothing here could sample from this one",
        )
    return config


def _load(
    kind: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    where: str,
    model: ModelSection,
    config: PretrainedConfig,
) -> tuple[PreTrainedModel, list[str]]:
    """The model in eval mode and the names of weights that the folder did not bring (tied ones are not missing)."""
    try:
        with quiet_transformers():
            loaded, info = kind.from_pretrained(
                where,
                config=config,
                dtype=getattr(torch, model.dtype),
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise not_loaded("model", where, error) from error
    return loaded.eval(), sorted(info["missing_keys"])


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _head(reward: PreTrainedModel, where: str) -> nn.Linear:
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise UserError(
            f"{type(reward).__name__} has no plain `score` head",
            where=where,
            fix="use a decoder architecture (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)",
        )
    return head


def _set_dropout(config: PretrainedConfig, rate: float, where: str) -> None:
    """Residual dropout at `rate`, every other dropout of the config at 0."""
    found = False
    for name, value in config.to_dict().items():
        # Every architecture has its own names: attn_pdrop, embd_pdrop, attention_dropout, layerdrop, ...
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            residual = name in RESIDUAL_DROPOUT
            setattr(config, name, rate if residual else 0.0)
            found = found or residual
    if rate and not found:
        say(f"{where}: {config.model_type} has no residual dropout; sft.dropout={rate} does nothing")


def _fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Embedding rows for every token, special ids that agree, and a generation config that says nothing else."""
    rows = full_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        both = [model.get_input_embeddings(), model.get_output_embeddings()]
        heads = [head for head in both if head is not None]
        with torch.no_grad(), filled([p for head in heads for p in head.parameters()]):
            for head in heads:
                # At the mean, a token that was never trained is as unlikely as the average one.
                head.weight[rows:] = head.weight[:rows].mean(0)
                if getattr(head, "bias", None) is not None:
                    head.bias[rows:] = head.bias[:rows].mean()
    eos = model.config.eos_token_id or tokenizer.eos_token_id
    if getattr(model, "generation_config", None) is not None:
        eos = model.generation_config.eos_token_id or eos
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def cut_layers(model: PreTrainedModel, keep: int) -> None:
    """Keep the first `keep` transformer layers, in place.

    Raises:
        UserError: when the model has fewer.
    """
    layers = decoder_layers(model)
    if keep > len(layers):
        raise UserError(
            f"the model has {len(layers)} layers and {keep} are to be kept",
            where="reward.keep_layers",
            fix="keep fewer",
        )
    del layers[keep:]
    model.config.num_hidden_layers = keep
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:keep]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
