"""Load plain models from a folder or the Hub, set their dropout, and fit them to their tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.data.chat_template import stop_ids
from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models.layers import freeze_other_modalities
from rlhf.models.placement import full_shape, writable
from rlhf.models.resolve import hub_revision, not_loaded, refuse_adapter_beside
from rlhf.system.console import note
from rlhf.system.quiet import quiet_transformers

RESIDUAL_DROPOUT = ("resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "dropout")


def load_config(where: str, model: ModelSection) -> PretrainedConfig:
    """Return the config of a causal model.

    Raises UserError if it cannot be read, if the model is not causal, or if an adapter lies beside whole weights.
    """
    refuse_adapter_beside(where)
    repository, revision = hub_revision(where)
    try:
        config = AutoConfig.from_pretrained(repository, revision=revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        file = Path(where) / "config.json"
        raise not_loaded("model's config", str(file) if file.is_file() else where, error) from error
    if not getattr(config, "is_causal", True):
        fix = "name a causal language model; nothing here could sample from this one"
        raise UserError("its attention sees what comes after a token (is_causal is false)", where, fix)
    if getattr(config.get_text_config(), "output_router_logits", False):
        # Nothing here trains the balance of experts, whose loss would be added up over the padding of a batch.
        config.get_text_config().output_router_logits = False
    return config


def load_plain(
    kind: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] | type[AutoModelForSequenceClassification],
    where: str,
    model: ModelSection,
    config: PretrainedConfig,
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in eval mode, and the names of weights that `where` lacks (tied ones do not count).

    Raises UserError if the model cannot be loaded, or has no such attention kernel.
    """
    check_attention(kind, config, model.attention)
    repository, revision = hub_revision(where)
    try:
        with quiet_transformers():
            loaded, info = kind.from_pretrained(
                repository,
                revision=revision,
                config=config,
                dtype=getattr(torch, model.dtype),
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise not_loaded("model", where, error) from error
    freeze_other_modalities(loaded)
    return loaded.eval(), sorted(info["missing_keys"])


def check_attention(
    kind: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] | type[AutoModelForSequenceClassification],
    config: PretrainedConfig,
    attention: str,
) -> None:
    """Raise UserError if transformers has no such kernel for the architecture; code of the Hub is let pass."""
    if type(config) not in kind._model_mapping:
        return
    architecture = kind._model_mapping[type(config)]
    for each in architecture if isinstance(architecture, tuple) else (architecture,):
        kernels = {"sdpa": each._supports_sdpa, "flash_attention_2": each._supports_flash_attn, "eager": True}
        if not kernels[attention]:
            other = "sdpa" if kernels["sdpa"] else "eager"
            what = f"transformers has no {attention} attention for {each.__name__}"
            raise UserError(what, "model.attention", f"set model.attention={other}")


def is_classifier(config: PretrainedConfig) -> bool:
    """Return whether the config is a reward model's or another classifier's."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def is_reward_model(config: PretrainedConfig) -> bool:
    """Return whether the config is that of a classifier with a single score."""
    return is_classifier(config) and config.num_labels == 1


def scalar_head(reward: PreTrainedModel, where: str) -> nn.Linear:
    """Return the head [1, H] of a reward model; raise UserError if it is not one linear map to one score."""
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        fix = "use a decoder architecture (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)"
        raise UserError(f"{type(reward).__name__} has no plain `score` head", where, fix)
    return head


def fold_scale(reward: PreTrainedModel) -> None:
    """Divide a reward model's head by `reward_std`, so that any program gets scores of that scale.

    The head has no bias: `reward_mean`, divided too, is still subtracted by whoever wants demonstrations to score 0.
    """
    config = reward.config
    with torch.no_grad():
        reward.score.weight.div_(config.reward_std)
    config.reward_mean, config.reward_std = config.reward_mean / config.reward_std, 1.0


def set_dropout(config: PretrainedConfig, rate: float, where: str) -> None:
    """Set residual dropout to the probability `rate`, and every other dropout of the config to 0."""
    found = False
    text = config.get_text_config()
    for part in [config] if text is config else [config, text]:
        for name, value in part.to_dict().items():
            # Every architecture has its own names: attn_pdrop, embd_pdrop, attention_dropout, layerdrop, ...
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                residual = name in RESIDUAL_DROPOUT
                setattr(part, name, rate if residual else 0.0)
                found = found or residual
    if rate and not found:
        note(f"{where}: {config.model_type} has no residual dropout; sft.dropout={rate} does nothing")


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Give a model embedding rows for every token and the tokenizer's special ids; return it.

    A new row is the mean of the others: a token that was never trained is as unlikely as the average one. The
    generation config keeps special ids only: the end of a turn first, then the others at which a response stops. Rows
    beyond the last token, as padded vocabularies have, are no tokens: `token_count` on the model leaves them out of
    every distribution.
    """
    model.token_count = 1 + max(tokenizer.get_vocab().values())
    rows = full_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        both = [model.get_input_embeddings(), model.get_output_embeddings()]
        heads = [head for head in both if head is not None]
        with torch.no_grad(), writable([p for head in heads for p in head.parameters()]):
            for head in heads:
                head.weight[rows:] = head.weight[:rows].mean(0)
                if getattr(head, "bias", None) is not None:
                    head.bias[rows:] = head.bias[:rows].mean()
    if getattr(model, "generation_config", None) is not None:
        stops = stop_ids(tokenizer, model)
        eos = stops if len(stops) > 1 else stops[0]
        bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model
