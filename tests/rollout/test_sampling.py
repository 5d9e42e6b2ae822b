"""Sampling: the distribution is the softmax, log-probabilities are the model's, rows do not depend on their mates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed, row_uniforms
from rlhf.rollout import sampling
from rlhf.rollout.batches import build_batch
from rlhf.rollout.sampling import CDF_BLOCK, sample_token
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.scoring import response_logprobs, token_logprobs
from support.rollout_runs import PROMPTS, Tokenizer, run
from support.small_models import EOS, by_hand, gpt2, llama


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("engine", ["native", "generate"])
def test_logprobs_are_those_of_a_full_forward(make, engine):
    model = make()
    out = run(model, engine=engine, temperature=0.8)
    for i in range(len(PROMPTS)):
        expected = by_hand(model, PROMPTS[i], out.response(i), 0.8)
        assert out.prompt(i) == PROMPTS[i]
        assert out.logprobs[i, : int(out.lengths[i])].tolist() == pytest.approx(expected, abs=1e-4)
        assert out.logprobs[i, int(out.lengths[i]) :].abs().sum() == 0


@pytest.mark.parametrize("make", [llama, gpt2])
def test_greedy_equals_generate(make):
    model = make()
    ours, theirs = run(model, temperature=0.0), run(model, temperature=0.0, engine="generate")
    assert [ours.response(i) for i in range(5)] == [theirs.response(i) for i in range(5)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_row_does_not_depend_on_its_batch_mates(make):
    model = make()
    together, apart = run(model, max_new_tokens=30), run(model, max_new_tokens=30, batch_size=1)
    assert len(set(together.lengths.tolist())) > 1, "rows must finish at different steps"
    assert [together.response(i) for i in range(5)] == [apart.response(i) for i in range(5)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_prompt_sampled_several_times_is_answered_as_if_alone(make):
    model, prompts = make(), [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    together, apart = run(model, prompts), run(model, prompts, batch_size=1)
    assert [together.response(i) for i in range(5)] == [apart.response(i) for i in range(5)]
    assert torch.allclose(together.logprobs, apart.logprobs, atol=1e-4)
    assert len({tuple(together.response(i)) for i in (0, 2, 3)}) > 1, "copies must draw with seeds of their own"


def test_finished_means_that_it_ends_with_eos():
    out = run(llama(), prompts=[[i] for i in range(3, 33)], max_new_tokens=20)
    assert bool(out.finished.any()) and not bool(out.finished.all())
    for i in range(30):
        response = out.response(i)
        assert (response[-1] == EOS) == bool(out.finished[i])
        assert EOS not in response[:-1]
        assert bool(out.finished[i]) or len(response) == 20


def test_the_first_token_is_drawn_from_the_softmax():
    """Chi-square of 6,000 draws against the softmax of the model, cells under 5 expected draws merged."""
    model, n = llama(), 6000
    out = run(model, prompts=[[5, 6, 7]] * n, max_new_tokens=1, batch_size=2000, temperature=1.3)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 1.3, 0).numpy()
    counts = np.bincount(out.response_ids[:, 0].numpy(), minlength=50)
    small = p * n < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(p[~small], p[small].sum()) * n
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
    degrees = len(observed) - 1
    # Mean k, std sqrt(2 k): four standard deviations are passed once in about 10,000 seeds, and the seed is fixed.
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_draw_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]])).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.999999], dtype=torch.float64)
    tokens, logprobs = sample_token(logits, uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.7, 0.7])


def test_temperature_divides_the_logits():
    logits, uniforms = torch.log(torch.tensor([[1.0, 9.0]])), torch.tensor([0.26], dtype=torch.float64)
    tokens, logprobs = sample_token(logits, uniforms, 2.0)
    assert (tokens.tolist(), logprobs.exp().tolist()) == ([1], [pytest.approx(0.75)])  # 1 : 3, where it was 1 : 9


def test_without_uniforms_the_likeliest_token_is_taken():
    tokens, logprobs = sample_token(torch.log(torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])), None)
    assert (tokens.tolist(), logprobs.exp().tolist()) == ([2, 0], pytest.approx([0.7, 0.5]))


@pytest.mark.parametrize("vocabulary", [1, CDF_BLOCK, 3 * CDF_BLOCK + 7])
def test_a_draw_in_blocks_is_one_over_the_whole_vocabulary(vocabulary):
    """Against the cumulative sum over all tokens, in float64."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(400, vocabulary, generator=generator, dtype=torch.float64).float()
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    expected = [int((c <= u).sum()) for c, u in zip(p.cumsum(1), uniforms.numpy(), strict=True)]
    tokens, logprobs = sample_token(logits, uniforms)
    assert tokens.tolist() == expected
    assert np.allclose(logprobs.numpy(), np.log(p[range(400), expected]), atol=1e-5)


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((4, 3 * CDF_BLOCK), float("-inf"))
    logits[:, [CDF_BLOCK + 1, CDF_BLOCK + 3]] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 1e-16, 1.0], dtype=torch.float64)
    assert (sample_token(logits, uniforms)[0] - CDF_BLOCK).tolist() == [1, 3, 3, 3]


