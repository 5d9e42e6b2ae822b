"""Models of text and images are used for text: sizes are the text config's, and the vision tower stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.costs.model_shapes import ModelSpec, count, model_config
from rlhf.errors import UserError
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.flops import model_cost
from rlhf.models.layers import decoder_layers, kv_heads
from rlhf.models.loading import check_context, load_policy, load_reward_model, new_reward_model, save_model
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.rollout.batches import build_batch
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import response_logprobs, scores, token_logprobs
from support.small_models import EOS, PAIRS, by_hand, write_multimodal

SECTION = ModelSection(name="tiny")
KINDS = ["gemma3", "mistral3"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_multimodal(request.param, tiny_tokenizer, folder)
    return folder


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    return load_policy(folder, SECTION)


def test_text_is_sampled_and_scored(policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for (prompt, response), row in zip(PAIRS, token_logprobs(policy, PAIRS), strict=True):
        assert row.tolist() == pytest.approx(by_hand(policy, prompt, response, 1.0), abs=1e-5)
    prompts = [prompt for prompt, _ in PAIRS]
    out = sample(policy, tiny_tokenizer, prompts, SamplingParams(6, 1.0, (EOS,)), seeds=[4, 5, 6])
    for i, prompt in enumerate(prompts):
        found = out.logprobs[i, : int(out.lengths[i])].tolist()
        assert found == pytest.approx(by_hand(policy, prompt, out.response(i), 1.0), abs=1e-5)


def test_only_what_text_goes_through_is_trained(policy: PreTrainedModel) -> None:
    response_logprobs(policy, build_batch(PAIRS, 3), 1.0)[0].sum().backward()
    for name, parameter in policy.named_parameters():
        text = "language_model" in name or "lm_head" in name
        assert parameter.requires_grad == text and (parameter.grad is not None) == text, name


def test_sizes_are_those_of_the_text_config(folder: Path, policy: PreTrainedModel) -> None:
    assert decoder_layers(policy) is policy.get_decoder().layers
    assert kv_heads(policy.config) == (2, 8)
    check_context(policy, 256, "sft.max_tokens")
    with pytest.raises(UserError, match="positions for 256"):
        check_context(policy, 257, "sft.max_tokens")
    spec = ModelSpec(model_config(str(folder)), "float32", "sdpa")
    counts = count(spec)
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert (spec.layers, counts.trained) == (2, trained)
    assert counts.layer == sum(parameter.numel() for parameter in policy.get_decoder().layers[0].parameters())


def test_flops_are_those_of_the_text_model(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_multimodal("mistral3", tiny_tokenizer, tmp_path)
    policy = load_policy(tmp_path, SECTION)
    text = copy.deepcopy(policy.config.text_config)
    text.tie_word_embeddings = policy.config.tie_word_embeddings
    assert model_cost(policy) == model_cost(MistralForCausalLM(text))


def test_a_reward_model_keeps_the_first_text_layers(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    reward = new_reward_model(folder, SECTION, keep_layers=1)
    assert len(decoder_layers(reward)) == 1
    scores(reward, PAIRS).sum()
    save_model(reward, tiny_tokenizer, tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", SECTION)
    found = scores(again, PAIRS)
    assert torch.allclose(found, scores(reward, PAIRS), atol=1e-6)
    whole = load_policy(folder, SECTION)
    text = whole.get_decoder()
    del text.layers[1:]
    for (prompt, response), score in zip(PAIRS, found.tolist(), strict=True):
        with torch.no_grad():
            last = text(torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0, -1]
            assert score == pytest.approx(float(last @ again.score.weight[0]), abs=1e-5)


METHODS = {
    "lora": PeftSection(method="lora", rank=2, last_layers=1),
    "adapter": PeftSection(method="adapter", bottleneck=4),
    "ia3": PeftSection(method="ia3"),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_the_text_decoder(method: str, policy: PreTrainedModel) -> None:
    before = token_logprobs(policy, PAIRS)
    adapted = add_adapter(policy, METHODS[method])
    assert all("language_model" in name for name in trainable(adapted))
    if method == "lora":
        assert all(torch.equal(a, b) for a, b in zip(token_logprobs(adapted, PAIRS), before, strict=True))
    response_logprobs(adapted, build_batch(PAIRS, 3), 1.0)[0].sum().backward()
    assert any(bool(weight.grad.any()) for weight in trainable(adapted).values())


def test_virtual_tokens_are_refused(policy: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="virtual tokens stand before text alone"):
        add_adapter(policy, PeftSection(method="prompt", virtual_tokens=2))
