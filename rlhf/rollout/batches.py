"""Batches of (prompt ids, response ids) pairs: one padded tensor with explicit positions, cut by token count.

Shapes: B rows of L tokens, N response tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.system.phase_timer import count_batch

Pair = tuple[Sequence[int], Sequence[int]]


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
