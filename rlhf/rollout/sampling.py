"""Sampling responses: one interface, three engines.

`native` is our decode loop: it prefills the prompts once, every row draws with its own seed by inverse CDF, rows leave
the batch when they finish, and only the sampled token's log-probability is kept. `generate` is transformers' generate,
where ppo.rollout asks for it. `vllm` is a server (rlhf/rollout/vllm_engine.py). All sample from the plain softmax at
the given temperature, without top-k, top-p or a minimum length, so that the policy's own log-probabilities are those
of the sampling distribution.

Shapes: B rows, P the longest prompt, R the longest response that was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import RolloutEngine
from rlhf.errors import UserError
from rlhf.functional.seeding import row_uniforms
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.methods import peft_of
from rlhf.rollout.decoding import LlamaDecoding, ModelDecoding, pad
from rlhf.rollout.llama_forward import llama_forward_for
from rlhf.rollout.sampling_params import Response, SamplingParams
from rlhf.rollout.scoring import evaluating, gather_in_order, token_count, token_logprobs
from rlhf.rollout.vllm_engine import sample_vllm
from rlhf.system.console import note
from rlhf.system.distributed import processes, shard
from rlhf.system.phases import heartbeat

_reported: set[str] = set()  # reasons for the native engine that have been shown


@dataclass
class Rollout:
    """Hold prompts and the responses that the policy gave; all tensors are on the CPU."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_lengths: Tensor  # [B] int64
    response_ids: Tensor  # [B, R] int64, right-padded
    lengths: Tensor  # [B] int64, tokens of the response including its end when it has one
    finished: Tensor  # [B] bool, whether the response ended with a stop id
    logprobs: Tensor  # [B, R] float32, of the sampled tokens at the sampling temperature, 0 on padding
    end_id: int  # the end of a turn, -1 if nothing stops a response; other stop ids end one too
    # Mean |logprobs - the sampler's own|, in nats per token; None if `logprobs` are the sampler's own.
    sampler_gap: float | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def prompt(self, i: int) -> list[int]:
        """Return the token ids of prompt i, without padding."""
        return self.prompt_ids[i, self.prompt_ids.shape[1] - int(self.prompt_lengths[i]) :].tolist()

    def response(self, i: int) -> list[int]:
        """Return the token ids of response i, including its end if it has one."""
        return self.response_ids[i, : int(self.lengths[i])].tolist()

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, response ids) of every row, as they were sampled."""
        return [(self.prompt(i), self.response(i)) for i in range(len(self))]

    def ended_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Return `pairs` as reward models are trained on them: every response that has stopped ends with `end_id`."""
        ended = zip(self.pairs(), self.finished.tolist(), strict=True)
        return [(prompt, [*ids[:-1], self.end_id] if stopped else ids) for (prompt, ids), stopped in ended]

    def other_ends(self) -> int:
        """Return how many responses have stopped at another id than `end_id`."""
        last = self.response_ids.gather(1, self.lengths[:, None] - 1)[:, 0]
        return int((self.finished & (last != self.end_id)).sum())

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the responses as text, without special tokens."""
        return [tokenizer.decode(self.response(i), skip_special_tokens=True) for i in range(len(self))]


CDF_BLOCK = 256  # tokens summed at once: a cumulative sum over the whole vocabulary is ten times as slow


def sample_token(logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample a token per row from softmax(logits [B, V] / temperature) by inverse CDF.

    Returns the tokens, [B] int64, and their log-probabilities, [B] float32. A token is the first whose cumulative
    probability passes u, [B] float64; it is found by block of the vocabulary and then within the block. Without
    `uniforms` the likeliest token is taken.
    """
    top = logits.amax(-1, keepdim=True).float()
    # In place on one copy: at a vocabulary of 50,000 every tensor of this size costs as much as the exponential.
    weights = logits.to(torch.float32, copy=True).sub_(top).div_(temperature).exp_()
    if odd := weights.shape[1] % CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, CDF_BLOCK - odd))
    weights = weights.unflatten(1, (-1, CDF_BLOCK))
    blocks = weights.sum(-1, dtype=torch.float64).cumsum(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        target = uniforms.to(logits.device)[:, None] * blocks[:, -1:]
        block = _searchsorted_clamped(blocks, target)
        before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
        within = weights[torch.arange(len(logits), device=logits.device), block.squeeze(1)].double().cumsum(-1)
        tokens = (block * CDF_BLOCK + _searchsorted_clamped(within, target - before)).squeeze(1)
    chosen = (logits.gather(1, tokens[:, None]).float() - top).squeeze(1) / temperature
    return tokens, chosen - blocks[:, -1].log().float()


def _searchsorted_clamped(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the index [B, 1] of the first entry above target [B, 1], but at most the last entry that adds anything.

    Rounding may leave a target equal to the whole sum, and the entries after it can never be sampled.
    """
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


Decode = Callable[[list[Sequence[int]], list[int]], list[Response]]  # of one batch: prompts and seeds to responses


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample one response for each prompt (token ids), in their order; repeat a prompt to sample it several times.

    Several processes share the prompts between them. All must call, and all get every row. `seeds` has one per row
    (`row_seed`); a row of the native engine depends on its seed, not on its batch mates (up to rounding). `advance` is
    called with the number of responses finished, for progress; with several processes that is an estimate. Raises
    UserError if the policy's logits are not finite, or the vLLM server does not do what it is asked, and ValueError if
    there are not as many seeds as prompts.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    pad_id, engine = int(tokenizer.pad_token_id), engine_for(policy, params.engine)
    if engine == "vllm":
        responses = sample_vllm(policy, tokenizer, prompts, params, seeds, advance)
    else:
        engines = {"native": _decode_native, "generate": _decode_generate}
        decode = partial(engines[engine], policy, params, pad_id)
        responses = _decode_sharded(policy, decode, prompts, seeds, params.batch_size, advance)
    return pad_rollout(prompts, responses, pad_id, params.stop_ids)


def engine_for(policy: PreTrainedModel, engine: RolloutEngine) -> RolloutEngine:
    """Return the engine that was asked for, or native if it cannot run the policy's method; say so the first time.

    vLLM takes plain weights. A policy whose adapter cannot be merged into them is sampled by the native engine.
    """
    peft = peft_of(policy)
    if engine != "vllm" or peft is None or not (reason := why_not_mergeable(peft)):
        return engine
    if reason not in _reported:
        _reported.add(reason)
        note(f"sampling with the native engine, because {engine} takes merged weights only: {reason}")
    return "native"


def _decode_sharded(
    policy: PreTrainedModel,
    decode: Decode,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None] | None,
) -> list[Response]:
    """Decode this process's shard of the prompts in batches, and return the responses to all prompts in their order."""
    # Prompts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = shard(order)
    decoded: list[Response] = []
    with evaluating(policy):
        for first in range(0, len(mine), batch_size):
            batch = mine[first : first + batch_size]
            decoded += decode([prompts[i] for i in batch], [seeds[i] for i in batch])
            if advance:
                # The others have done about as much, but in the last batch they may have fewer prompts.
                advance(min(len(batch) * processes(), len(prompts) - first * processes()))
    return gather_in_order(order, decoded)


def decoding_for(policy: PreTrainedModel, max_new_tokens: int) -> LlamaDecoding | ModelDecoding:
    """Return the fastest way of decoding that covers the policy."""
    forward = llama_forward_for(policy)
    return LlamaDecoding(forward, max_new_tokens, policy.device) if forward else ModelDecoding(policy)


def _decode_native(
    policy: PreTrainedModel, params: SamplingParams, pad_id: int, prompts: list[Sequence[int]], seeds: list[int]
) -> list[Response]:
    """Sample one batch by our decode loop."""
    # A prompt that is sampled several times is prefilled once.
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    index = {prompt: i for i, prompt in enumerate(distinct)}
    prompt_of_row = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=policy.device)
    uniforms = row_uniforms(seeds, params.max_new_tokens).to(policy.device)
    stops = torch.tensor(list(params.stop_ids), device=policy.device)
    responses: list[Response] = [([], []) for _ in prompts]
    alive = torch.arange(len(prompts), device=policy.device)  # the row of `prompts` that each row of the batch is
    decoding = decoding_for(policy, params.max_new_tokens)
    logits = decoding.prefill([list(prompt) for prompt in distinct], prompt_of_row, pad_id)
    tokens_in_all = token_count(policy)
    for step in range(params.max_new_tokens):
        logits = logits[:, :tokens_in_all]
        _check_finite(logits)
        if params.temperature > 0:
            tokens, logprobs = sample_token(logits, uniforms[alive, step], params.temperature)
        else:
            tokens, logprobs = sample_token(logits, None)
        for row, token, logprob in zip(alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            responses[row][0].append(token)
            responses[row][1].append(logprob)
        heartbeat()
        unfinished = ~torch.isin(tokens, stops)
        if step + 1 == params.max_new_tokens or not bool(unfinished.any()):
            break
        if not bool(unfinished.all()):
            # A finished row costs as much as a live one: take it out of the batch and of the cache.
            kept = decoding.drop_finished(unfinished.tolist())
            alive, tokens = alive[kept], tokens[kept]
        logits = decoding.step(tokens)
    return responses


class RequireFinite(LogitsProcessor):
    """Check each step of transformers' generate as our loop does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are; raise UserError if they are not finite."""
        _check_finite(scores)
        return scores


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        fix = "it has diverged: go back to an earlier checkpoint with a lower learning rate, or use float32"
        raise UserError("the policy's logits are not finite: there is nothing to sample from", fix=fix)


def _decode_generate(
    policy: PreTrainedModel, params: SamplingParams, pad_id: int, prompts: list[Sequence[int]], seeds: list[int]
) -> list[Response]:
    """Sample one batch by transformers' generate, seeded by its first row; a second pass gives log-probabilities."""
    responses = _generate(policy, params, pad_id, prompts, seeds[0])
    pairs = list(zip(prompts, responses, strict=True))
    logprobs = token_logprobs(policy, pairs, params.temperature or 1.0, alone=True)
    return [(response, row.tolist()) for response, row in zip(responses, logprobs, strict=True)]


def _generate(
    policy: PreTrainedModel, params: SamplingParams, pad_id: int, prompts: list[Sequence[int]], seed: int
) -> list[list[int]]:
    """Return the sampled ids of each prompt, up to the first token that ends a response."""
    ids, mask = (t.to(policy.device) for t in pad(prompts, pad_id, left=True))
    count, how = token_count(policy), {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    # The caller's random streams must not move.
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        full = policy.generate(
            ids,
            attention_mask=mask.long(),
            max_new_tokens=params.max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=list(params.stop_ids),
            suppress_tokens=list(range(count, policy.config.get_text_config().vocab_size)) if count else None,
            logits_processor=LogitsProcessorList([RequireFinite()]),
            **(how if params.temperature > 0 else {}),
        )
    responses = []
    for row in full[:, ids.shape[1] :].tolist():
        end = next((t for t, token in enumerate(row) if token in params.stop_ids), len(row) - 1)
        responses.append(row[: end + 1])
    return responses


def pad_rollout(
    prompts: Sequence[Sequence[int]], responses: Sequence[Response], pad_id: int, stop_ids: Sequence[int]
) -> Rollout:
    """Return the rollout of prompts and their responses; one that ends with one of `stop_ids` is finished.

    The first of these is the end of a turn.
    """
    prompt_ids, _ = pad(prompts, pad_id, left=True)
    width = max(len(ids) for ids, _ in responses)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        response_ids=torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in responses]),
        lengths=torch.tensor([len(ids) for ids, _ in responses]),
        finished=torch.tensor([ids[-1] in stop_ids for ids, _ in responses]),
        logprobs=torch.tensor([lps + [0.0] * (width - len(lps)) for _, lps in responses], dtype=torch.float32),
        end_id=stop_ids[0] if stop_ids else -1,
    )
