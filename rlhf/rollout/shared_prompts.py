"""Outputs that share a prompt in one pass: the layers see the prompt's tokens once, and no padding.

The tokens of a batch lie end to end in one row: prompt, its outputs, the next prompt, its outputs. All that works on
single tokens (embeddings, linear maps, norms) takes them as they lie; positions go on from the prompt's end for each of
its outputs. Attention alone sees whole sequences: queries, keys and values are copied to one row for each output with
its prompt before it, where causal attention is the usual one and needs no mask. What comes out at the prompt's tokens
is the same in the rows of all its outputs, and the first of them is taken.

Of 9 outputs of 48 tokens to a prompt of 40 that leaves 472 of 792 tokens; the scores equal those of
rlhf/rollout/scoring.py.

Shapes: T tokens in all, S outputs of at most L tokens with their prompt, h heads of width d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.config import VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.methods import peft_of
from rlhf.models.placement import materialized
from rlhf.rollout.batches import Pair, build_batch
from rlhf.rollout.scoring import hidden_states

ATTENTION = "shared_prompts"  # its name among transformers' kernels


@dataclass
class SharedBatch:
    """Outputs with their prompts, as one row of tokens."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    rows: Tensor  # [S, L] where in that row the tokens of each sequence are; 0 on padding
    first: Tensor  # [T] where in the flattened `rows` each token is for the first time
    last: Tensor  # [S] where in the row the last token of each sequence is

    def to(self, device: torch.device) -> SharedBatch:
        return SharedBatch(**{name: value.to(device) for name, value in vars(self).items()})


def build_shared(pairs: Sequence[Pair]) -> SharedBatch:
    """One batch of pairs; those that follow one another with equal prompts share it."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[list[int]] = []
    shared: Sequence[int] | None = None
    start = 0  # of the prompt
    for prompt, response in pairs:
        if shared is None or list(shared) != list(prompt):
            shared, start = prompt, len(ids)
            ids += prompt
            positions += range(len(prompt))
        begin = len(ids)
        ids += response
        positions += range(len(prompt), len(prompt) + len(response))
        rows.append([*range(start, start + len(prompt)), *range(begin, begin + len(response))])
    width = max(map(len, rows))
    first = [-1] * len(ids)
    for row, places in enumerate(rows):
        for column, place in enumerate(places):
            if first[place] < 0:
                first[place] = row * width + column
    return SharedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([places + [0] * (width - len(places)) for places in rows]),
        torch.tensor(first),
        torch.tensor([places[-1] for places in rows]),
    )


def shared_scores(reward_model: nn.Module, batch: SharedBatch) -> Tensor:
    """Scores [S] of whole responses before normalisation, inside `sharing`."""
    return reward_model.score(last_states(reward_model, batch)).squeeze(-1).float()


def last_states(model: nn.Module, batch: SharedBatch) -> Tensor:
    """Hidden states [S, H] at the last token of each response, inside `sharing`."""
    hidden = getattr(model, model.base_model_prefix)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        shared_rows=batch.rows,
        shared_first=batch.first,
    ).last_hidden_state
    return hidden[0, batch.last]


@contextmanager
def share_prompts(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention is that of shared prompts, in backward passes that recompute layers too."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_share(model: nn.Module) -> bool:
    """Whether prompts can be shared in this model, found by scoring a few tokens both ways; all processes must ask.

    Not with virtual tokens, which stand before every row and here would stand before the first one, nor with a window
    of attention, which a few tokens would not show, nor with kernels that were asked for by name.
    """
    windows = {getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    peft = peft_of(model)
    if peft is not None and peft.method in VIRTUAL_TOKEN_METHODS:
        return False
    if model.config._attn_implementation != "sdpa" or windows != {None}:
        return False
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = [(i * 7 + 3) % vocabulary for i in range(16)]
    pairs = [(tokens[:4], tokens[4:9]), (tokens[:4], tokens[9:11]), (tokens[11:13], tokens[13:])]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), materialized(model):
            # Not the scores, for a new head may be all zeros.
            apart = build_batch(pairs, 0).to(model.device)
            rows = torch.arange(len(pairs), device=model.device)
            expected = hidden_states(model, apart)[rows, apart.last]
            with share_prompts(model):
                found = last_states(model, build_shared(pairs).to(model.device))
    except (TypeError, ValueError, RuntimeError, IndexError):  # an architecture that does not hand the rows on
        return False
    finally:
        model.train(training)
    gap = float((found.float() - expected.float()).norm() / expected.float().norm())
    return gap < (1e-3 if model.dtype == torch.float32 else 5e-2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_rows: Tensor,
    shared_first: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each output to its prompt and itself: [1, h, T, d] in, [1, T, h, d] out."""
    options["is_causal"] = True
    apart = (_picked(each.transpose(1, 2)[0], shared_rows).transpose(1, 2) for each in (query, key, value))
    out, _ = sdpa_attention_forward(module, *apart, None, **options)
    return _picked(out.flatten(0, 1), shared_first)[None], None


def _picked(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens [N, h, d] at `places` [...] as [..., h, d]."""
    # As an embedding: its backward adds up rows of a prompt that was taken several times, fast and in fixed order.
    return embedding(places, tokens.flatten(1)).unflatten(-1, tokens.shape[1:])


AttentionInterface.register(ATTENTION, _attention)
