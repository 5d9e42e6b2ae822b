"""Decoding step by step: prefill the prompts, append one token to each row, and drop the rows that have finished.

Two classes offer the same three methods. `LlamaDecoding` serves the models that rlhf/rollout/llama_forward.py covers,
and `ModelDecoding` serves any other by the model's own forward. Both keep a preallocated cache of keys and values.

Shapes: U distinct prompts, B rows, P the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.kv_cache import PreallocatedLayer, compact_rows, compaction, decode_cache
from rlhf.rollout.llama_forward import KeysValues, LlamaForward, columns_for


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids [B, P] padded on one side, and the mask [B, P] of real tokens, which follows from the lengths."""
    width = max(len(row) for row in rows)
    padding = [[pad_id] * (width - len(row)) for row in rows]
    ids = [[*p, *row] if left else [*row, *p] for p, row in zip(padding, rows, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width)[None] < lengths[:, None]
    return torch.tensor(ids), mask.flip(1) if left else mask


class LlamaDecoding:
    """Decode by `LlamaForward`. Prompts are padded on the right, and generated tokens follow the padding."""

    def __init__(self, model: LlamaForward, max_new_tokens: int, device: torch.device) -> None:
        self.model, self.max_new_tokens, self.device = model, max_new_tokens, device
        self.buffers: list[KeysValues] = []  # of every layer, [B, N, P + max_new_tokens, D]

    def prefill(self, prompts: list[list[int]], prompt_of_row: Tensor, pad_id: int) -> Tensor:
        """Prefill the prompts and return logits [B, V] of the first token; row i continues prompt prompt_of_row[i]."""
        ids, mask = (t.to(self.device) for t in pad(prompts, pad_id, left=False))
        lengths, kept = mask.sum(1), list[KeysValues]()
        last = self.model.hidden(ids, kept)[torch.arange(len(ids), device=self.device), lengths - 1]
        self.end = ids.shape[1]
        while kept:  # one layer after the other, so that only one at a time is in memory twice
            self.buffers.insert(0, KeysValues(*(self._preallocated(t, prompt_of_row) for t in kept.pop())))
        self.positions = lengths[prompt_of_row]
        shape = (len(prompt_of_row), 1, 1, self.end + self.max_new_tokens)
        self.mask = torch.zeros(shape, dtype=last.dtype, device=self.device)
        self.mask[:, 0, 0, : self.end].masked_fill_(~mask[prompt_of_row], -torch.inf)
        self.padded = not bool(mask.all())
        columns = torch.nn.functional.pad(prompt_of_row, (0, columns_for(len(prompt_of_row)) - len(prompt_of_row)))
        return self._logits(last.t()[:, columns], len(prompt_of_row))

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each row and return the logits [B, V] of the next."""
        mask = self.mask[..., : self.end + 1] if self.padded else None
        hidden = self.model.step(tokens, self.positions, self.buffers, self.end, mask)
        self.positions, self.end = self.positions + 1, self.end + 1
        return self._logits(hidden, len(tokens))

    def drop_finished(self, unfinished: list[bool]) -> Tensor:
        """Drop the rows that are not `unfinished`, and return for each remaining slot the row that is now in it."""
        rows, moves, row_of_slot = compaction(unfinished)
        kept = ((compact_rows(held, rows, moves, self.end) for held in layer) for layer in self.buffers)
        self.buffers = [KeysValues(*layer) for layer in kept]
        order = torch.tensor(row_of_slot, device=self.device)
        self.positions, self.mask = self.positions[order], self.mask[order]
        return order

    def _preallocated(self, held: Tensor, prompt_of_row: Tensor) -> Tensor:
        buffers = held.new_empty(len(prompt_of_row), held.shape[1], self.end + self.max_new_tokens, held.shape[3])
        buffers[:, :, : self.end] = held[prompt_of_row]
        return buffers

    def _logits(self, hidden: Tensor, rows: int) -> Tensor:
        assert self.model.head is not None
        return self.model.head.columns(hidden).t()[:rows]


class ModelDecoding:
    """Decode by the model's own forward; prompts are padded on the left."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache, self.compactable = decode_cache(model.config)
        # With a mask made here the query heads of a group attend together, and the model builds none of its own.
        self.direct = self.compactable and model.config._attn_implementation == "sdpa"

    def prefill(self, prompts: list[list[int]], prompt_of_row: Tensor, pad_id: int) -> Tensor:
        """Prefill the prompts and return logits [B, V] of the first token; row i continues prompt prompt_of_row[i]."""
        ids, mask = (t.to(self.model.device) for t in pad(prompts, pad_id, left=True))
        # Positions are explicit: a left-padded GPT-2 answers differently without them.
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self._forward(ids, mask.long(), positions)
        if len(prompts) < len(prompt_of_row):
            self.cache.batch_select_indices(prompt_of_row)
        self.mask, self.positions = mask[prompt_of_row], positions[prompt_of_row, -1]
        return logits[prompt_of_row]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each row and return the logits [B, V] of the next."""
        self.positions = self.positions + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        mask = self.mask[:, None, None] if self.direct else self.mask.long()
        return self._forward(tokens[:, None], mask, self.positions[:, None])

    def drop_finished(self, unfinished: list[bool]) -> Tensor:
        """Drop the rows that are not `unfinished`, and return for each remaining slot the row that is now in it."""
        rows, moves, row_of_slot = compaction(unfinished)
        order = torch.tensor(row_of_slot, device=self.model.device)
        if self.compactable:
            for layer in self.cache.layers:
                assert isinstance(layer, PreallocatedLayer)
                layer.keep_rows(rows, moves)
        else:
            self.cache.batch_select_indices(order)
        self.positions, self.mask = self.positions[order], self.mask[order]
        return order

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
