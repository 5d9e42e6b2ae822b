"""Rankings of K outputs expanded to the pairs that a pairwise trainer takes; pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Ids = list[int]


def expand(prompt: Ids, responses: Sequence[Ids], ranks: Sequence[int]) -> list[tuple[Ids, Ids]]:
    """(chosen ids, rejected ids), prompt included, of all pairs with different ranks; rank 1 is best."""
    pairs = []
    for i, j in combinations(range(len(responses)), 2):
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            pairs.append((prompt + responses[better], prompt + responses[worse]))
    return pairs
