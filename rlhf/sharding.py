"""Rows shared out over the processes of a distributed run: each works on its part, and all get the whole back.

What PPO, rank and evaluate compute without gradients (samples, log-probabilities, values, scores) is a function of one
row, so it does not matter who computes it. No collective happens while a process works on its rows: one whose responses
are long keeps the others waiting at the end, and never hangs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TypeVar

import torch.distributed as dist
from torch import nn

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


def shared(rows: Sequence[Row], compute: Callable[[list[Row]], Sequence[Result]]) -> list[Result]:
    """compute(rows), each process computing its own rows; `compute` is not called for an empty share."""
    mine = own(rows)
    return gathered(compute(mine) if mine else [])


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


@contextmanager
def whole_weights(*models: nn.Module) -> Iterator[None]:
    """Models with every weight in place: ZeRO-3 gathers theirs on all processes, elsewhere nothing is to be done.

    Inside, a process runs as many forward passes as it has rows, without waiting for others: ranks whose responses end
    at different steps cannot hang. Changes of gathered weights are lost at the end.
    """
    parameters = [p for model in models for p in model.parameters() if hasattr(p, "ds_id")]
    held = [p for p in parameters if getattr(p, "_z3_optimizer", None) is not None]
    if not parameters:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks  # the hooks would partition a layer again after its forward

    owner = SimpleNamespace(optimizer=held[0]._z3_optimizer) if held else None
    with deepspeed.zero.GatheredParameters(parameters):
        if owner:
            remove_hooks(owner)
        try:
            yield
        finally:
            if owner:
                add_hooks(owner)
