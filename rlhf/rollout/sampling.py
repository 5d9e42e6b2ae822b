"""Sampling responses: one interface, three engines.

`native` is our decode loop: the prompts are prefilled once, every row draws with its own seed by inverse CDF, rows
leave the batch when they finish, and only the sampled token's log-probability is kept. `generate` is transformers'
generate, for models that the loop does not cover. `vllm` is in rlhf/rollout/vllm_engine.py. All sample from the plain
softmax at the given temperature: no top-k, no top-p, no minimum length, so that the policy's own log-probabilities are
those of the sampling distribution.

Shapes: B rows, P the longest prompt, R the longest response that was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import LaunchSection
from rlhf.errors import UserError
from rlhf.functional.seeding import row_uniforms
from rlhf.models.peft.merging import why_not_mergeable
from rlhf.models.peft.methods import peft_of
from rlhf.models.placement import materialized
from rlhf.rollout.decoding import LlamaDecoding, ModelDecoding, pad
from rlhf.rollout.llama_forward import llama_forward_for
from rlhf.rollout.scoring import token_logprobs
from rlhf.system.console import note
from rlhf.system.distributed import gather_shards, processes, shard
from rlhf.system.phases import heartbeat

SamplingEngine = Literal["native", "generate", "vllm"]
_reported: set[str] = set()
CDF_BLOCK = 256  # tokens summed at once: a cumulative sum over the whole vocabulary is ten times as slow


def decoding_for(policy: PreTrainedModel, max_new_tokens: int, graphs: bool = False) -> LlamaDecoding | ModelDecoding:
    """The fastest way that covers the policy; with `graphs` its steps all have one shape, where that can be had."""
    inference = llama_forward_for(policy)
    if inference is None:
        return ModelDecoding(policy)
    if graphs:
        from rlhf.rollout.cuda_graphs import GraphDecoding

        return GraphDecoding(inference, max_new_tokens, policy.device)
    return LlamaDecoding(inference, max_new_tokens, policy.device)


@dataclass
class Rollout:
    """Prompts and what the policy answered; all tensors are on the CPU."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_lengths: Tensor  # [B] int64
    response_ids: Tensor  # [B, R] int64, right-padded
    lengths: Tensor  # [B] int64, tokens of the response including its EOS when it has one
    finished: Tensor  # [B] bool, whether the response ended with EOS
    logprobs: Tensor  # [B, R] float32, of the sampled tokens at the sampling temperature, 0 on padding

    def __len__(self) -> int:
        return len(self.lengths)

    def prompt(self, i: int) -> list[int]:
        """Token ids of prompt i, without padding."""
        return self.prompt_ids[i, self.prompt_ids.shape[1] - int(self.prompt_lengths[i]) :].tolist()

    def response(self, i: int) -> list[int]:
        """Token ids of response i including its EOS when it has one."""
        return self.response_ids[i, : int(self.lengths[i])].tolist()

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, response ids) of every row, as the scorer takes them."""
        return [(self.prompt(i), self.response(i)) for i in range(len(self))]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The responses as text, special tokens left out."""
        return [tokenizer.decode(self.response(i), skip_special_tokens=True) for i in range(len(self))]


def sample_token(logits: Tensor, uniforms: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits [B, V] / temperature), and its log-probability [B] there, in nats.

    By inverse CDF: the first token whose cumulative probability passes u [B] (float64), found by block of the
    vocabulary and then within it. Without `uniforms` the likeliest token.
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
    logprobs = chosen - blocks[:, -1].log().float()
    return tokens, logprobs


