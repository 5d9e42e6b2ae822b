"""Find, cut and size the transformer layers of a model, whatever its architecture calls their list.

A model that takes images or sound besides text is used for text alone: its text config says the sizes, and only its
text decoder has layers that count.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import UserError


def text_body(model: PreTrainedModel) -> nn.Module:
    """Return what text goes through: the text decoder of a multimodal model without its head, else the whole model."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def freeze_other_modalities(model: PreTrainedModel) -> None:
    """Freeze the weights of a multimodal model that text never goes through, as those of its vision tower."""
    body = text_body(model)
    if body is model:
        return
    used = [body, model.get_output_embeddings(), getattr(model, "score", None)]
    trained = {id(p) for part in used if isinstance(part, nn.Module) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of transformer layers; raise UserError if none is as long as the config says."""
    count = model.config.get_text_config().num_hidden_layers
    for module in text_body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    fix = "use a decoder architecture with one list of layers (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)"
    raise UserError(f"the transformer layers of {type(model).__name__} were not found", "model.name", fix)


def kv_heads(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of heads that have keys and values, and the width of one."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cut_layers(model: PreTrainedModel, keep: int) -> None:
    """Keep the first `keep` transformer layers, in place; raise UserError if the model has fewer."""
    layers = decoder_layers(model)
    if keep > len(layers):
        what = f"the model has {len(layers)} layers and {keep} are to be kept"
        raise UserError(what, where="reward.keep_layers", fix="keep fewer")
    del layers[keep:]
    config = model.config.get_text_config()
    config.num_hidden_layers = keep
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:keep]
