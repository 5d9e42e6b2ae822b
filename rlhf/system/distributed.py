"""The processes of a run: which one this is, what all must agree on, and how work and results are shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf.config import Recipe
from rlhf.errors import UserError

T = TypeVar("T")
Item = TypeVar("Row")
Result = TypeVar("Result")


def world_size() -> int:
    """How many processes the launcher started, 1 without one."""
    return launcher_world_size() or 1


def launcher_world_size() -> int | None:
    """How many processes the launcher started, None without one."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


@contextmanager
def process_group(device: torch.device, timeout_s: int) -> Iterator[None]:
    """Be in one group with the processes that a launcher started; nothing for a single process.

    Args:
        timeout_s: seconds to wait for the others, here and in collectives (a little longer: the watch speaks first).

    Raises:
        UserError: when the others do not come.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    # rlhf/system/watchdog.py looks every hundredth of the time, at least four times a second, at most every 10 s.
    margin = 5 + timeout_s // 50
    try:
        dist.init_process_group(**backend, timeout=timedelta(seconds=timeout_s + margin))
    except dist.DistError as error:
        raise UserError(
            f"the {world_size()} processes did not find each other within {timeout_s} s: {str(error).splitlines()[0]}",
            f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}",
            "start the stage on every machine; see that this address and port can be reached from all of them",
        ) from None
    yield
    dist.barrier()  # the launcher ends the others when one has gone with another code than 0
    dist.destroy_process_group()  # not after an error: the others may hang in a collective, and the launcher ends them


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; where it raises there, all of them end.

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
        raise SystemExit(2)  # the first process tells why
    return answer[0]


def collective_device() -> torch.device:
    """Where small tensors of a collective must be: a group with NCCL alone takes GPU tensors only."""
    return torch.device("cpu" if "gloo" in str(dist.get_backend_config()) else "cuda")


def is_main_process() -> bool:
    """Whether this is the first process of the run: the one that shows, logs and seals."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes work together, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(rows: Sequence[Item]) -> list[Item]:
    """This process's share: every n-th row, so that rows sorted by length are shared out evenly. It may be empty."""
    return list(rows[dist.get_rank() :: processes()]) if processes() > 1 else list(rows)


def gather_shards(results: Sequence[Result]) -> list[Result]:
    """The results of all processes' `own` rows in the order of the whole; all processes must call it."""
    parts = all_gather_objects(list(results))
    whole: list[Result] = [None] * sum(map(len, parts))  # type: ignore[list-item]
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def all_gather_objects(value: Result) -> list[Result]:
    """`value` of every process, in order; all processes must call it."""
    if processes() == 1:
        return [value]
    values: list[Result] = [value] * processes()
    dist.all_gather_object(values, value)
    return values


def barrier() -> Callable[[], object] | None:
    """What waits for all processes; None where there is one."""
    return (lambda: all_gather_objects(None)) if processes() > 1 else None


def any_rank(here: bool) -> bool:
    """Whether it is so on any process; all processes must ask."""
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
    """The device of this process: run.device, `auto` taking the GPU of its local rank where there is one.

    Raises:
        UserError: for run.device=cuda without one.
    """
    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", "run.device", "set run.device=cpu, or check the driver and PyTorch")
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
