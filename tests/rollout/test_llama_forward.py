"""The passes of rlhf/rollout/llama_forward.py against transformers' own forward, and what they leave to it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers

from rlhf.model_config import VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.rollout.batches import build_batch
from rlhf.rollout.decoding import LlamaDecoding, ModelDecoding
from rlhf.rollout.llama_forward import columns_for, llama_forward_for
from rlhf.rollout.sampling import decoding_for
from rlhf.rollout.scoring import hidden_states
from support.rollout_runs import PROMPTS, run
from support.small_models import EOS, PAIRS, by_hand, gpt2, llama

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"num_hidden_layers": 3, "vocab_size": 50, "pad_token_id": 0, "eos_token_id": EOS, "initializer_range": 0.3}


def mistral(window: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=window, **SHAPE)).eval()


def qwen2() -> torch.nn.Module:
    """With biases on queries, keys and values, none of them zero."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def qwen3() -> torch.nn.Module:
    """With norms on queries and keys, heads of another size than H / heads, and norms that are not all one."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **SHAPE)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def rotary(kind: dict[str, object]) -> torch.nn.Module:
    return llama(rope_parameters={"rope_theta": 10000.0, **kind})


def yarn() -> torch.nn.Module:
    """Its cosines carry a factor of their own."""
    return rotary({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})


def adapted() -> torch.nn.Module:
    model = add_adapter(llama(), PeftSection(method="lora", rank=4, alpha=8, last_layers=1))
    for name, parameter in trainable(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def biased() -> torch.nn.Module:
    model = add_adapter(qwen2(), PeftSection(method="bitfit"))
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


COVERED = [llama, mistral, qwen2, qwen3, yarn, adapted, biased]


@torch.no_grad()
def theirs(model: torch.nn.Module, batch: object) -> torch.Tensor:
    return model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("make", COVERED)
def test_hidden_states_are_the_models_own(make):
    model, batch = make(), build_batch(PAIRS, 0)
    with torch.no_grad():
        ours = hidden_states(model, batch)
    real = torch.tensor([[t < len(p) + len(r) for t in range(batch.input_ids.shape[1])] for p, r in PAIRS])
    assert llama_forward_for(model) is not None
    assert torch.allclose(ours[real], theirs(model, batch)[real], atol=2e-5)


def test_with_gradients_the_model_itself_runs():
    model, batch = llama(), build_batch(PAIRS, 0)
    hidden_states(model, batch).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)


def test_a_reward_models_body_is_covered():
    model, batch = llama(transformers.LlamaForSequenceClassification), build_batch(PAIRS, 0)
    with torch.no_grad():
        assert torch.allclose(llama_forward_for(model).hidden(batch.input_ids), theirs(model, batch), atol=2e-5)


@pytest.mark.parametrize("make", COVERED)
def test_decoded_logprobs_are_those_of_a_full_forward(make):
    """Prompts of different lengths, and rows that end at different steps."""
    model = make()
    assert isinstance(decoding_for(model, 4), LlamaDecoding)
    prompts = [*PROMPTS, *PROMPTS[:2]]
    out = run(model, prompts, max_new_tokens=30)
    assert len(set(out.lengths.tolist())) > 1
    for i, prompt in enumerate(prompts):
        expected = by_hand(model, prompt, out.response(i), 1.0)
        assert out.logprobs[i, : int(out.lengths[i])].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 24])
def test_columns_that_fill_up_say_nothing(rows):
    """As many rows as it takes for every way of rounding up, with the numbers of each row by itself."""
    model = qwen2()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    out = run(model, prompts, max_new_tokens=6, stop_ids=[])
    assert out.lengths.tolist() == [6] * rows
    for i, prompt in enumerate(prompts):
        assert out.logprobs[i].tolist() == pytest.approx(by_hand(model, prompt, out.response(i), 1.0), abs=1e-4)
    assert columns_for(rows) == {1: 1, 2: 16, 8: 16, 9: 16, 16: 16, 17: 24, 24: 24}[rows]


@pytest.mark.parametrize("make", COVERED)
def test_greedy_decoding_equals_generate(make):
    model = make()
    ours, generate = (run(model, temperature=0.0, engine=engine) for engine in ("native", "generate"))
    assert [ours.response(i) for i in range(len(ours))] == [generate.response(i) for i in range(len(ours))]


def dynamic() -> torch.nn.Module:
    return rotary({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8})


def eager() -> torch.nn.Module:
    return llama(attn_implementation="eager")


def hooked() -> torch.nn.Module:
    model = llama()
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def namesake() -> torch.nn.Module:
    """A model's own code may call its class as it likes."""
    return llama(type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {}))


def other_linear() -> torch.nn.Module:
    """A linear map that is more than its weight, as those of quantised models are."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    return model


def with_method(method: str) -> torch.nn.Module:
    """Something of the method's own stands between the weights."""
    return add_adapter(llama(), PeftSection(method=method)).eval()


OTHERS = [gpt2, dynamic, eager, hooked, namesake, other_linear, lambda: mistral(window=4)]
OTHERS += [partial(with_method, m) for m in ("dora", "ia3", "adapter", *VIRTUAL_TOKEN_METHODS)]


@pytest.mark.parametrize("make", OTHERS)
def test_other_models_are_left_to_their_own_forward(make):
    model = make()
    assert llama_forward_for(model) is None
    assert isinstance(decoding_for(model, 4), ModelDecoding)


def test_the_weights_are_the_models_own():
    """No copy: what an update changes is seen at once."""
    model = llama(transformers.LlamaForCausalLM)
    inference = llama_forward_for(model)
    assert inference.layers[0].q.weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert inference.head.weight.data_ptr() == model.lm_head.weight.data_ptr()
