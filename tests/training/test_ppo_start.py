"""Where PPO starts: the ratio is 1 before any update, and the KL is 0 before the first."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.model_config import PeftSection
from rlhf.models.loading import load_tokenizer
from rlhf.models.peft.methods import add_adapter, trainable
from rlhf.models.peft.shared_base import share_base
from rlhf.rollout.batches import build_batch
from rlhf.rollout.scoring import response_logprobs, token_logprobs
from rlhf.training.ppo_checks import check_first_minibatch, check_kl
from rlhf.training.ppo_state import Ppo
from stages.ppo import advantages, ppo_step, rollout, score
from support.ppo_runs import ALL, BOTH, TEMPERATURE, make_ppo, network, with_ppo


def start(kind: str, tokenizer: PreTrainedTokenizerBase, gpt2_dir: str) -> Ppo:
    """A run at step 0; every model has dropout in its config and arrives in training mode."""
    make = (
        (lambda: GPT2LMHeadModel.from_pretrained(gpt2_dir).train())
        if kind == "gpt2"
        else (lambda: network(LlamaForCausalLM, tokenizer).train())
    )
    policy, reference = make(), make()
    if kind == "lora":
        reference = share_base(policy)
        add_adapter(policy, PeftSection(method="lora", rank=4))
    return make_ppo(policy, reference.requires_grad_(False).eval(), tokenizer)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_ratio_is_one_and_kl_zero_at_step_zero(tiny_dir: str, tiny_gpt2_dir: str, kind: str, pad_is_eos: bool) -> None:
    tokenizer = load_tokenizer(tiny_dir)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    ppo = start(kind, tokenizer, tiny_gpt2_dir)
    ppo.networks.policy.train()  # sampling and scoring switch dropout off themselves
    episodes = rollout(ppo)
    pairs = episodes.pairs()
    sampled = torch.cat([episodes.logprobs[i, : len(response)] for i, (_, response) in enumerate(pairs)])
    rescored = torch.cat(token_logprobs(ppo.networks.policy, pairs, TEMPERATURE))
    assert float((sampled - rescored).abs().max()) < 1e-4
    ppo.networks.policy.eval()
    with torch.no_grad():
        batch = build_batch(pairs, tokenizer.pad_token_id)
        flat, _ = response_logprobs(ppo.networks.policy, batch, TEMPERATURE)
        assert float((sampled - flat).abs().max()) < 1e-4

    experience = advantages(ppo, score(ppo, episodes))
    assert float((experience.logprobs - experience.ref_logprobs).abs().max()) < 1e-4
    assert float(experience.kl_per_response().abs().max()) < 1e-3
    metrics = ppo_step(with_ppo(ppo, micro_batch_size=2), experience, ALL, BOTH)
    assert metrics["ratio_error"] < 1e-4 and metrics["ppo/clip_fraction"] == 0.0
    assert metrics["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    check_first_minibatch(ppo, experience, metrics["ratio_error"])


def test_the_reference_of_an_adapter_stays_where_the_policy_started(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ppo = start("lora", tiny_tokenizer, "")
    plain = network(LlamaForCausalLM, tiny_tokenizer)
    with torch.no_grad():
        for name, parameter in trainable(ppo.networks.policy).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    experience = advantages(ppo, score(ppo, rollout(ppo)))
    expected = token_logprobs(plain, experience.pairs, TEMPERATURE)
    got = [row[: len(r)] for row, (_, r) in zip(experience.ref_logprobs, experience.pairs, strict=True)]
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) < 1e-4
    assert float(experience.kl_per_response().mean()) > 0.1
    # The ratio is still 1 before an update.
    metrics = ppo_step(ppo, experience, ALL, BOTH)
    assert metrics["ratio_error"] < 1e-4
    check_first_minibatch(dataclasses.replace(ppo, iteration=1), experience, metrics["ratio_error"])
    with pytest.raises(UserError, match="before the first update, so KL is not 0"):
        check_first_minibatch(ppo, experience, metrics["ratio_error"])


def test_the_checks_do_not_let_nan_pass(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ppo = start("llama", tiny_tokenizer, "")
    experience = advantages(ppo, score(ppo, rollout(ppo)))
    with pytest.raises(UserError, match="probability ratio is off by nan"):
        check_first_minibatch(ppo, experience, math.nan)
    experience.ref_logprobs[1, 0] = math.nan
    with pytest.raises(UserError, match="policy and reference differ by nan nats"):
        check_first_minibatch(ppo, experience, 0.0)
    ppo.metrics["ppo/kl"] = math.nan
    with pytest.raises(UserError, match="KL to the reference reached nan nats"):
        check_kl(ppo)


def test_dropout_left_on_is_found(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ppo = start("llama", tiny_tokenizer, "")
    experience = advantages(ppo, score(ppo, rollout(ppo)))
    ppo.networks.train()
    metrics = ppo_step(ppo, experience, ALL, BOTH)
    with pytest.raises(UserError, match=r"probability ratio is off by .* before any update"):
        check_first_minibatch(ppo, experience, metrics["ratio_error"])
