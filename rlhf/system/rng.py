"""State of this process's random generators, of Python, numpy, torch and the GPU: rng-<process>.pt in a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.system.ranks import process_rank


def _path(folder: Path) -> Path:
    return folder / f"rng-{process_rank()}.pt"


def seed_rng(seed: int) -> None:
    """Seed all generators with run.seed: a model's own code may draw from those that no stage draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_rng(folder: Path) -> None:
    """Write the state of this process's generators into a checkpoint; every process must call this."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        # As int64 tensor: torch cannot load a numpy array without running pickled code.
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(state, _path(folder))


def load_rng(folder: Path) -> None:
    """Set this process's generators to the state in the checkpoint.

    A process that the checkpoint does not know keeps its own state, seeded by run.seed: with another number of
    processes no draw would be the same anyway.
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
