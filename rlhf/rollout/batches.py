"""Batches of (prompt ids, response ids) pairs: one padded tensor with explicit positions, cut by token count.

Shapes: B rows of L tokens, N response tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.system.phase_timer import count_batch

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass
class SequenceBatch:
    """Hold prompts and responses as one tensor; `rows` and `slots` say which response token each flat entry is.

    All tensors are int64.
    """

    input_ids: Tensor  # [B, L], padded on the right
    position_ids: Tensor  # [B, L]
    rows: Tensor  # [N] row of each response token
    slots: Tensor  # [N] its index in the response
    before: Tensor  # [N] column of the token before it: that position predicts it and holds its value
    targets: Tensor  # [N] id of each response token
    last: Tensor  # [B] column of the last response token

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the batch on another device."""
        return SequenceBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def unflatten(self, flat: Tensor, width: int) -> Tensor:
        """Return flat values [N] as [B, width], with zeros on padding (differentiable)."""
        return flat.new_zeros(len(self.last), width).index_put((self.rows, self.slots), flat)


def build_batch(pairs: Sequence[Pair], pad_id: int) -> SequenceBatch:
    """Return one batch, and count its padding in the current phase; raise ValueError if there are no pairs.

    No prompt may be empty, since the token before a response predicts its first.
    Lengths say what is padding, so `pad_id` may be any token, EOS included. No attention mask is needed, and attention
    takes its fastest kernels: causal attention alone keeps padding from every real token. Positions continue over the
    padding, because transformers takes a restart for the beginning of a packed document.
    """
    width = max(len(p) + len(r) for p, r in pairs)
    count_batch(sum(len(p) + len(r) for p, r in pairs), len(pairs) * width)
    ids = torch.full((len(pairs), width), pad_id)
    positions = torch.arange(width).repeat(len(pairs), 1)
    rows, slots, before, targets, last = [], [], [], [], []
    for row, (prompt, response) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        rows += [row] * len(response)
        slots += range(len(response))
        before += range(start - 1, end - 1)
        targets += response
        last.append(end - 1)
    flat = [torch.tensor(x, dtype=torch.long) for x in (rows, slots, before, targets, last)]
    return SequenceBatch(ids, positions, *flat)


def token_budget_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield the indices in batches of like length, whose padded size is at most `tokens` (or which are one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
