"""The processes of a run: which one this is, how many there are, and how they share work and results.

A launcher tells every process its number (RANK) and how many it started (WORLD_SIZE); rlhf/system/ranks.py reads that
and works before the processes have met. `processes` counts those that have met, and
`recipe_processes` (rlhf/plan.py) those that the recipe asks for; rlhf/run/stage.py makes all three the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.system.ranks import is_main_process, launcher_world_size, local_rank

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def process_group(device: torch.device, timeout_s: int) -> Iterator[None]:
    """Join the processes that a launcher started in one group for the block.

    Does nothing for a single process or inside another group. `timeout_s` is how long to wait for the others to join;
    that and every collective are given 5 s and 2 % more, so that the watchdog reports first. After an error in the
    block the group is left as it is. Raises UserError if the processes do not find each other in time.
    """
    world_size = launcher_world_size() or 1
    if world_size == 1 or dist.is_initialized():
        yield
        return
    backend: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    # The watchdog looks every hundredth of the time limit, at least four times a second and at most every 10 s.
    margin = 5 + timeout_s // 50
    try:
        dist.init_process_group(**backend, timeout=timedelta(seconds=timeout_s + margin))
    except dist.DistError as error:
        what = f"the {world_size} processes did not find each other within {timeout_s} s: {str(error).splitlines()[0]}"
        where = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
        fix = "start the stage on every machine, and check that all of them can reach this address and port"
        raise UserError(what, where, fix) from None
    yield
    dist.barrier()  # the launcher ends all processes as soon as one exits with a code other than 0
    # This is not reached after an error: the others may hang in a collective then, and the launcher ends them.
    dist.destroy_process_group()


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Call `make` on the first process and return its result on all of them.

    The result must be picklable. If `make` raises, its error passes through on the first process, and the others raise
    SystemExit(2). Before the processes have met, the others get None.
    """
    answer: list = [None, False]
    failure: BaseException | None = None
    if is_main_process():
        try:
            answer = [make(), False]
        except BaseException as error:
            failure, answer = error, [None, True]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0, device=collective_device())
    if failure is not None:
        raise failure
    if answer[1]:
        raise SystemExit(2)  # the first process reports the reason
    return answer[0]


def collective_device() -> torch.device:
    """Return the device for small tensors of a collective: a group with NCCL alone accepts GPU tensors only."""
    return torch.device("cpu" if "gloo" in str(dist.get_backend_config()) else "cuda")


def maximum_over_processes(number: int) -> int:
    """Return the largest of the processes' numbers; all must call."""
    if processes() == 1:
        return number
    found = torch.tensor(number, device=collective_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def processes() -> int:
    """Return how many processes are in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(rows: Sequence[Item]) -> list[Item]:
    """Return every n-th row for n processes, so that rows sorted by length are shared out evenly; it may be empty."""
    return list(rows[dist.get_rank() :: processes()]) if processes() > 1 else list(rows)


def gather_shards(results: Sequence[Result]) -> list[Result]:
    """Return the results for all rows from those for each process's `shard`, in order; all processes must call it."""
    parts = all_gather_objects(list(results))
    whole: list[Result] = [None] * sum(map(len, parts))  # type: ignore[list-item]
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def all_gather_objects(value: Result) -> list[Result]:
    """Return the value of every process, ordered by rank; all processes must call it."""
    if processes() == 1:
        return [value]
    values: list[Result] = [value] * processes()
    dist.all_gather_object(values, value)
    return values


def all_gather_tensor(row: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked, on the CPU; all must call it with the same shape and dtype."""
    if processes() == 1:
        return row.cpu()[None]
    row = row.to(collective_device())
    rows = [torch.empty_like(row) for _ in range(processes())]
    dist.all_gather(rows, row)
    return torch.stack(rows).cpu()


def barrier() -> None:
    """Wait until all processes have called this."""
    if processes() > 1:
        dist.barrier()


def any_rank(here: bool) -> bool:
    """Return whether `here` is true on any process; all processes must call it."""
    if processes() == 1:
        return here
    flag = torch.tensor(int(here), device=collective_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Return the sum of each number over all processes, in one collective; all processes must call it."""
    if processes() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=collective_device())
    dist.all_reduce(sums)
    return sums.tolist()


def pick_device(recipe: Recipe) -> torch.device:
    """Return the device of this process: the CPU, or the GPU numbered as its local rank, which becomes torch's current.

    Apple's GPUs are not used, because they have no float64, which sampling needs. Raises UserError for run.device=cuda
    without a CUDA device, or if this machine has fewer GPUs than processes.
    """
    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", "run.device", "set run.device=cpu, or check the driver and PyTorch")
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= (count := torch.cuda.device_count()):
        what = f"process {local_rank()} of this machine has no GPU: there are {count}"
        fix = "start at most one process for each GPU, or set run.device=cpu"
        raise UserError(what, "launch.processes", fix)
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device
