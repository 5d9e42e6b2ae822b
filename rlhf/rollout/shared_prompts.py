"""One pass over outputs that share a prompt: the layers see the prompt's tokens once, and no padding.

The tokens of a batch are concatenated into one row: a prompt, its outputs, the next prompt, its outputs. All that works
on single tokens (embeddings, linear maps, norms) takes this row; the positions of each output continue from the end of
its prompt. Attention alone needs whole sequences: queries, keys and values are copied into one row per output,
with its prompt before it, where causal attention is the usual one and needs no mask. The results at the prompt's tokens
are equal in the rows of all its outputs, and those of the first row are taken.

With 9 outputs of 48 tokens to a prompt of 40, 472 of 792 tokens remain. Scores are those of rlhf/rollout/scoring.py.

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

from rlhf.model_config import VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.methods import peft_of
from rlhf.rollout.batches import Pair, build_batch
from rlhf.rollout.scoring import evaluating, hidden_states

ATTENTION = "shared_prompts"  # the name of `_attention` among transformers' kernels


@dataclass
class SharedBatch:
    """Hold outputs with their prompts as one row of tokens."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    rows: Tensor  # [S, L] index into the row of each token of each sequence; 0 on padding
    first: Tensor  # [T] index into the flattened `rows` where each token occurs first
    last: Tensor  # [S] index into the row of the last token of each sequence

    def to(self, device: torch.device) -> SharedBatch:
        return SharedBatch(**{name: value.to(device) for name, value in vars(self).items()})


def build_shared(pairs: Sequence[Pair]) -> SharedBatch:
    """Return one batch of pairs; successive pairs with equal prompts share the prompt's tokens."""
    ids, positions, rows = list[int](), list[int](), list[list[int]]()
    shared: Sequence[int] | None = None
    start = 0  # index of the prompt's first token
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
    for row, indices in enumerate(rows):
        for column, index in enumerate(indices):
            if first[index] < 0:
                first[index] = row * width + column
    return SharedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([indices + [0] * (width - len(indices)) for indices in rows]),
        torch.tensor(first),
        torch.tensor([indices[-1] for indices in rows]),
    )


def shared_scores(reward_model: nn.Module, batch: SharedBatch) -> Tensor:
    """Return scores [S] of whole responses before normalisation. Call it inside `share_prompts`."""
    return reward_model.score(last_states(reward_model, batch)).squeeze(-1).float()


def last_states(model: nn.Module, batch: SharedBatch) -> Tensor:
    """Return hidden states [S, H] at the last token of each response. Call it inside `share_prompts`."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    shared = {"shared_rows": batch.rows, "shared_first": batch.first}
    return getattr(model, model.base_model_prefix)(**inputs, **shared).last_hidden_state[0, batch.last]


@contextmanager
def share_prompts(model: nn.Module) -> Iterator[None]:
    """Have the model attend by `_attention` inside the block; backward passes that recompute layers must be inside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_share(model: nn.Module) -> bool:
    """Return whether prompts can be shared in this model. All processes must call.

    A few tokens are passed both ways and compared. Three cases are refused before: virtual tokens, which belong before
    every row and would come before the first one only; a window of attention, which a few tokens would not show; and a
    kernel other than sdpa, which the recipe asks for by name.
    """
    text = model.config.get_text_config()
    windows = {getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")}
    peft = peft_of(model)
    if peft is not None and peft.method in VIRTUAL_TOKEN_METHODS:
        return False
    if model.config._attn_implementation != "sdpa" or windows != {None}:
        return False
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = [(i * 7 + 3) % vocabulary for i in range(16)]
    pairs = [(tokens[:4], tokens[4:9]), (tokens[:4], tokens[9:11]), (tokens[11:13], tokens[13:])]
    try:
        with evaluating(model):
            # Hidden states are compared, because the scores of a new head may be all zeros.
            apart = build_batch(pairs, 0).to(model.device)
            rows = torch.arange(len(pairs), device=model.device)
            expected = hidden_states(model, apart)[rows, apart.last]
            with share_prompts(model):
                found = last_states(model, build_shared(pairs).to(model.device))
    except (TypeError, ValueError, RuntimeError, IndexError):  # an architecture that does not pass the rows on
        return False
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
    """Attend from each output to its prompt and itself: [1, h, T, d] in, [1, T, h, d] out."""
    options["is_causal"] = True
    apart = (_picked(each.transpose(1, 2)[0], shared_rows).transpose(1, 2) for each in (query, key, value))
    out, _ = sdpa_attention_forward(module, *apart, None, **options)
    return _picked(out.flatten(0, 1), shared_first)[None], None


def _picked(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return tokens [N, h, d] at the indices [...], as [..., h, d]."""
    # An embedding, because its backward sums over a prompt that was taken several times, fast and in a fixed order.
    return embedding(indices, tokens.flatten(1)).unflatten(-1, tokens.shape[1:])


AttentionInterface.register(ATTENTION, _attention)
