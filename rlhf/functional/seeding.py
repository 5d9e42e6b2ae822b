"""Derive seeds, uniform numbers and shuffled orders from keys alone, so that a resumed run needs no generator state."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def shuffled_indices(n: int, seed: int, name: str, start: int, count: int) -> list[int]:
    """Return positions [start, start + count) of an endless stream of passes over range(n), each shuffled anew.

    `name` is the kind of rows ("prompts", "ptx", ...), so that the streams of one run differ. Raises ValueError if n is
    below 1.
    """
    if n < 1:
        raise ValueError(f"no rows to draw {name} from")
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), n)
        order = np.random.default_rng(row_seed(seed, name, epoch)).permutation(n)
        out += order[offset : offset + count - len(out)].tolist()
    return out


def row_seed(*parts: int | str) -> int:
    """Return a 64-bit seed that depends on `parts` alone, e.g. (run seed, "ppo", iteration, row)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Return uniform numbers [B, steps] in [0, 1), float64; row i depends on seeds[i] alone."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(steps) for s in seeds]))
