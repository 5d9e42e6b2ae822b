"""Which process this is, as its launcher has said in the environment. Without torch, so that commands start at once."""

from __future__ import annotations

import os


def launcher_world_size() -> int | None:
    """Return how many processes the launcher started, None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def process_rank() -> int:
    """Return the number of this process among those of all machines, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Return whether this is the first process of the run: the one that shows, logs and writes checkpoints."""
    return process_rank() == 0
