"""Scoring: pad = eos, junk in padding, calls of the head and batches never change a number."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf.rollout import lm_head, scoring
from rlhf.rollout.batches import build_batch, token_budget_batches
from support.small_models import EOS, PAIRS, by_hand, gpt2, llama


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("pad", [0, EOS])
def test_logprobs_match_an_unpadded_loop(make, pad):
    model = make()
    batch = build_batch(PAIRS, pad)
    with torch.no_grad():
        flat, _ = scoring.response_logprobs(model, batch, 0.7)
    expected = [x for prompt, response in PAIRS for x in by_hand(model, prompt, response, 0.7)]
    assert torch.allclose(flat, torch.tensor(expected), atol=1e-5)


def test_results_come_back_in_order_whatever_the_batches():
    model = llama()
    for budget in (1, 8, 10_000):
        rows = scoring.token_logprobs(model, PAIRS, 1.0, tokens=budget)
        for (prompt, response), row in zip(PAIRS, rows, strict=True):
            assert torch.allclose(row, torch.tensor(by_hand(model, prompt, response, 1.0)), atol=1e-5)


def test_calls_of_the_head_and_recomputation_change_nothing(monkeypatch):
    results = []
    for chunk, chunks in ((1000, 1), (2, 5), (1000, 0)):  # one call, several, none
        monkeypatch.setattr(lm_head, "HEAD_CHUNK", chunk)
        model = llama()
        flat, entropy = scoring.response_logprobs(model, build_batch(PAIRS, 0), 1.0, chunks)
        flat.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((flat.detach(), entropy, grads))
    for one, *others in zip(*results, strict=True):
        for two in others:
            assert float((one - two).norm() / one.norm()) < 1e-5


def test_entropy_is_that_of_the_softmax():
    model = llama()
    _, entropy = scoring.response_logprobs(model, build_batch(PAIRS[:1], 0), 1.0)
    with torch.no_grad():
        p = model(torch.tensor([[5, 6, 7, 8, 9, EOS]])).logits[0, 2].double().softmax(0)
    assert float(entropy[0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


@pytest.mark.parametrize("pad", [0, EOS])
def test_score_is_read_at_the_last_response_token(pad):
    model = llama(LlamaForSequenceClassification, num_labels=1)
    with torch.no_grad():
        got = scoring.raw_scores(model, build_batch(PAIRS, pad))
        for (prompt, response), score in zip(PAIRS, got, strict=True):
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
            assert float(score) == pytest.approx(float(model.score(hidden)), abs=1e-5)


def test_the_model_sees_that_an_answer_ended_though_pad_equals_eos():
    model = llama(LlamaForSequenceClassification, num_labels=1)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    ended, cut = scoring.scores(model, [([5, 6], [7, EOS]), ([5, 6], [7])]).tolist()
    assert abs(ended - cut) > 1e-3


def test_values_are_those_before_each_token_and_normalised():
    model = llama(LlamaForSequenceClassification, num_labels=1)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    prompt, response = PAIRS[0]
    with torch.no_grad():
        got = scoring.response_values(model, build_batch([PAIRS[0]], 0))
        hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        expected = (model.score(hidden[2:5]).squeeze(-1) - 0.5) / 2.0
    assert torch.allclose(got, expected, atol=1e-5)


def test_batches_hold_the_token_budget_and_every_row_once():
    lengths = [5, 1, 9, 3, 3, 8]
    batches = list(token_budget_batches(lengths, 10))
    assert sorted(i for b in batches for i in b) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10


def test_unflatten_places_each_token():
    batch = build_batch(PAIRS, 0)
    grid = batch.unflatten(batch.targets.float(), 5)
    assert grid.tolist() == [[8, 9, 2, 0, 0], [11, 12, 13, 14, 2], [20, 0, 0, 0, 0]]
