"""Log-probabilities, values and rewards of given responses, by one code path for every stage.

A batch of (prompt ids, response ids) pairs becomes one padded tensor with explicit positions. Only the hidden states of
the positions that are asked for go through a head (rlhf/rollout/lm_head.py), so that no [batch, length, vocabulary]
tensor exists. Pairs are sorted by length and split into batches by token count.

Shapes: B rows of L tokens, N response tokens in all, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlhf.models.logit_map import logit_map
from rlhf.models.placement import materialized
from rlhf.rollout.batches import Pair, SequenceBatch, build_batch, token_budget_batches
from rlhf.rollout.llama_forward import llama_forward_for, slow_groups
from rlhf.rollout.lm_head import head_logprobs
from rlhf.system.distributed import gather_shards, processes, shard
from rlhf.system.phases import heartbeat

T = TypeVar("T")


def hidden_states(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Return the last hidden states [B, L, H] of the backbone, without any head."""
    # Only in float32: in bfloat16 another order of operations rounds otherwise, and the first ratio must be 1 by the
    # pass that trains.
    ours = not torch.is_grad_enabled() and model.dtype == torch.float32
    if ours and (inference := llama_forward_for(model)):
        return inference.hidden(batch.input_ids)
    backbone = getattr(model, model.base_model_prefix)
    mask = None
    if slow_groups(next(model.parameters())):
        # With a mask, transformers repeats keys and values itself, and torch takes a kernel that keeps no scores.
        mask = torch.arange(batch.input_ids.shape[1], device=model.device)[None] <= batch.last[:, None]
    return backbone(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def token_count(policy: nn.Module) -> int | None:
    """Return how many rows of the policy's head are tokens; None if all are."""
    count = getattr(policy, "token_count", None)
    return count if count is not None and count < policy.config.get_text_config().vocab_size else None


def response_logprobs(
    policy: nn.Module, batch: SequenceBatch, temperature: float, chunks: int = 0
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] of the response tokens, and the entropies [N] of their distributions, in nats."""
    hidden = hidden_states(policy, batch)[batch.rows, batch.before]
    return _policy_logprobs(policy, hidden, batch.targets, temperature, chunks)


def _policy_logprobs(
    policy: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, chunks: int = 0
) -> tuple[Tensor, Tensor]:
    """Take hidden states [N, H] through the policy's head, and what the model does after it (see `head_logprobs`)."""
    tokens, head = token_count(policy), policy.get_output_embeddings()
    return head_logprobs(head, hidden, targets, temperature, chunks, tokens, logit_map(policy))


def normalise_scores(model: nn.Module, raw: Tensor) -> Tensor:
    """Return (raw score - reward_mean) / reward_std; both are in the model's config, since the head has no bias."""
    config = model.config
    return (raw.float() - config.reward_mean) / config.reward_std


def response_values(value_model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Return values [N] of the states in which each response token was chosen, on the scale of normalised scores."""
    hidden = hidden_states(value_model, batch)[batch.rows, batch.before]
    return normalise_scores(value_model, value_model.score(hidden).squeeze(-1))


def raw_scores(reward_model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Return scores [B] of whole responses before normalisation, read at the index of the last response token."""
    hidden = hidden_states(reward_model, batch)
    final = hidden[torch.arange(len(hidden), device=hidden.device), batch.last]
    return reward_model.score(final).squeeze(-1).float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Gather or load the model's weights for the block, and switch dropout and gradients off in it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), materialized(model):
            yield
    finally:
        model.train(training)


def gather_in_order(order: Sequence[int], mine: list[T]) -> list[T]:
    """Return the results of all processes, of which `mine` are those of this process's shard of `order`.

    The result at index order[i] is that of element i of `order`.
    """
    return [result for _, result in sorted(zip(order, gather_shards(mine), strict=True), key=lambda pair: pair[0])]


def _over_batches(
    model: nn.Module,
    pairs: Sequence[Pair],
    tokens: int,
    forward: Callable[[SequenceBatch], list[Tensor]],
    advance: Callable[[int], None] | None,
) -> list[Tensor]:
    """Run `forward` without gradients over length-sorted batches, and return the results in the order of `pairs`.

    Several processes share the pairs out. All of them must call, and all get every result.
    """
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    with evaluating(model):
        mine = _in_batches(model, [pairs[i] for i in shard(by_length)], tokens, forward, advance)
    return gather_in_order(by_length, mine)


def _in_batches(
    model: nn.Module,
    pairs: Sequence[Pair],
    tokens: int,
    forward: Callable[[SequenceBatch], list[Tensor]],
    advance: Callable[[int], None] | None,
) -> list[Tensor]:
    results: list[Tensor] = [torch.empty(0)] * len(pairs)
    device = next(model.parameters()).device
    for indices in token_budget_batches([len(p) + len(r) for p, r in pairs], tokens):
        batch = build_batch([pairs[i] for i in indices], 0).to(device)
        for i, result in zip(indices, forward(batch), strict=True):
            results[i] = result.cpu()
        heartbeat()
        if advance:
            advance(len(indices) * processes())
    return results


def _by_row(batch: SequenceBatch, flat: Tensor) -> list[Tensor]:
    return list(flat.split(torch.bincount(batch.rows, minlength=len(batch.last)).tolist()))


def token_logprobs(
    policy: nn.Module,
    pairs: Sequence[Pair],
    temperature: float = 1.0,
    tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
    alone: bool = False,
) -> list[Tensor]:
    """Return log-probabilities of every response token: one float32 tensor [T_i] for each pair, on the CPU.

    `tokens` is the most tokens of a batch, padding included. `advance` is called with the number of pairs done.
    `alone` computes all pairs in this process instead of sharing them between the processes.
    """

    def forward(batch: SequenceBatch) -> list[Tensor]:
        return _by_row(batch, response_logprobs(policy, batch, temperature)[0])

    if alone:
        with torch.no_grad():
            return _in_batches(policy, pairs, tokens, forward, advance)
    return _over_batches(policy, pairs, tokens, forward, advance)


def candidate_logprobs(policy: nn.Module, hidden: Tensor, candidates: Sequence[int]) -> Tensor:
    """Return log-probabilities [B, C] of the candidates [C] as the token after each of the hidden states [B, H]."""
    targets = torch.tensor(candidates, device=hidden.device).repeat(len(hidden))
    repeated = hidden.repeat_interleave(len(candidates), 0)
    logprobs, _ = _policy_logprobs(policy, repeated, targets, 1.0)
    return logprobs.view(len(hidden), len(candidates))


def next_token_logprobs(
    policy: nn.Module,
    contexts: Sequence[Sequence[int]],
    candidates: Sequence[int],
    tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Return for every context the log-probabilities [C] of the candidates as its next token, on the CPU."""

    def forward(batch: SequenceBatch) -> list[Tensor]:
        return list(candidate_logprobs(policy, hidden_states(policy, batch)[batch.rows, batch.before], candidates))

    return _over_batches(policy, [(context, candidates[:1]) for context in contexts], tokens, forward, advance)


def token_values(
    value_model: nn.Module, pairs: Sequence[Pair], tokens: int = 2048, advance: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Return the value of the state before every response token: one float32 tensor [T_i] per pair, on the CPU."""
    return _over_batches(value_model, pairs, tokens, lambda b: _by_row(b, response_values(value_model, b)), advance)


def scores(
    reward_model: nn.Module, pairs: Sequence[Pair], tokens: int = 2048, advance: Callable[[int], None] | None = None
) -> Tensor:
    """Return normalised scores [B] of whole responses, in float32 on the CPU."""

    def forward(batch: SequenceBatch) -> list[Tensor]:
        return list(normalise_scores(reward_model, raw_scores(reward_model, batch)))

    return torch.stack(_over_batches(reward_model, pairs, tokens, forward, advance))
