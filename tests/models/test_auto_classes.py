"""Reward models of architectures for which transformers has no sequence classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, PreTrainedTokenizerBase

from rlhf.costs.model_shapes import ModelSpec, count, model_config
from rlhf.errors import UserError
from rlhf.functional.ranking import ranking_loss
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models.auto_classes import scalar_class
from rlhf.models.loading import load_policy, load_reward_model, new_reward_model, save_model
from rlhf.models.peft.attaching import attach_adapter
from rlhf.models.peft.folder import find_adapter
from rlhf.models.peft.shared_base import share_base_with_scalar_head
from rlhf.models.pretrained import is_classifier
from rlhf.rollout.scoring import scores, token_values
from rlhf.training.ranking_passes import ScoringModule
from support.small_models import ARCHITECTURES, PAIRS, write_architecture

SECTION = ModelSection(name="tiny")
KINDS = sorted(set(ARCHITECTURES) - {"gemma2"})  # which has a class


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_trains_a_step_saves_and_reloads(
    kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_architecture(kind, tiny_tokenizer, tmp_path / "policy")
    torch.manual_seed(0)
    reward = new_reward_model(tmp_path / "policy", SECTION)
    weights = {name: parameter.detach().clone() for name, parameter in reward.named_parameters()}
    module = ScoringModule(reward)
    with module.sharing():
        raw = module(module.build(PAIRS, 3))
        ranking_loss(raw, [(0, 1, 2)]).loss.backward()
    assert all(parameter.grad is not None for parameter in reward.parameters())
    torch.optim.SGD(reward.parameters(), lr=0.1).step()
    assert not torch.equal(reward.score.weight, weights["score.weight"])
    reward.config.reward_mean, reward.config.reward_std = 0.5, 2.0
    save_model(reward, tiny_tokenizer, tmp_path / "reward")
    (name,) = json.loads((tmp_path / "reward" / "config.json").read_text())["architectures"]
    again = load_reward_model(tmp_path / "reward", SECTION)
    assert is_classifier(again.config) and type(again).__name__ == name == f"{kind.title()}ForSequenceClassification"
    found = scores(again, PAIRS)
    assert torch.equal(found, scores(reward, PAIRS))
    assert all(torch.equal(a, b) for a, b in zip(token_values(again, PAIRS), token_values(reward, PAIRS), strict=True))
    # transformers' own body from the same folder, and its last hidden state times the head
    body = AutoModel.from_pretrained(tmp_path / "reward").eval()
    for (prompt, response), score in zip(PAIRS, found.tolist(), strict=True):
        with torch.no_grad():
            expected = body(torch.tensor([prompt + response])).last_hidden_state[0, -1] @ again.score.weight[0]
        assert score == pytest.approx((float(expected) - 0.5) / 2, abs=1e-5)
    with pytest.raises(UserError, match="not a policy"):
        load_policy(tmp_path / "reward", SECTION)


def test_an_adapter_on_a_body_that_the_policy_shares(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_architecture("granite", tiny_tokenizer, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", SECTION)
    reward = new_reward_model(tmp_path / "policy", SECTION, keep_layers=1, peft=PeftSection(method="lora", rank=2))
    save_model(reward, tiny_tokenizer, tmp_path / "reward")
    adapter = find_adapter(tmp_path / "reward")
    assert adapter is not None and adapter.scalar and adapter.keep_layers == 1
    expected = scores(reward, PAIRS)
    assert torch.equal(scores(load_reward_model(tmp_path / "reward", SECTION, merged=True), PAIRS), expected)
    twin = share_base_with_scalar_head(policy, 1)
    assert twin is not None and twin.model.embed_tokens.weight is policy.model.embed_tokens.weight
    assert torch.equal(scores(attach_adapter(adapter, twin), PAIRS), expected)


def test_its_parameters_are_counted(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_architecture("granite", tiny_tokenizer, tmp_path)
    spec = ModelSpec(model_config(str(tmp_path)), "float32", "sdpa", scalar=True)
    reward = new_reward_model(tmp_path, SECTION)
    assert count(spec).total == sum(parameter.numel() for parameter in reward.parameters())


def test_what_is_no_causal_model_of_transformers_is_refused() -> None:
    class OwnConfig(BertConfig):
        model_type = "own"

    with pytest.raises(UserError, match="neither a sequence classifier nor a body for own"):
        scalar_class(OwnConfig(), "folder")
