"""Signals, and what the processes of a distributed run must agree on before and while they work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf import ranklog
from rlhf.errors import UserError
from rlhf.progress import is_main_process
from rlhf.stopping import STOPPING

T = TypeVar("T")


TWICE = 0.5  # seconds between two signals that a person sent; a launcher's and the terminal's copies come together


class StopNow(BaseException):
    """Raised by a second Ctrl-C, wherever the work stands."""


@dataclass
class Signals:
    """Notes the first SIGINT, SIGTERM or SIGUSR1; a later SIGINT raises StopNow and the next ends the process.

    SIGTERM and SIGUSR1 stop nothing at once however often they come: schedulers send them to every process of a job,
    and `rlhf run` hands its own on.
    """

    received: int = 0  # number of the first signal
    at: float = 0.0  # when it came, time.monotonic

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Catch the signals while the block lasts."""
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> int:
        """`received`, on all processes as soon as one has it; all of them must ask at the same places."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(self.received, device=collective_device())
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if flag:  # else `received` stays: a signal that came during the reduction is for the next call
                self.received = int(flag)
            return int(flag)
        return self.received

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.at > TWICE:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise StopNow
            return
        self.received, self.at = number, time.monotonic()
        log = ranklog.current()
        if is_main_process() and not (log and log.told()):  # a launcher ends what is left after a failure
            # Not through a buffered stream: the signal may have come while one was being written to.
            os.write(2, b"\nstopping after this step; Ctrl-C to stop at once\n")


def world_size() -> int:
    """How many processes the launcher started, 1 without one."""
    return launched() or 1


def launched() -> int | None:
    """How many processes the launcher started, None without one."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


@contextmanager
def joined(device: torch.device, timeout_s: int) -> Iterator[None]:
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
    # The watch (rlhf/watch.py) looks every hundredth of the time, at least four times a second, at most every 10 s.
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


def from_first(make: Callable[[], T]) -> T:
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
