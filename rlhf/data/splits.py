"""Split records into train and held-out parts by prompt, so that no prompt is in both parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from rlhf.data.records import Demonstration, Prompt, Ranking

Item = TypeVar("Item", Prompt, Demonstration, Ranking)


def split_by_prompt(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split into (train, held out), each in the order given; raise ValueError if `fraction` is not in [0, 1).

    A prompt is held out if the hash of the seed and its key, as a number in [0, 1), is below `fraction`. Adding or
    removing rows therefore moves no other prompt, and the held-out share is `fraction` on average, not exactly.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}, not in [0, 1)")
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        prompt = item if isinstance(item, Prompt) else item.prompt
        parts[_hash_fraction(prompt.key, seed) < fraction].append(item)
    return parts


def _hash_fraction(key: str, seed: int) -> float:
    """Return a prompt's hash as a number in [0, 1) of 52 bits, which a float holds exactly."""
    return int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:13], 16) / 16**13
