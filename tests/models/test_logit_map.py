"""Caps and scales of logits: sampling, scoring and gradients are those of transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from rlhf.errors import UserError
from rlhf.model_config import ModelSection
from rlhf.models import logit_map
from rlhf.models.loading import load_policy
from rlhf.models.logit_map import LogitMap, declared_map, verified_map
from rlhf.models.peft.shared_base import share_base
from rlhf.rollout.batches import build_batch
from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import next_token_logprobs, response_logprobs, token_logprobs
from support.small_models import CHANGED_LOGITS, EOS, PAIRS, by_hand, llama, write_architecture

SECTION = ModelSection(name="tiny", attention="eager")
DECLARED = {"gemma2": LogitMap(cap=2.0), "cohere": LogitMap(0.25), "granite": LogitMap(divisor=3.0)}


@pytest.fixture(autouse=True)
def nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what other tests of this process have verified: models of one class and config are looked at once."""
    monkeypatch.setattr(logit_map, "_verified", set())


@pytest.fixture(params=sorted(CHANGED_LOGITS))
def loaded(request, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The product's policy, and transformers' own model with the same weights."""
    theirs = write_architecture(request.param, tiny_tokenizer, tmp_path)
    ours = load_policy(tmp_path, SECTION)
    assert ours.logit_map == DECLARED[request.param]
    return ours, theirs


def test_scores_of_given_responses(loaded: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ours, theirs = loaded
    for policy in (ours, share_base(ours)):
        for (prompt, response), row in zip(PAIRS, token_logprobs(policy, PAIRS, 0.7), strict=True):
            assert row.tolist() == pytest.approx(by_hand(theirs, prompt, response, 0.7), abs=1e-5)
    (next_token,) = next_token_logprobs(ours, [PAIRS[0][0]], [8, 30])
    assert next_token.tolist() == pytest.approx(
        [by_hand(theirs, PAIRS[0][0], [token], 1.0)[0] for token in (8, 30)], abs=1e-5
    )


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_logprobs_of_sampling(
    engine: str, loaded: tuple[PreTrainedModel, PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    ours, theirs = loaded
    params = SamplingParams(max_new_tokens=6, temperature=0.8, stop_ids=(EOS,), engine=engine)
    prompts = [prompt for prompt, _ in PAIRS]
    out = sample(ours, tiny_tokenizer, prompts, params, seeds=[4, 5, 6])
    for i, prompt in enumerate(prompts):
        found = out.logprobs[i, : int(out.lengths[i])].tolist()
        assert found == pytest.approx(by_hand(theirs, prompt, out.response(i), 0.8), abs=1e-5)


@pytest.mark.parametrize("chunks", [0, 2])
def test_gradients_are_those_of_autograd(chunks: int, loaded: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ours, theirs = loaded
    weights = torch.linspace(-1, 2, sum(len(response) for _, response in PAIRS))
    flat, _ = response_logprobs(ours, build_batch(PAIRS, 3), 0.7, chunks)
    (flat * weights).sum().backward()
    rows = []
    for prompt, response in PAIRS:
        logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        rows.append((logits / 0.7).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    (torch.cat(rows) * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4), name


def test_fields_of_the_config() -> None:
    config = llama().config
    assert declared_map(config).plain
    config.logits_scaling, config.final_logit_softcapping = 4.0, 30.0
    assert declared_map(config) == LogitMap(divisor=4.0, cap=30.0)
    config.model_type = "hyperclovax"  # multiplies by it
    assert declared_map(config) == LogitMap(4.0, cap=30.0)
    assert LogitMap(4.0, 2.0, 3.0)(torch.tensor([1.5])).tolist() == pytest.approx([3 * 0.7615942])  # tanh(1)


def test_a_cap_of_an_unknown_kind_is_refused() -> None:
    """RecurrentGemma's field is another one, and its small logits hardly show the cap."""
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "lru_width": 32}
    config = RecurrentGemmaConfig(**shape, num_attention_heads=4, attention_window_size=16, initializer_range=0.01)
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM changes its logits after the LM head"):
        verified_map(RecurrentGemmaForCausalLM(config).eval())


class OffsetLogits(Gemma2ForCausalLM):
    """A model whose code does more than its config declares."""

    def forward(self, *args, **kwargs):
        """Return logits with an offset."""
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1
        return out


def test_what_the_config_does_not_declare_is_refused(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = write_architecture("gemma2", tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match="soft cap 2"):
        verified_map(OffsetLogits(policy.config).eval())
    # A field that the architecture does not read: TRL's loss would apply it.
    with pytest.raises(UserError, match="multiplier 0.5"):
        verified_map(llama(logit_scale=0.5))


def test_a_layer_between_body_and_head_is_refused() -> None:
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.raises(UserError, match="changes its hidden states before the LM head"):
        verified_map(model)


def test_a_model_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(logit_map, "_verify", lambda model, *_: calls.append(model))
    for _ in range(2):
        assert verified_map(llama()).plain
    assert len(calls) == 1
