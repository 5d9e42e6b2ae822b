"""A shuffled, endless stream of indices without state: position in, indices out; resuming needs one number."""

from __future__ import annotations

import numpy as np

from rlhf.rollout import row_seed


def stream(n: int, seed: int, name: str, start: int, count: int) -> list[int]:
    """Indices at positions [start, start + count) of passes over range(n), each pass in an order of its own.

    Args:
        name: what is streamed ("prompts", "ptx", ...), so that streams of one run differ.

    Raises:
        ValueError: when there is nothing to stream from.
    """
    if n < 1:
        raise ValueError(f"no rows to draw {name} from")
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), n)
        order = np.random.default_rng(row_seed(seed, name, epoch)).permutation(n)
        out += order[offset : offset + count - len(out)].tolist()
    return out
