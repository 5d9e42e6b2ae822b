"""What passes of a model cost, by hand and as PyTorch counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.flops import PassSize, model_cost, pass_size
from rlhf.models.loading import load_policy, new_reward_model
from rlhf.models.peft.methods import add_adapter
from rlhf.rollout.batches import build_batch
from rlhf.rollout.scoring import response_logprobs
from rlhf.training.ppo_metrics import decoding_costs

# The tiny Llama: queries and output 64 x 64, keys and values 64 x 32, three matrices of 64 x 176, in four layers.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176
LAYERS, HEAD, QUERIES = 4 * LAYER, 1024 * 64, 4 * 64
ROWS = [(3, 5), (2, 4)]  # 8 and 6 tokens: 14, of which 9 of responses; 36 + 21 pairs that see one another
FORWARD = 2 * (LAYERS * 14 + HEAD * 9) + 4 * QUERIES * 57


def lora(policy: PreTrainedModel, last_layers: int) -> torch.nn.Module:
    return add_adapter(policy, PeftSection(method="lora", rank=4, last_layers=last_layers))


def test_flops_of_the_tiny_model_by_hand(tiny_policy: PreTrainedModel) -> None:
    assert pass_size(ROWS) == PassSize(14, 9, 57)
    cost = model_cost(tiny_policy)
    assert cost.forward(pass_size(ROWS)) == FORWARD == 6398976
    assert cost.training(pass_size(ROWS)) == 3 * FORWARD  # every matrix is trained, and passes the gradient on
    assert cost.weight_bytes == 4 * (LAYERS + HEAD)
    assert cost.kv_bytes == 2 * 4 * 32 * 4  # keys and values, layers, their channels, bytes
    assert cost.parameters == LAYERS + HEAD + 4 * 2 * 64 + 64 and cost.gradient_bytes == 4 * cost.parameters
    frozen = model_cost(tiny_policy.requires_grad_(False))
    assert frozen.forward(pass_size(ROWS)) == FORWARD and frozen.backward(pass_size(ROWS)) == 0


def test_flops_of_adapters_by_hand(tiny_policy: PreTrainedModel) -> None:
    """Rank 4 on seven matrices of the last two layers: 4 x (in + out) weights each, all of them trained."""
    adapters = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 176))
    policy = lora(tiny_policy, 2)
    cost = model_cost(policy)
    assert cost.forward(pass_size(ROWS)) == FORWARD + 2 * adapters * 14
    # The gradient ends at the first adapter: neither the matrix beside it nor its own first factor pass it on.
    passed = 2 * LAYER - 64 * 64 + adapters - 4 * 64
    assert cost.backward(pass_size(ROWS)) == 2 * ((passed + adapters) * 14 + HEAD * 9) + 8 * (2 * 64) * 57
    assert cost.parameters == adapters


def test_a_reward_model_has_a_head_of_one_row(tiny_dir: str) -> None:
    model = new_reward_model(tiny_dir, ModelSection(name="tiny"), keep_layers=3)
    assert model_cost(model).forward(PassSize(14, 2, 57)) == 2 * (3 * LAYER * 14 + 64 * 2) + 4 * 3 * 64 * 57
    cost = model_cost(add_adapter(model, PeftSection(method="lora", rank=4)))
    assert (cost.head, cost.head_trained) == (64, 64)  # the head is trained beside the adapters


@pytest.mark.parametrize("last_layers", [None, 0, 2])
def test_flops_are_those_that_pytorch_counts(tiny_dir: str, last_layers: int | None) -> None:
    policy: Any = load_policy(tiny_dir, ModelSection(name="tiny", attention="eager"))
    if last_layers is not None:
        policy = lora(policy, last_layers)
    rows, length = 2, 48
    lengths = [(16, length - 16)] * rows
    batch = build_batch([([7] * p, [9] * r) for p, r in lengths], 0)
    cost = model_cost(policy)
    # Eager attention computes the whole square, of which half is masked away: that half is no work of the model.
    masked = rows * (length**2 - length * (length + 1) / 2)
    with FlopCounterMode(display=False) as forward:
        logprobs, _ = response_logprobs(policy, batch, 1.0, chunks=1)
    ours = cost.forward(pass_size(lengths)) + 4 * cost.attention * masked
    assert ours == pytest.approx(forward.get_total_flops(), rel=0.005)
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    ours = cost.backward(pass_size(lengths)) + 8 * cost.attention_through * masked
    # What `model_cost` says of keys and values beside the first adapter: their matrices and adapters' first factors.
    ours -= 0 if last_layers is None else 2 * rows * length * (2 * 64 * 32 + 2 * 4 * 64)
    assert ours == pytest.approx(backward.get_total_flops(), rel=0.005)


def test_what_sampling_needs_by_hand(tiny_policy: PreTrainedModel) -> None:
    """Batches of two by length of the prompt: one prompt twice, with responses of 3 and 4 tokens; then one of 1."""
    pairs = [([5, 6], [1, 1, 1]), ([7, 8, 9], [1]), ([5, 6], [1, 1, 1, 1])]
    needs = decoding_costs(model_cost(tiny_policy), pairs, batch_size=2)
    assert needs["perf/decode_steps"] == 3 + 0 and needs["perf/decode_rows"] == 2 + 3 + 0
    assert needs["perf/prefill_tokens"] == 2 + 3
    seen = (3 + 4) + (3 + 4 + 5)  # after a prompt of 2: by the tokens that go through one at a time
    weights = 4 * (LAYERS + HEAD)
    assert needs["perf/flops_decode"] == 2 * (LAYERS + HEAD) * 5 + 4 * QUERIES * seen
    assert needs["perf/bytes_decode"] == 3 * weights + seen * 1024
    assert needs["perf/flops_prefill"] == 2 * (LAYERS * 5 + HEAD * 2) + 4 * QUERIES * (3 + 6)
    assert needs["perf/bytes_prefill"] == 2 * weights
