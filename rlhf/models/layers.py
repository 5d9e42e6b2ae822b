"""Find, cut and size the transformer layers of a model, whatever its architecture calls their list."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import UserError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of transformer layers; raise UserError if none is as long as the config says."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    fix = "use a decoder architecture with one list of layers (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)"
    raise UserError(f"the transformer layers of {type(model).__name__} were not found", "model.name", fix)


def kv_heads(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of heads that have keys and values, and the width of one."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cut_layers(model: PreTrainedModel, keep: int) -> None:
    """Keep the first `keep` transformer layers, in place; raise UserError if the model has fewer."""
    layers = decoder_layers(model)
    if keep > len(layers):
        what = f"the model has {len(layers)} layers and {keep} are to be kept"
        raise UserError(what, where="reward.keep_layers", fix="keep fewer")
    del layers[keep:]
    model.config.num_hidden_layers = keep
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:keep]