def _searchsorted_clamped(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [B, 1] of the first entry above target [B, 1], and no later than the last that adds anything.

    Rounding may leave a target at the very sum, and behind it lie only entries that can never be drawn.
    """
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    engine: SamplingEngine = "native",
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
    launch: LaunchSection | None = None,
) -> Rollout:
    """Sample one response for each prompt (token ids); repeat a prompt to sample it several times.

    Several processes share the prompts out; all of them must call, and get all rows.

    Args:
        temperature: above 0; 0 is greedy decoding (then log-probabilities are at temperature 1).
        seeds: one per row (`row_seed`); a native row's draw depends on its seed, not on its batch mates.
        stop_ids: tokens that end a response and belong to it.
        advance: called with the number of responses finished, for progress.
        launch: says where vLLM is, for that engine, and whether native steps are replayed from CUDA graphs.

    Returns:
        Rows in the order of `prompts`.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    where = launch or LaunchSection()
    engine = engine_for(policy, engine)
    if engine == "vllm":
        from rlhf.rollout.vllm_engine import sample_vllm

        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
        answers = sample_vllm(
            policy, tokenizer, prompts, seeds=seeds, stop_ids=stop_ids, launch=where, advance=advance, **how
        )
        return pad_rollout(prompts, answers, int(tokenizer.pad_token_id), set(stop_ids))
    decode = {"native": _native(where), "generate": _decode_generate}[engine]
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    # Prompts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = policy.training
    policy.eval()

    def decode_rows(mine: list[int]) -> list[tuple[list[int], list[float]]]:
        out = []
        for first in range(0, len(mine), batch_size):
            chosen = mine[first : first + batch_size]
            out += decode(
                policy,
                [list(prompts[i]) for i in chosen],
                int(tokenizer.pad_token_id),
                max_new_tokens,
                temperature,
                [seeds[i] for i in chosen],
                list(stop_ids),
            )
            if advance:
                advance(len(chosen) * processes())
        return out

    try:
        with torch.no_grad(), materialized(policy):
            mine = decode_rows(shard(order))
    finally:
        policy.train(training)
    for i, row in zip(order, gather_shards(mine), strict=True):
        rows[i] = row
    return pad_rollout(prompts, rows, int(tokenizer.pad_token_id), set(stop_ids))


def engine_for(policy: PreTrainedModel, engine: SamplingEngine) -> SamplingEngine:
    """The engine asked for, or native where that one cannot run the policy's method; the first time it says so.

    vLLM is given plain weights; what cannot be merged into them runs here alone.
    """
    peft = peft_of(policy)
    if engine != "vllm" or peft is None or not (reason := why_not_mergeable(peft)):
        return engine
    if reason not in _reported:
        _reported.add(reason)
        note(f"sampling with the native engine, for {engine} takes merged weights alone: {reason}")
    return "native"


def _native(launch: LaunchSection) -> Callable[..., list[tuple[list[int], list[float]]]]:
    return partial(_decode_native, graphs=launch.cuda_graphs)


def _decode_native(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    seeds: list[int],
    stop_ids: list[int],
    graphs: bool,
) -> list[tuple[list[int], list[float]]]:
    """The decode loop; returns (token ids, log-probabilities) of each row."""
    device = policy.device
    # A prompt that is sampled several times is prefilled once.
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    prompt_of_row = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    uniforms = row_uniforms(seeds, max_new_tokens).to(device)
    stops = torch.tensor(stop_ids, device=device)
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    alive = torch.arange(len(prompts), device=device)
    decoding = decoding_for(policy, max_new_tokens, graphs)
    logits = decoding.prefill([list(prompt) for prompt in distinct], prompt_of_row, pad_id)
    for step in range(max_new_tokens):
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise UserError(
                "the policy's logits are not finite: there is nothing to sample from",
                fix="it has diverged: go back to an earlier checkpoint with a lower learning rate, or use float32",
            )
        if temperature > 0:
            tokens, logprobs = sample_token(logits, uniforms[alive, step], temperature)
        else:
            tokens, logprobs = sample_token(logits, None)
        for row, token, logprob in zip(alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            out[row][0].append(token)
            out[row][1].append(logprob)
        heartbeat()
        unfinished = ~torch.isin(tokens, stops)
        if step + 1 == max_new_tokens or not bool(unfinished.any()):
            break
        if not bool(unfinished.all()):
            # A finished row costs as much as a live one: take it out of the batch and of the cache.
            places = decoding.drop_finished(unfinished.tolist())
            alive, tokens = alive[places], tokens[places]
        logits = decoding.step(tokens)
    return out


def _decode_generate(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    seeds: list[int],
    stop_ids: list[int],
) -> list[tuple[list[int], list[float]]]:
    """transformers' generate; log-probabilities come from a second, full forward. Seeded by the batch's first row."""
    ids, mask = (t.to(policy.device) for t in pad(prompts, pad_id, left=True))
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    # The caller's random streams stay as they were.
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seeds[0] % 2**63)
        full = policy.generate(
            ids,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=stop_ids,
            **how,
        )
    responses = []
    for row in full[:, ids.shape[1] :].tolist():
        end = next((t for t, token in enumerate(row) if token in stop_ids), len(row) - 1)
        responses.append(row[: end + 1])
    pairs = list(zip(prompts, responses, strict=True))
    logprobs = token_logprobs(policy, pairs, temperature or 1.0, alone=True)
    return [(response, lp.tolist()) for response, lp in zip(responses, logprobs, strict=True)]


def pad_rollout(
    prompts: Sequence[Sequence[int]], rows: list[tuple[list[int], list[float]]], pad_id: int, stops: set[int]
) -> Rollout:
    """A rollout of prompts and the (token ids, log-probabilities) that answer them; `stops` end a finished one."""
    prompt_ids, _ = pad(prompts, pad_id, left=True)
    width = max(len(ids) for ids, _ in rows)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        response_ids=torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows]),
        lengths=torch.tensor([len(ids) for ids, _ in rows]),
        finished=torch.tensor([ids[-1] in stops for ids, _ in rows]),
        logprobs=torch.tensor([lps + [0.0] * (width - len(lps)) for _, lps in rows], dtype=torch.float32),
    )
