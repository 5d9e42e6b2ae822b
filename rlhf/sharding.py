"""Rows shared out over the processes of a distributed run: each works on its part, and all get the whole back.

What PPO, rank and evaluate compute without gradients (samples, log-probabilities, values, scores) is a function of one
row, so it does not matter who computes it. A process whose responses are long keeps the others waiting at the end, and
never hangs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from rlhf.processes import collective_device

Row = TypeVar("Row")
Result = TypeVar("Result")


def processes() -> int:
    """How many processes work together, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own(rows: Sequence[Row]) -> list[Row]:
    """This process's share: every n-th row, so that rows sorted by length are shared out evenly. It may be empty."""
    return list(rows[dist.get_rank() :: processes()]) if processes() > 1 else list(rows)


def gathered(results: Sequence[Result]) -> list[Result]:
    """The results of all processes' `own` rows in the order of the whole; all processes must call it."""
    parts = everyones(list(results))
    whole: list[Result] = [None] * sum(map(len, parts))  # type: ignore[list-item]
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def everyones(value: Result) -> list[Result]:
    """`value` of every process, in order; all processes must call it."""
    if processes() == 1:
        return [value]
    values: list[Result] = [value] * processes()
    dist.all_gather_object(values, value)
    return values


def barrier() -> Callable[[], object] | None:
    """What waits for all processes; None where there is one."""
    return (lambda: everyones(None)) if processes() > 1 else None


def anyone(here: bool) -> bool:
    """Whether it is so on any process; all processes must ask."""
    if processes() == 1:
        return here
    flag = torch.tensor(int(here), device=collective_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
