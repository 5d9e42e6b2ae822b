"""The decode loop's cache of keys and values: tokens are written in place, and rows leave without a copy of the others.

transformers' own cache concatenates every layer at every token, and indexes every layer when a row leaves.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

MIN_GROWTH = 64  # fewest positions that are added when the capacity is used up


class PreallocatedLayer(DynamicLayer):
    """Hold keys and values [B, heads, tokens, size] of one layer as the front part of larger, preallocated tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, new, size], and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Without spare capacity: rows may be copied (`batch_select_indices`) before the first token is appended.
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        held = self.keys.shape[2]
        tokens = held + key_states.shape[2]
        if self._buffers is None or tokens > self._buffers[0].shape[2]:
            capacity = tokens + max(MIN_GROWTH, held // 2)
            self._buffers = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (self.keys, self.values))
            for space, t in zip(self._buffers, (self.keys, self.values), strict=True):
                space[:, :, :held] = t
        rows = len(key_states)
        for space, new in zip(self._buffers, (key_states, value_states), strict=True):
            space[:rows, :, held:tokens] = new
        self.keys, self.values = (space[:rows, :, :tokens] for space in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows by their indices, some several times or not at all; the next `update` allocates again."""
        super().batch_select_indices(indices)
        self._buffers = None

    def keep_rows(self, rows: int, moves: list[tuple[int, int]]) -> None:
        """Keep the first `rows` rows, after copying each row `from` over a row `to` that leaves (`moves`)."""
        self.keys, self.values = (compact_rows(held, rows, moves, held.shape[2]) for held in (self.keys, self.values))


def decode_cache(config: PretrainedConfig) -> tuple[DynamicCache, bool]:
    """Return an empty cache, and whether all layers are PreallocatedLayers (no sliding window, no recurrent state)."""
    cache = DynamicCache(config=config)
    plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if plain:
        cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache, plain


def compact_rows(held: Tensor, rows: int, moves: list[tuple[int, int]], tokens: int) -> Tensor:
    """Return the first `rows` rows of keys or values, after copying each row `from` over a row `to` that leaves.

    `held` is [B, heads, capacity, size], with its first `tokens` positions in use; `moves` are pairs (to, from).
    """
    for target, source in moves:
        held[target, :, :tokens] = held[source, :, :tokens]
    return held[:rows]


def compaction(unfinished: list[bool]) -> tuple[int, list[tuple[int, int]], list[int]]:
    """Plan how the rows that are not `unfinished` leave.

    Return the number of rows that stay; the moves (to, from) that copy the last of them into the slots of those that
    leave; and for each slot the row that is in it afterwards.
    """
    rows = sum(unfinished)
    free = [i for i in range(rows) if not unfinished[i]]
    movers = [i for i in range(rows, len(unfinished)) if unfinished[i]]
    moves = list(zip(free, movers, strict=True))
    order = list(range(rows))
    for target, source in moves:
        order[target] = source
    return rows, moves, order