def test_seeds_are_stable_and_rows_differ():
    assert row_seed(1, "ppo", 3) == row_seed(1, "ppo", 3) != row_seed(1, "ppo", 4)
    u = row_uniforms([row_seed(1), row_seed(2)], 4)
    assert torch.equal(row_uniforms([row_seed(2)], 4)[0], u[1]) and not torch.equal(u[0], u[1])


def test_the_model_keeps_its_mode_and_the_caller_its_random_stream():
    model = llama().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(model, engine="generate")
    run(model)
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_texts_leave_special_tokens_out():
    out = run(llama(LlamaForCausalLM))
    assert all(str(EOS) not in text.split() for text in out.texts(Tokenizer()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["native", "generate"])
def test_logits_that_are_no_numbers_are_told(engine, temperature):
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight[7], float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        run(model, engine=engine, temperature=temperature)


def test_progress_of_several_processes_ends_at_the_number_of_prompts(monkeypatch):
    monkeypatch.setattr(sampling, "processes", lambda: 2)
    monkeypatch.setattr(sampling, "shard", lambda rows: rows[::2])
    monkeypatch.setattr(sampling, "gather_in_order", lambda order, results: results * 2)
    done, params = [], SamplingParams(2, 1.0, [EOS], batch_size=2)
    sampling.sample(llama(), Tokenizer(), PROMPTS, params, seeds=list(range(5)), advance=done.append)
    assert done == [4, 1]  # of five prompts this process has three


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("engine", ["native", "generate"])
def test_rows_of_a_padded_vocabulary_are_no_tokens(make, engine):
    """Of 50 rows the first 30 are tokens: what is drawn, and every log-probability, is of a softmax over these."""
    model = make()
    model.token_count = 30
    out = run(model, engine=engine, temperature=0.8)
    pairs = [(PROMPTS[i], out.response(i)) for i in range(len(PROMPTS))]
    assert max(token for _, response in pairs for token in response) < 30
    expected = [by_hand(model, prompt, response, 0.8, tokens=30) for prompt, response in pairs]
    scored = token_logprobs(model, pairs, 0.8)
    for i, row in enumerate(expected):
        assert out.logprobs[i, : len(row)].tolist() == pytest.approx(row, abs=1e-4)
        assert scored[i].tolist() == pytest.approx(row, abs=1e-4)
    whole, chunked = (response_logprobs(model, build_batch(pairs, 0), 0.8, chunks) for chunks in (0, 2))
    for ours, theirs in zip(whole, chunked, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    whole[0].sum().backward()
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        assert bool(head.grad[:30].any()) and not bool(head.grad[30:].any())


def test_a_reward_model_reads_one_end_whichever_id_has_stopped_a_response():
    out = run(llama(), prompts=[[i] for i in range(3, 33)], stop_ids=[EOS, 7, 9], max_new_tokens=6)
    last = [out.response(i)[-1] for i in range(30)]
    assert {7, 9} & set(last) and [end in (EOS, 7, 9) for end in last] == out.finished.tolist()
    for (_, sampled), (_, scored), end in zip(out.pairs(), out.ended_pairs(), last, strict=True):
        assert scored == ([*sampled[:-1], EOS] if end in (7, 9) else sampled)
    assert out.other_ends() == sum(end in (7, 9) for end in last) > 0
