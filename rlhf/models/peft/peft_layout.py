"""Translate an adapter to peft's own layout and back, so that PeftModel, vLLM and TRL load the folder.

    adapter_config.json          peft's config: the method, its sizes, and the modules that it is on
    adapter_model.safetensors    the trained weights by peft's names, with the head of a reward model (modules_to_save)

peft stores virtual tokens as one matrix, as they are put before a row, and not the network that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.model_config import KV_PREFIX_METHODS, VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.layers import kv_heads
from rlhf.models.peft.merging import LORA_A, LORA_B, MAGNITUDE, SCALE
from rlhf.models.peft.methods import ia3_config, lora_config
from rlhf.models.peft.virtual_tokens import ENCODER, made_tokens
from rlhf.models.resolve import PEFT_CONFIG, PEFT_WEIGHTS, hub_revision

ONE_TO_ONE = ("lora", "dora", "ia3", "prompt", "p_tuning_v2")  # peft stores the very weights that are trained
DERIVED = ("prefix", "p_tuning")  # it stores what their network makes
HEAD = "score"
TOKENS = f"{ENCODER}embedding.weight"
PROMPT = "prompt_embeddings"
PREFIX, PREFIX_OF_TOKENS = "base_model.model.", "base_model."  # peft wraps a model with virtual tokens once less
PEFT_PARTS = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector", SCALE: "ia3_l"}


def write_peft_layout(model: PreTrainedModel, weights: Mapping[str, Tensor], base: str, folder: Path) -> None:
    """Write the two files of peft for a model whose method is in ONE_TO_ONE or DERIVED.

    `weights` are the trained weights by their names in the model, and `base` is where its base is found.
    """
    peft: PeftSection = model.peft_method
    stored = {_peft_name(name, peft): tensor for name, tensor in weights.items() if ENCODER not in name}
    if peft.method in VIRTUAL_TOKEN_METHODS:
        stored[PROMPT] = made_tokens(model, weights)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}, folder / PEFT_WEIGHTS)
    config = _tokens_config(model, peft) if peft.method in VIRTUAL_TOKEN_METHODS else _maps_config(model, weights, peft)
    config.base_model_name_or_path, config.revision = hub_revision(base)
    config.inference_mode = True
    config.task_type = "SEQ_CLS" if _has_head(model) else "CAUSAL_LM"
    config.modules_to_save = [HEAD] if _has_head(model) else None
    # peft's sets have another order in every process.
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    (folder / PEFT_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def own_names(stored: Mapping[str, Tensor], peft: PeftSection) -> dict[str, Tensor]:
    """Return the weights of peft's file by their names in the model; virtual tokens by TOKENS, without their body's.

    A name that is none of a weight of the method is kept.
    """
    return {_own_name(name, peft): tensor for name, tensor in stored.items()}


def _peft_name(name: str, peft: PeftSection) -> str:
    if peft.method in VIRTUAL_TOKEN_METHODS:
        return f"{PREFIX_OF_TOKENS}{name}"
    for part, renamed in PEFT_PARTS.items():
        if name.endswith(f".{part}"):
            return f"{PREFIX}{name.removesuffix(part)}{renamed}"
    return f"{PREFIX}{name}"


def _own_name(name: str, peft: PeftSection) -> str:
    if peft.method in VIRTUAL_TOKEN_METHODS:
        return TOKENS if name == PROMPT else name.removeprefix(PREFIX_OF_TOKENS)
    name = name.removeprefix(PREFIX)
    for part, renamed in PEFT_PARTS.items():
        if name.endswith(f".{renamed}"):
            return f"{name.removesuffix(renamed)}{part}"
    return name


def _has_head(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, HEAD, None), nn.Module)


def _maps_config(model: PreTrainedModel, weights: Mapping[str, Tensor], peft: PeftSection) -> Any:
    """Return the config of a method on linear maps, with every map by its whole name."""
    first = SCALE if peft.method == "ia3" else LORA_A
    linear = [name.removesuffix(f".{first}") for name in weights if name.endswith(f".{first}")]
    transposed = any(isinstance(model.get_submodule(name).base_layer, Conv1D) for name in linear)
    if peft.method != "ia3":
        return lora_config(linear, transposed, peft)
    inner = [name for name in linear if weights[f"{name}.{SCALE}"].shape[0] == 1]  # [1, in] scales inputs
    return ia3_config(linear, inner, transposed)


def _tokens_config(model: PreTrainedModel, peft: PeftSection) -> Any:
    """Return the config of virtual tokens that no network makes, whatever has made them."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    heads, size = kv_heads(model.config)
    sizes = {"num_virtual_tokens": peft.virtual_tokens, "num_transformer_submodules": 1}
    sizes |= {"num_layers": model.config.num_hidden_layers}
    if peft.method in KV_PREFIX_METHODS:
        return PrefixTuningConfig(**sizes, token_dim=heads * size, num_attention_heads=heads, prefix_projection=False)
    sizes |= {"num_attention_heads": model.config.num_attention_heads}
    sizes |= {"token_dim": model.get_input_embeddings().embedding_dim}
    if peft.method == "prompt":
        return PromptTuningConfig(**sizes)
    return PromptEncoderConfig(**sizes, encoder_hidden_size=peft.hidden)
