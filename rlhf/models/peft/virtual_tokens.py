"""Put virtual tokens into a plain transformers model: prompt tuning, P-tuning, prefix tuning and P-tuning v2.

V trained tokens that are not words precede every row. There are two kinds:

    embeddings          prompt (Lester et al. 2021), p_tuning (Liu et al. 2021, made by a network): they go through all
                        layers as words do
    keys and values     prefix (Li & Liang 2021, made by a network), p_tuning_v2 (Liu et al. 2022): they are put into
                        every layer's cache, and no layer computes them

Callers do not see them: the caller's positions, masks and hidden states are those of the real tokens, whose positions
inside are V, V + 1, ... The encoders are peft's. Its wrapper is not used: it drops explicit positions, by which
left-padded rows differ by up to 0.5 nats, and it hides the body, which scoring calls without the LM head.

Shapes: B rows of L tokens, V virtual ones, H hidden size, N key-value heads of size D.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from rlhf.errors import UserError
from rlhf.model_config import KV_PREFIX_METHODS, VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.layers import kv_heads, text_body
from rlhf.models.placement import full_shape

ENCODER = "virtual_tokens.encoder."  # in the names of all weights that are trained


class VirtualTokens(nn.Module):
    """The trained tokens, with the network that makes them if the method has one; a child of the model's body.

    `embeddings` are the word embeddings, from which prompt tuning draws its initial tokens.
    """

    def __init__(self, config: PretrainedConfig, embeddings: nn.Module, peft: PeftSection) -> None:
        super().__init__()
        self.count, self.cached = peft.virtual_tokens, peft.method in KV_PREFIX_METHODS
        self.heads, self.size = _heads(config) if self.cached else (0, 0)
        self.encoder = _encoder(config, embeddings, peft, self.heads * self.size)
        weight: Any = embeddings.weight
        self.encoder.to(device=weight.device, dtype=torch.float32)

    def forward(self) -> Tensor:
        """Return embeddings [V, H], or keys and values layer after layer [2 layers, N, V, D]."""
        weight = self.encoder.embedding.weight
        made = self.encoder(torch.arange(self.count, device=weight.device))
        return made.view(self.count, -1, self.heads, self.size).permute(1, 2, 0, 3) if self.cached else made


def add_virtual_tokens(model: PreTrainedModel, peft: PeftSection) -> None:
    """Put virtual tokens before every row that the model's body sees, in place.

    They are drawn from the global generator. The body's `forward` keeps its arguments, and hides the cache positions of
    virtual tokens. Raises UserError for MPT, whose attention counts distances in columns, so that a row's padding would
    count as distance to the virtual tokens; for a multimodal model, which may make the masks of its text decoder before
    it calls it; or if the number of key-value heads is unknown.
    """
    if model.config.model_type == "mpt":
        what = "MPT's attention counts padding as distance, and virtual tokens stand before a row's padding"
        fix = "take a method without virtual tokens, as lora, or another architecture"
        raise UserError(what, f"model.peft.method={peft.method}", fix)
    if text_body(model) is not model:
        what = f"{model.config.model_type} takes more than text, and virtual tokens stand before text alone"
        raise UserError(what, f"model.peft.method={peft.method}", "take a method without virtual tokens, as lora")
    # OPT's language model and its body both call the decoder, so the tokens go in there.
    body: Any = model.get_decoder()
    body.virtual_tokens = VirtualTokens(model.config, model.get_input_embeddings(), peft)
    body.forward = partial(_forward, body, body.forward)


def made_tokens(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens that the trained weights make, as peft stores them; nothing of the model is called.

    `weights` are named as in the model. Embeddings are [V, H], and keys and values [V, 2 layers * N * D].
    """
    trained = {name.partition(ENCODER)[2]: tensor for name, tensor in weights.items() if ENCODER in name}
    if list(trained) == ["embedding.weight"]:
        return trained["embedding.weight"]
    peft: PeftSection = model.peft_method
    heads, size = _heads(model.config) if peft.method in KV_PREFIX_METHODS else (0, 0)
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced
        encoder = _encoder(model.config, model.get_input_embeddings(), peft, heads * size)
    encoder.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in trained.items()})
    with torch.no_grad():
        return encoder(torch.arange(peft.virtual_tokens))


def positions_taken(peft: PeftSection | None) -> int:
    """Return the positions of the model's context that virtual tokens take."""
    return peft.virtual_tokens if peft is not None and peft.method in VIRTUAL_TOKEN_METHODS else 0


