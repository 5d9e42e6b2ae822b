"""The processes of a run: which one this is, how they share work and results, and which device each one has."""

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

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """How many processes the launcher started, 1 without one."""
    return launcher_world_size() or 1


def launcher_world_size() -> int | None:
    """How many processes the launcher started, None without one."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


@contextmanager
def process_group(device: torch.device, timeout_s: int) -> Iterator[None]:
    """Join the processes that a launcher started in one group inside the block; do nothing for a single process.

    Args:
        timeout_s: seconds to wait for the others, here and in collectives (a little longer there, so that the watchdog
            reports first).

    Raises:
        UserError: if the others do not join in time.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    # rlhf/system/watchdog.py looks every hundredth of the time, but every 0.25 s at the least and 10 s at the most.
    margin = 5 + timeout_s // 50
    try:
        dist.init_process_group(**backend, timeout=timedelta(seconds=timeout_s + margin))
    except dist.DistError as error:
        raise UserError(
            f"the {world_size()} processes did not find each other within {timeout_s} s: {str(error).splitlines()[0]}",
            f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}",
            "start the stage on every machine, and check that all of them can reach this address and port",
        ) from None
    yield
    dist.barrier()  # the launcher ends the others as soon as one exits with another code than 0
    dist.destroy_process_group()  # not after an error: the others may hang in a collective, and the launcher ends them


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Call `make` on the first process and return its result on all of them; if it raises there, all processes end.

    Raises:
        SystemExit: (2) on the other processes when `make` raised.
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
    if failure:
        raise failure
    if answer[1]:
        raise SystemExit(2)  # the first process reports why
    return answer[0]


def collective_device() -> torch.device:
    """Return the device that the tensors of a collective must be on: NCCL alone takes GPU tensors only."""
    return torch.device("cpu" if "gloo" in str(dist.get_backend_config()) else "cuda")


def is_main_process() -> bool:
    """Return whether this is the first process of the run, which prints, logs and seals checkpoints."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes work together, 1 without a group."""
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
    """Return the tensors [n] of all processes as [processes, n], on the CPU; all must call it with the same n."""
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


def pick_device(recipe: Recipe) -> torch.device:
    """Return the device of this process: run.device, where `auto` takes the GPU of its local rank if there is one.

    Apple's GPUs are not used, because they have no float64, which sampling needs.

    Raises:
        UserError: for run.device=cuda without a CUDA device.
    """
    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", "run.device", "set run.device=cpu, or check the driver and PyTorch")
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
