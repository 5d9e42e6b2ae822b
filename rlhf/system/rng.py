"""State of the random generators of this process: Python's, numpy's, torch's and that of its GPU.

rng-<process>.pt    in a checkpoint, one for every process
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _path(folder: Path) -> Path:
    return folder / f"rng-{os.environ.get('RANK', '0')}.pt"


def seed_rng(seed: int) -> None:
    """Start all generators from run.seed: what no stage draws from may still be drawn from by a model's own code."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_rng(folder: Path) -> None:
    """Write this process's generators into a checkpoint; every process must."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        # As int64: torch reads no numpy array without running pickled code.
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(state, _path(folder))


def load_rng(folder: Path) -> None:
    """Set this process's generators as the checkpoint has them.

    A process that was not there then keeps its own, seeded by run.seed: with another number of processes no draw would
    be the same anyway.
    """
    path = _path(folder)
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
