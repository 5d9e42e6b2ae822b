"""Log-probabilities, values and rewards of given responses, by one code path for every stage.

A batch of (prompt ids, response ids) pairs becomes one padded tensor with explicit positions. Hidden states are taken
at the positions that matter first; only those go through a head (rlhf/head.py), so that no [batch, length, vocabulary]
tensor exists. Batches are cut by token count after sorting by length.

Shapes: B rows of L tokens, N response tokens in all, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.errors import UserError
from rlhf.head import vocabulary_logprobs
from rlhf.inference import inference_for, slow_groups
from rlhf.models.placement import at_hand
from rlhf.system.distributed import gathered, own, processes
from rlhf.system.phase_timer import count_batch
from rlhf.system.phases import progressed

Pair = tuple[Sequence[int], Sequence[int]]
HEAD_PIECE = 512  # positions for which a head is called: 100 MB of logits at V = 49152 in float32


@dataclass
class SequenceBatch:
    """Prompts and responses as one tensor; `rows`, `slots` say which response token each flat entry is."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L]; None on the right: there padding lies behind all that a token attends to
    position_ids: Tensor  # [B, L]
    rows: Tensor  # [N] row of each response token
    slots: Tensor  # [N] its index in the response
    before: Tensor  # [N] column of the token before it: where it is predicted and where its state value is read
    targets: Tensor  # [N] its id
    last: Tensor  # [B] column of the last response token

    def to(self, device: torch.device) -> SequenceBatch:
        return SequenceBatch(**{k: None if v is None else v.to(device) for k, v in vars(self).items()})

    def unflatten(self, flat: Tensor, width: int) -> Tensor:
        """Flat values [N] as [B, width], zero on padding (differentiable)."""
        return flat.new_zeros(len(self.last), width).index_put((self.rows, self.slots), flat)


def build_batch(pairs: Sequence[Pair], pad_id: int, side: Literal["left", "right"] = "right") -> SequenceBatch:
    """One padded batch; masks and positions come from lengths, so `pad_id` may be any token, EOS included.

    Padded on the right it needs no attention mask, and attention takes its fastest kernels: causal attention alone
    keeps padding from every real token. Positions go on over the padding, for transformers takes a restart for the
    beginning of a packed document.
    """
    width = max(len(p) + len(r) for p, r in pairs)
    count_batch(sum(len(p) + len(r) for p, r in pairs), len(pairs) * width)
    ids = torch.full((len(pairs), width), pad_id)
    positions = torch.arange(width).repeat(len(pairs), 1)
    mask = torch.zeros_like(ids) if side == "left" else None
    rows, slots, before, targets, last = [], [], [], [], []
    for row, (prompt, response) in enumerate(pairs):
        n = len(prompt) + len(response)
        first = width - n if side == "left" else 0
        ids[row, first : first + n] = torch.tensor([*prompt, *response])
        if mask is not None:
            mask[row, first:] = 1
            positions[row] = (positions[row] - first).clamp(min=0)
        start = first + len(prompt)
        rows += [row] * len(response)
        slots += range(len(response))
        before += range(start - 1, start - 1 + len(response))
        targets += response
        last.append(first + n - 1)
    flat = [torch.tensor(x, dtype=torch.long) for x in (rows, slots, before, targets, last)]
    return SequenceBatch(ids, mask, positions, *flat)


def token_budget_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length whose padded size stays within `tokens` (one row at least)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def hidden_states(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Last hidden states [B, L, H] of the backbone, without any head."""
    # In bfloat16 another order of operations rounds otherwise, and the ratio must be 1 by the pass that trains.
    ours = not torch.is_grad_enabled() and model.dtype == torch.float32 and batch.attention_mask is None
    if ours and (inference := inference_for(model)):
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


def _head_piece(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def head_pieces(tokens: int) -> int:
    """In how many pieces the LM head takes that many positions."""
    return max(1, -(-tokens // HEAD_PIECE))


def head_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, pieces: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of `targets` [N] given hidden states [N, H], and the entropies [N] (no gradient), in nats.

    A head that lies here whole is taken by slices of the vocabulary. One that is more than its weight, or whose weight
    is gathered when it is called, is called on `pieces` of the positions (as many as needed when 0); with gradients
    each is recomputed in the backward pass instead of kept.
    """
    if not pieces and type(head) is nn.Linear and head.weight.numel():
        return vocabulary_logprobs(hidden, head.weight, head.bias, targets, temperature)
    logps, entropies = [], []
    pieces = pieces or head_pieces(len(hidden))
    for h, t in zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and pieces > 1:
            logp, entropy = checkpoint(_head_piece, head, h, t, temperature, use_reentrant=False)
        else:
            logp, entropy = _head_piece(head, h, t, temperature)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def response_logprobs(
    policy: nn.Module, batch: SequenceBatch, temperature: float, pieces: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the response tokens and the entropies [N] of the distributions they came from."""
    hidden = hidden_states(policy, batch)[batch.rows, batch.before]
    return head_logprobs(policy.get_output_embeddings(), hidden, batch.targets, temperature, pieces)


def normalised(model: nn.Module, raw: Tensor) -> Tensor:
    """(raw score - reward_mean) / reward_std, both kept in the model's config since the head has no bias."""
    config = model.config
    return (raw.float() - config.reward_mean) / config.reward_std


def response_values(value_model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Values [N] of the states in which each response token was chosen, on the scale of normalised scores."""
    hidden = hidden_states(value_model, batch)[batch.rows, batch.before]
    return normalised(value_model, value_model.score(hidden).squeeze(-1))


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
        with torch.no_grad(), at_hand(model):
            mine = _in_batches(model, [pairs[i] for i in own(by_length)], tokens, forward, advance)
    finally:
        model.train(training)
    results: list[Tensor] = [torch.empty(0)] * len(pairs)
    for i, row in zip(by_length, gathered(mine), strict=True):
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
        progressed()
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
        reward_model, pairs, tokens, lambda b: list(normalised(reward_model, raw_scores(reward_model, b))), advance
    )
    return torch.stack(rows)


def check_plain_head(policy: nn.Module) -> None:
    """Refuse a model whose logits are more than head(hidden): soft caps or scales would silently be left out.

    Raises:
        UserError: when the two disagree on a probe of eight tokens.
    """
    training = policy.training
    policy.eval()
    with torch.no_grad(), at_hand(policy):
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
