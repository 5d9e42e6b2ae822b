"""LoRA adapters through peft: where they sit, and their merge into plain weights."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config import LoraSection
from rlhf.errors import UserError

ADAPTER = "default"


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters sit around the model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of transformer layers, whatever its architecture calls it.

    Raises:
        UserError: when there is no list as long as the config's number of layers.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise UserError(
        f"the transformer layers of {type(model).__name__} were not found",
        where="model.name",
        fix="use a decoder architecture with one list of layers (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)",
    )


def add_lora(
    model: PreTrainedModel, lora: LoraSection, task: Literal["CAUSAL_LM", "SEQ_CLS"], one_type: bool = False
) -> nn.Module:
    """Adapters on every linear map of the transformer layers (or of the last ones); all else is frozen.

    The scalar head of a reward model stays trainable. Adapter weights are drawn from torch's global generator. They are
    float32, but for `one_type` and under ZeRO-3, which joins trained parameters of one type only: its optimiser steps
    float32 copies.

    Raises:
        UserError: when there are fewer layers than `lora.last_layers`.
    """
    from peft import LoraConfig, get_peft_model

    layers = decoder_layers(model)
    if lora.last_layers > len(layers):
        raise UserError(
            f"the model has {len(layers)} layers", where=f"lora.last_layers={lora.last_layers}", fix="name fewer"
        )
    linear = [
        (name.rsplit(".", 1)[-1], module)
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    config = LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=sorted({name for name, _ in linear}),
        layers_to_transform=list(range(len(layers) - lora.last_layers, len(layers))) if lora.last_layers else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in linear),
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    one_type = one_type or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return get_peft_model(model, config, autocast_adapter_dtype=not one_type)


def merged_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights, W + scaling * B A where an adapter sits, computed on the CPU.

    Args:
        model: a model that `add_lora` returned; it is not changed.
        state_dict: its weights, by its own names.
    """
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    merged = {}
    for name, weight in state_dict.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if leaf == "weight":
            layer = adapted[owner]
            a, b = (state_dict[f"{owner}.lora_{x}.{ADAPTER}.weight"].cpu().float() for x in "AB")
            delta = (b @ a) * layer.scaling[ADAPTER]
            delta = delta.T if layer.fan_in_fan_out else delta
            weight = (weight.cpu().float() + delta).to(weight.dtype)
        plain = name.removeprefix(prefix).replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        merged[plain] = weight
    return merged
