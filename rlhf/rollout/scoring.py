"""Log-probabilities, values and rewards of given responses, by one code path for every stage.

A batch of (prompt ids, response ids) pairs becomes one padded tensor with explicit positions. Hidden states are taken
at the positions that matter first; only those go through a head (rlhf/rollout/lm_head.py), so that no
[batch, length, vocabulary] tensor exists. Batches are cut by token count after sorting by length.

Shapes: B rows of L tokens, N response tokens in all, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.placement import materialized
from rlhf.rollout.batches import Pair, SequenceBatch, build_batch, token_budget_batches
from rlhf.rollout.llama_forward import llama_forward_for, slow_groups
from rlhf.rollout.lm_head import head_logprobs
from rlhf.system.distributed import gather_shards, processes, shard
from rlhf.system.phases import heartbeat


def hidden_states(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Last hidden states [B, L, H] of the backbone, without any head."""
    # In bfloat16 another order of operations rounds otherwise, and the ratio must be 1 by the pass that trains.
    ours = not torch.is_grad_enabled() and model.dtype == torch.float32 and batch.attention_mask is None
    if ours and (inference := llama_forward_for(model)):
        return inference.hidden(batch.input_ids)
    backbone = getattr(model, model.base_model_prefix)
    mask = batch.attention_mask
    if mask is None and slow_groups(next(model.parameters())):
        # Given a mask, transformers repeats keys and values itself, and torch takes a kernel that holds no scores.
        mask = torch.arange(batch.input_ids.shape[1], device=model.device)[None] <= batch.last[:, None]
    return backbone(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def response_logprobs(
    policy: nn.Module, batch: SequenceBatch, temperature: float, pieces: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the response tokens and the entropies [N] of the distributions they came from."""
    hidden = hidden_states(policy, batch)[batch.rows, batch.before]
    return head_logprobs(policy.get_output_embeddings(), hidden, batch.targets, temperature, pieces)


def normalise_scores(model: nn.Module, raw: Tensor) -> Tensor:
    """(raw score - reward_mean) / reward_std, both kept in the model's config since the head has no bias."""
    config = model.config
    return (raw.float() - config.reward_mean) / config.reward_std


def response_values(value_model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Values [N] of the states in which each response token was chosen, on the scale of normalised scores."""
    hidden = hidden_states(value_model, batch)[batch.rows, batch.before]
    return normalise_scores(value_model, value_model.score(hidden).squeeze(-1))


def raw_scores(reward_model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Scores [B] of whole responses, read at the last response token by index, before normalisation."""
    hidden = hidden_states(reward_model, batch)
    final = hidden[torch.arange(len(hidden), device=hidden.device), batch.last]
    return reward_model.score(final).squeeze(-1).float()


def _over_batches(
    model: nn.Module,
    pairs: Sequence[Pair],
    tokens: int,
    forward: Callable[[SequenceBatch], list[Tensor]],
    advance: Callable[[int], None] | None,
) -> list[Tensor]:
    """Run `forward` without gradients over length-sorted batches; results come back in the order of `pairs`.

    Several processes share the pairs out; all of them must call, and get all results.
    """
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), materialized(model):
            mine = _in_batches(model, [pairs[i] for i in shard(by_length)], tokens, forward, advance)
    finally:
        model.train(training)
    results: list[Tensor] = [torch.empty(0)] * len(pairs)
    for i, row in zip(by_length, gather_shards(mine), strict=True):
        results[i] = row
    return results


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
    """Log-probability of every response token: one float32 tensor [T_i] for each pair, on the CPU.

    `alone`: computed here, by this process, and not shared out.
    """

    def forward(batch: SequenceBatch) -> list[Tensor]:
        return _by_row(batch, response_logprobs(policy, batch, temperature)[0])

    if alone:
        with torch.no_grad():
            return _in_batches(policy, pairs, tokens, forward, advance)
    return _over_batches(policy, pairs, tokens, forward, advance)


def candidate_logprobs(policy: nn.Module, hidden: Tensor, candidates: Sequence[int]) -> Tensor:
    """Log-probabilities [B, C] of the candidates [C] as the token after each of the hidden states [B, H]."""
    targets = torch.tensor(candidates, device=hidden.device).repeat(len(hidden))
    repeated = hidden.repeat_interleave(len(candidates), 0)
    logprobs, _ = head_logprobs(policy.get_output_embeddings(), repeated, targets, 1.0)
    return logprobs.view(len(hidden), len(candidates))


def next_token_logprobs(
    policy: nn.Module,
    contexts: Sequence[Sequence[int]],
    candidates: Sequence[int],
    tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Log-probabilities [C] of each of the candidates as the token after a context, for every context, on the CPU.

    All of them are read off one pass over the context.
    """

    def forward(batch: SequenceBatch) -> list[Tensor]:
        return list(candidate_logprobs(policy, hidden_states(policy, batch)[batch.rows, batch.before], candidates))

    return _over_batches(policy, [(context, candidates[:1]) for context in contexts], tokens, forward, advance)


def token_values(
    value_model: nn.Module, pairs: Sequence[Pair], tokens: int = 2048, advance: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Value of the state before every response token: one float32 tensor [T_i] for each pair, on the CPU."""
    return _over_batches(value_model, pairs, tokens, lambda b: _by_row(b, response_values(value_model, b)), advance)


def scores(
    reward_model: nn.Module, pairs: Sequence[Pair], tokens: int = 2048, advance: Callable[[int], None] | None = None
) -> Tensor:
    """Normalised scores [B] float32 of whole responses, on the CPU."""
    rows = _over_batches(
        reward_model,
        pairs,
        tokens,
        lambda b: list(normalise_scores(reward_model, raw_scores(reward_model, b))),
        advance,
    )
    return torch.stack(rows)


def check_plain_head(policy: nn.Module) -> None:
    """Refuse a model whose logits are more than head(hidden): soft caps or scales would silently be left out.

    Raises:
        UserError: when the two disagree on a probe of eight tokens.
    """
    training = policy.training
    policy.eval()
    with torch.no_grad(), materialized(policy):
        vocabulary = policy.get_output_embeddings().weight.shape[0]
        ids = (torch.arange(8, device=policy.device) * 7 + 3).remainder(vocabulary)[None]
        whole = policy(input_ids=ids, use_cache=False).logits.float()
        ours = policy.get_output_embeddings()(
            getattr(policy, policy.base_model_prefix)(ids, use_cache=False)[0]
        ).float()
    policy.train(training)
    if not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(policy).__name__} changes its logits after the LM head (largest difference "
            f"{(whole - ours).abs().max():.3g})",
            where="model.name",
            fix="use an architecture whose logits are the LM head's output (Llama, Qwen, GPT-2, GPT-NeoX, OPT, ...)",
        )
