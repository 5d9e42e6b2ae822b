"""The signals that ask a stage to stop, how all processes learn of them, and the exit codes that say so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhf.system import rank_logs
from rlhf.system.distributed import collective_device, is_main_process

REPEAT_SECONDS = (
    0.5  # seconds between two signals that a person sent; a launcher's and the terminal's copies come together
)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is Slurm's warning that the time is nearly up
STOPPED = tuple(128 + number for number in STOPPING)


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
            if number == signal.SIGINT and time.monotonic() - self.at > REPEAT_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise StopNow
            return
        self.received, self.at = number, time.monotonic()
        log = rank_logs.current()
        if is_main_process() and not (log and log.error_reported()):  # a launcher ends what is left after a failure
            # Not through a buffered stream: the signal may have come while one was being written to.
            os.write(2, b"\nstopping after this step; Ctrl-C to stop at once\n")
