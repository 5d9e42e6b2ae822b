"""The decode loop's cache of keys and values: written in place, and rows leave it without a copy of the others.

transformers' own cache is joined anew in every layer at every token, and cut anew when a row leaves.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

MIN_GROWTH = 64  # positions added at least when the room is used up


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, heads, tokens, size] of one layer: the front part of tensors that have room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, size] and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # As they are: copies of the rows may follow (`batch_select_indices`) before the first token is appended.
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
        """Rows by their indices, some several times or not at all; the room is made anew for them."""
        super().batch_select_indices(indices)
        self._buffers = None

    def keep_rows(self, rows: int, moves: list[tuple[int, int]]) -> None:
        """Keep the first `rows` rows, after each (to, from) of `moves` was copied over a row that leaves."""
        self.keys, self.values = (compact_rows(held, rows, moves, held.shape[2]) for held in (self.keys, self.values))


def decode_cache(config: PretrainedConfig) -> tuple[DynamicCache, bool]:
    """An empty cache for a model, and whether all its layers are RoomyLayers (none has a sliding window or a state)."""
    cache = DynamicCache(config=config)
    plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if plain:
        cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache, plain


def compact_rows(held: Tensor, rows: int, moves: list[tuple[int, int]], tokens: int) -> Tensor:
    """The first `rows` rows of keys or values, after each (to, from) of `moves` was copied over a row that leaves.

    Args:
        held: [B, heads, room, size], of which the first `tokens` of the room are in use.
    """
    for target, source in moves:
        held[target, :, :tokens] = held[source, :, :tokens]
    return held[:rows]


def compaction(unfinished: list[bool]) -> tuple[int, list[tuple[int, int]], list[int]]:
    """What happens when the rows that are not `unfinished` leave.

    Returns:
        The rows that stay, the (to, from) moves that put the last of them in the places of those that leave, and for
        each place the row that is there afterwards.
    """
    rows = sum(unfinished)
    free = [i for i in range(rows) if not unfinished[i]]
    movers = [i for i in range(rows, len(unfinished)) if unfinished[i]]
    moves = list(zip(free, movers, strict=True))
    order = list(range(rows))
    for target, source in moves:
        order[target] = source
    return rows, moves, order
