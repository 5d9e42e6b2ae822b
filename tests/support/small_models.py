"""Make models of two layers and 50 tokens, and compute by hand the log-probabilities that they give."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

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
