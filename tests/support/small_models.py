"""Make models of two layers, and compute by hand the log-probabilities that they give."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    MistralConfig,
    OlmoeConfig,
    PixtralVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

EOS = 2
PAIRS = [([5, 6, 7], [8, 9, EOS]), ([10], [11, 12, 13, 14, EOS]), ([15, 16, 17, 18, 19], [20])]


def llama(cls: type = LlamaForCausalLM, seed: int = 0, **settings: object) -> torch.nn.Module:
    """Return a Llama with grouped query attention in evaluation mode; `settings` replace those of its config."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    defaults |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    defaults |= {"pad_token_id": 0, "eos_token_id": EOS}
    return cls(LlamaConfig(**(defaults | settings))).eval()


def gpt2() -> torch.nn.Module:
    """Return a GPT-2 in evaluation mode; its positions are learned."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256}
IDS = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 3}
# Architectures whose logits are more than the head's output, with settings that change them much.
CHANGED_LOGITS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 64}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
}
ARCHITECTURES = CHANGED_LOGITS | {"olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2})}


def write_architecture(
    kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path, **settings: object
) -> PreTrainedModel:
    """Write a random model of an architecture with the tokenizer, and return it, with eager attention, to compare."""
    cls, own = ARCHITECTURES[kind]
    torch.manual_seed(1)
    config = cls(vocab_size=len(tokenizer), **(SHAPE | IDS | own | settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


TEXT = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def write_multimodal(kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write a random model of text and images, mistral3 or gemma3, with two text layers and three of vision."""
    torch.manual_seed(1)
    text = TEXT | IDS | {"vocab_size": len(tokenizer), "sliding_window": 64 if kind == "gemma3" else None}
    image = {"image_token_index": len(tokenizer) - 1}
    if kind == "mistral3":
        config = Mistral3Config(text_config=MistralConfig(**text), vision_config=PixtralVisionConfig(**VISION), **image)
    else:
        parts = {"text_config": Gemma3TextConfig(**text), "vision_config": SiglipVisionConfig(**VISION)}
        config = Gemma3Config(**parts, mm_tokens_per_image=4, **image)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def by_hand(
    model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float, tokens: int | None = None
) -> list[float]:
    """Return the log-probability of each response token, from the whole logits of one row without padding.

    Of the vocabulary only the first `tokens` count.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, :, :tokens].double() / temperature
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1]
        out.append(float(row[token] - torch.logsumexp(row, 0)))
    return out
