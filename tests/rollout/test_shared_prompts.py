"""Outputs that share a prompt's pass through the layers, against each output in a row of its own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification as AutoModel
from transformers import BloomConfig, GPT2Config, GPTNeoConfig, GPTNeoXConfig, LlamaConfig, MistralConfig

from rlhf.model_config import PeftSection
from rlhf.models.peft.methods import add_adapter
from rlhf.rollout.batches import Pair
from rlhf.rollout.shared_prompts import build_shared, can_share, share_prompts, shared_scores

VOCABULARY = 300
COMMON = {"vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**LAYERS, "num_key_value_heads": 2}
WIDE = {"initializer_range": 0.3}  # scores that differ


def make(name: str, **more: object) -> nn.Module:
    torch.manual_seed(2)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    neo = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    config = {
        "llama": LlamaConfig(**COMMON, **GROUPED, **WIDE, **more),
        "gpt2": GPT2Config(**COMMON, **gpt2, **WIDE),
        "gpt-neox": GPTNeoXConfig(**COMMON, **LAYERS, **WIDE),
        "mistral": MistralConfig(**COMMON, **GROUPED, **WIDE, sliding_window=8),
        "gpt-neo": GPTNeoConfig(**COMMON, **neo, **WIDE),
        "bloom": BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4, **WIDE),
    }[name]
    return AutoModel.from_config(config).eval()


def groups(seed: int = 0) -> list[Pair]:
    """Prompts of 5, 1 and 12 tokens with outputs of many lengths, the last two prompts equal but not neighbours."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    pairs = []
    for prompt, lengths in ((tokens(5), (3, 9, 1)), (tokens(1), (4, 2)), (tokens(12), (7, 7, 20, 1, 3))):
        pairs += [(prompt, tokens(n)) for n in lengths]
    return [*pairs, (pairs[0][0], tokens(6))]


def alone(model: nn.Module, pairs: list[Pair]) -> Tensor:
    """Scores of one row after the other, with neither mask nor positions given."""
    body = getattr(model, model.base_model_prefix)
    rows = [torch.tensor([[*prompt, *response]]) for prompt, response in pairs]
    return torch.cat([model.score(body(row).last_hidden_state[:, -1])[:, 0] for row in rows])


def gradient(model: nn.Module) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("how", ["plain", "recomputed", "adapters"])
def test_scores_and_gradients_are_those_of_rows_alone(name: str, how: str) -> None:
    model, pairs = make(name), groups()
    if how == "adapters":
        model = add_adapter(model, PeftSection(method="lora", rank=4)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    weights = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    assert can_share(model)
    expected = alone(model, pairs)
    (expected * weights).sum().backward()
    expected_gradient = gradient(model)
    if how == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training only; these configs' dropout is off or set off here
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    with share_prompts(model):
        got = shared_scores(model, build_shared(pairs))
        (got * weights).sum().backward()
    assert float(expected.detach().std()) > 0.1, "equal scores would compare nothing"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float((gradient(model) - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


def test_a_prompt_lies_in_the_batch_once_by_hand() -> None:
    batch = build_shared([([7, 8], [1]), ([7, 8], [2, 3]), ([9], [4])])
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert batch.rows.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 0, 0]]
    assert batch.first.tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert batch.last.tolist() == [2, 4, 6]


def test_models_that_would_compute_something_else_do_not_share() -> None:
    assert not can_share(make("mistral"))  # its layers see a window that a few tokens do not fill
    for method in ("prompt", "p_tuning", "prefix", "p_tuning_v2"):  # its tokens stand before every row
        assert not can_share(add_adapter(make("llama"), PeftSection(method=method)))
    assert not can_share(make("gpt-neo")) and not can_share(make("bloom"))
    assert not can_share(make("llama", attn_implementation="eager"))  # the recipe's word counts
    model = make("llama")
    before = model.config._attn_implementation
    assert can_share(model) and model.config._attn_implementation == before == "sdpa"


def test_attention_outside_is_the_usual_one() -> None:
    model, pairs = make("llama"), groups()
    expected = alone(model, pairs)
    with share_prompts(model):
        shared_scores(model, build_shared(pairs))
    assert torch.equal(alone(model, pairs), expected)
