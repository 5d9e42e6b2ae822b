"""Add a parameter-efficient method to a transformers model, in place, and freeze everything else.

    lora, dora, ia3                          by peft, in the linear maps of the transformer layers
    adapter                                  rlhf/models/peft/bottleneck.py
    prefix, p_tuning, p_tuning_v2, prompt    rlhf/models/peft/virtual_tokens.py
    bitfit                                   the bias vectors themselves (Ben Zaken et al. 2022, arXiv 2106.10199)

The model gets no wrapper: all stages call it like any other transformers model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.model_config import VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.layers import decoder_layers
from rlhf.models.peft.bottleneck import add_bottlenecks
from rlhf.models.peft.virtual_tokens import add_virtual_tokens
from rlhf.models.placement import is_partitioned

ADAPTER = "default"  # peft's name for the one adapter of a module
# Names of linear maps in various architectures, for ia3.
KEYS_AND_VALUES = ("k_proj", "v_proj")
WITH_QUERIES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")  # one map; scaling queries is scaling keys
FEED_FORWARD_OUTPUT = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj")
WITH_BIASES = "GPT-2, GPT-NeoX, OPT, BLOOM, Phi; Qwen2 in its attention"


def peft_of(model: nn.Module) -> PeftSection | None:
    """Return the method on a model, None for a plain model."""
    return getattr(model, "peft_method", None)


def add_adapter(model: PreTrainedModel, peft: PeftSection, round_to_model_dtype: bool = False) -> PreTrainedModel:
    """Put a method on a plain model, in place, and return the model.

    What the method adds is trained, and the scalar head of a reward model; everything else is frozen. New weights are
    drawn from torch's global generator. They are float32, or the model's dtype with `round_to_model_dtype` and under
    ZeRO-3, which joins trained parameters of one dtype only (its optimiser steps float32 copies). Raises UserError if
    the architecture has nothing for the method to work on, or fewer layers than `peft.last_layers`.
    """
    if peft_of(model) is not None:
        raise ValueError("the model has a method already")
    layers = _chosen_layers(model, peft)
    round_to_model_dtype = round_to_model_dtype or any(is_partitioned(parameter) for parameter in model.parameters())
    weights = {id(parameter) for parameter in model.parameters()}
    model.requires_grad_(False)
    if peft.method == "bitfit":
        _train_biases(model, layers if peft.last_layers else [model])
    elif peft.method == "adapter":
        add_bottlenecks(layers, model.config.get_text_config().hidden_size, peft.bottleneck)
    elif peft.method in VIRTUAL_TOKEN_METHODS:
        add_virtual_tokens(model, peft)
    else:
        _inject(model, layers, peft)
    for parameter in model.parameters():
        if id(parameter) not in weights:
            if peft.method != "bitfit":  # whose vectors replace the model's own
                parameter.data = parameter.data.to(model.dtype if round_to_model_dtype else torch.float32)
            parameter.requires_grad_(True)
    if isinstance(head := getattr(model, "score", None), nn.Module):
        head.requires_grad_(True)
    model.peft_method = peft
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by name: those of its method and its head, if a method is on it."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _chosen_layers(model: PreTrainedModel, peft: PeftSection) -> Sequence[nn.Module]:
    layers = decoder_layers(model)
    if peft.last_layers > len(layers):
        what = f"the last {peft.last_layers} layers are to be trained, and the model has {len(layers)}"
        raise UserError(what, "model.peft.last_layers", fix=f"give 1 to {len(layers)}, or 0 for all")
    return layers[len(layers) - peft.last_layers :] if peft.last_layers else layers


def _train_biases(model: PreTrainedModel, parts: Sequence[nn.Module]) -> None:
    """Replace every bias in these parts of the model by a trained copy."""
    found = False
    for module in (module for each in parts for module in each.modules()):
        bias = module._parameters.get("bias")
        if bias is None:
            continue
        found = True
        if is_partitioned(bias):  # no two models share a base under ZeRO-3, so no copy is needed
            bias.requires_grad_(True)
        else:
            module.bias = nn.Parameter(bias.detach().clone())
    if not found:
        where = "" if parts[0] is model else f" in its last {len(parts)} layers"
        what = f"bitfit trains bias vectors, and {type(model).__name__} has none{where}"
        fix = f"take ia3, which is as small, or an architecture with biases: {WITH_BIASES}"
        raise UserError(what, "model.peft.method=bitfit", fix)


def _inject(model: PreTrainedModel, layers: Sequence[nn.Module], peft: PeftSection) -> None:
    from peft import inject_adapter_in_model

    inside = {module for layer in layers for module in layer.modules() if isinstance(module, (nn.Linear, Conv1D))}
    linear = {name: module for name, module in model.named_modules() if module in inside}
    transposed = any(isinstance(module, Conv1D) for module in linear.values())
    if peft.method == "ia3":
        config = ia3_config(*_ia3_maps(model, list(linear)), transposed)
    else:
        config = lora_config(list(linear), transposed, peft)
    inject_adapter_in_model(config, model, ADAPTER)
    del model.peft_config  # some libraries take a model with this attribute for a PeftModel


def lora_config(linear: list[str], transposed: bool, peft: PeftSection) -> Any:
    """Return the config of LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024) on every linear map."""
    from peft import LoraConfig

    return LoraConfig(
        r=peft.rank,
        lora_alpha=peft.alpha,
        lora_dropout=0.0,
        target_modules=linear,
        fan_in_fan_out=transposed,
        use_dora=peft.method == "dora",
    )


def ia3_config(linear: list[str], inner: list[str], transposed: bool) -> Any:
    """Return the config of IA3 (Liu et al. 2022, arXiv 2205.05638) on linear maps, of which `inner` scale inputs."""
    from peft import IA3Config

    return IA3Config(target_modules=linear, feedforward_modules=inner, fan_in_fan_out=transposed)


def _ia3_maps(model: PreTrainedModel, linear: list[str]) -> tuple[list[str], list[str]]:
    """Return the maps of keys, values and the MLP's inner activations, and those of the latter alone.

    The maps are found by name: peft's own table names queries instead of keys for half of its architectures. Raises
    UserError if no map of the architecture is known to make them.
    """

    def named(endings: Sequence[str]) -> list[str]:
        return [name for name in linear if any(f".{name}".endswith(f".{ending}") for ending in endings)]

    attention, inner = named((*KEYS_AND_VALUES, *WITH_QUERIES)), named(FEED_FORWARD_OUTPUT)
    if not attention or not inner:
        missing, kind = "the feed-forward layer's output" if attention else "keys and values", model.config.model_type
        what = f"ia3 scales keys, values and inner activations, and no linear map of {kind} is known to make {missing}"
        fix = "take lora, or another architecture (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, OPT, BLOOM, Phi, ...)"
        raise UserError(what, "model.peft.method=ia3", fix)
    return [*attention, *inner], inner


def is_plain_lora(module: nn.Module) -> bool:
    """Return whether it is peft's linear map with low-rank updates, without dropout, magnitudes or biases."""
    from peft.tuners.lora import Linear as LoraLinear

    plain = type(module) is LoraLinear and not module.merged and not module.lora_variant
    dropped = plain and any(getattr(each, "p", 0.0) for each in module.lora_dropout.values())
    return plain and not dropped and not any(module.lora_bias.values())