def attention_window(config: PretrainedConfig) -> int:
    """Return how many tokens the narrowest layers attend to; 0 if all layers attend to all tokens."""
    if "local" in (getattr(config, "attention_layers", None) or []):  # GPT-Neo's name for them
        return config.window_size
    sliding = "sliding_attention" if getattr(config, "use_sliding_window", True) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [sliding]
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    widths = [getattr(config, names[kind], None) for kind in kinds if kind in names]
    return min((width for width in widths if width), default=0)


def _forward(
    body: Any,
    plain: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Run the body's forward with virtual tokens before the rows.

    Args:
        attention_mask: [B, tokens] or [B, 1, queries, tokens], of real tokens, cached ones included.
        position_ids: [B, L], counted from the first real token of a row.
        past_key_values: filled by an earlier call, or empty; virtual tokens go into an empty cache first.
    """
    tokens: VirtualTokens = body.virtual_tokens
    if attention_mask is not None:
        # A floating-point mask is added to scores: 0 attends.
        attends = 0 if attention_mask.is_floating_point() else 1
        attention_mask = pad(attention_mask, (tokens.count, 0), value=attends)
    if position_ids is not None:
        position_ids = position_ids + tokens.count
    is_first = past_key_values is None or past_key_values.get_seq_length() == 0
    given: Any = input_ids if inputs_embeds is None else inputs_embeds
    before = 0
    if is_first and tokens.cached:
        past_key_values = _filled(past_key_values, body.config, tokens(), len(given), body.dtype)
    elif is_first:
        before = tokens.count
        words = body.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        virtual = tokens().to(words.dtype).expand(len(words), -1, -1)
        input_ids, inputs_embeds = None, torch.cat([virtual, words], 1)
        if position_ids is not None:
            first = torch.arange(before, device=position_ids.device).expand(len(position_ids), -1)
            position_ids = torch.cat([first, position_ids], 1)
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("a first pass with virtual tokens takes a mask [B, tokens] alone")
    out = plain(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        **kwargs,
    )
    out.last_hidden_state = out.last_hidden_state[:, before:]
    return out


def _filled(cache: Cache | None, config: PretrainedConfig, made: Tensor, rows: int, dtype: torch.dtype) -> Cache:
    """Return the cache with keys and values [2 layers, N, V, D] put in for every row."""
    cache = DynamicCache(config=config) if cache is None else cache
    for layer, (keys, values) in enumerate(made.to(dtype).unflatten(0, (-1, 2))):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of key-value heads, and their size; raise UserError if the config lacks the number (Falcon)."""
    if getattr(config, "multi_query", False) and not hasattr(config, "num_key_value_heads"):
        what = f"the number of key-value heads of {config.model_type} is not known"
        raise UserError(what, "model.peft.method", "take p_tuning or prompt, whose tokens are embeddings")
    return kv_heads(config)


def _encoder(config: PretrainedConfig, embeddings: nn.Module, peft: PeftSection, channels: int) -> Any:
    """Return peft's module that makes the tokens; `channels` is the width of a layer's keys, or values."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
    from peft.tuners.p_tuning import PromptEncoder
    from peft.tuners.prefix_tuning import PrefixEncoder
    from peft.tuners.prompt_tuning import PromptEmbedding

    sizes = {"num_virtual_tokens": peft.virtual_tokens, "num_transformer_submodules": 1}
    sizes |= {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
    width = full_shape(embeddings.weight)[1]
    if peft.method == "prompt":
        # Words drawn from the vocabulary: random vectors are far from everything the layers know (Lester et al. 3.1).
        drawn = PromptTuningConfig(**sizes, token_dim=width, prompt_tuning_init="SAMPLE_VOCAB")
        return PromptEmbedding(drawn, embeddings)
    if peft.method == "p_tuning":
        return PromptEncoder(PromptEncoderConfig(**sizes, token_dim=width, encoder_hidden_size=peft.hidden))
    made_by_network = peft.method == "prefix"
    sizes |= {"token_dim": channels, "encoder_hidden_size": peft.hidden}
    encoder = PrefixEncoder(PrefixTuningConfig(**sizes, prefix_projection=made_by_network))
    if not made_by_network:
        # peft draws from N(0, 1), as large as a trained model's own values, before anything is learned.
        nn.init.normal_(encoder.embedding.weight, std=getattr(config, "initializer_range", 0.02))
    return encoder
