"""Sampling with transformers' generate, called directly on padded prompts."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import read_order, report, seconds_of


def main() -> None:
    """Sample the ordered prompts `rounds` times after a short warm-up."""
    order = read_order()
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=getattr(torch, order["dtype"])).eval()
    model.generation_config.eos_token_id = None  # no response ends early
    width = max(map(len, order["prompts"]))
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in order["prompts"]])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in order["prompts"]])

    def sample(tokens: int = order["new_tokens"]) -> None:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        full = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **how)
        assert full.shape == (len(ids), width + tokens)

    torch.manual_seed(order["seed"])
    sample(4)
    report(seconds=[seconds_of(sample) for _ in range(order["rounds"])])


if __name__ == "__main__":
    main()
